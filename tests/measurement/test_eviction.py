"""Evictions: scores against formulas written down densely, choices by hand, divergence against masked attention."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file, save_file
from support.texts import byte_tokenizer
from support.tiny import tiny, tokens
from transformers import AttentionInterface, AttentionMaskInterface

import posterity
from posterity.errors import InputError
from posterity.measurement import cache_scorers as scorers
from posterity.measurement import eviction
from posterity.measurement.eviction import choose_pairs, parse_shares
from posterity.measurement.eviction_texts import counted_targets, task_windows
from posterity.measurement.price_fit import Prices
from posterity.results.eviction_schema import EQUAL, LAYER, MODEL

PREFIX, LENGTH = 14, 24
OPTIONS = {"prefix": PREFIX, "continuation": LENGTH - PREFIX, "progress": False}


class Spy:
    """Scorer that keeps what it gets, and ranks pairs by their position."""

    name = "spy"

    def __init__(self):
        self.layers = []

    def __call__(self, prompt, share):
        self.layers.append(prompt)
        return torch.arange(prompt.length, dtype=torch.float32).expand(len(prompt.key), -1)


def dense_inputs(model, ids):
    """Return queries, keys and values of each layer from a registered attention function, with its dense weights."""
    layers = []

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        score = query @ key.repeat_interleave(groups, 1).mT * scaling
        allowed = torch.ones(score.shape[-2:], dtype=torch.bool).tril()
        if getattr(model.config, "sliding_window", None):
            allowed &= torch.ones(score.shape[-2:], dtype=torch.bool).triu(1 - model.config.sliding_window)
        weight = score.masked_fill(~allowed, -torch.inf).softmax(-1)
        layers.append((query[0], key[0], value[0], weight[0], module))
        return (weight @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("dense_spy", attend)
    AttentionMaskInterface.register("dense_spy", lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation("dense_spy")
    try:
        with torch.no_grad():
            model(input_ids=ids[None], use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return layers


def by_group(heads, groups):
    return heads.view(groups, -1, *heads.shape[1:])


def expected_scores(layer, future):
    """Return what each scorer should say, written down from dense attention."""
    _, key, value, weight, module = layer
    groups = len(key)
    key, value = key[:, :PREFIX], value[:, :PREFIX]
    prompt = weight[:, :PREFIX, :PREFIX]
    window = prompt[:, -4:].mean(1)[:, :-4]
    smooth = torch.stack([window[:, max(0, j - 1) : j + 2].sum(1) / 3 for j in range(window.shape[1])], 1)
    snap = by_group(smooth, groups).mean(1)
    snap = torch.cat((snap, torch.full((groups, 4), float(snap.max()) + 1, dtype=snap.dtype)), 1)
    last = prompt[:, -1, :-1].mean(0)
    mean_key = (key / key.norm(dim=-1, keepdim=True)).mean(1, keepdim=True)
    w_o = module.o_proj.weight.detach().view(-1, weight.shape[0], value.shape[-1])  # width, head, dim
    norms = torch.stack([(value[h * groups // len(weight)] @ w_o[:, h].mT).abs().sum(-1) for h in range(len(weight))])
    critical = (snap + 1e-4) * by_group(norms, groups).mean(1)
    return {
        "oracle: future attention": by_group(weight[:, PREFIX:future, :PREFIX].sum(1), groups).sum(1),
        "SnapKV": snap,
        "H2O": by_group(prompt.sum(1), groups).sum(1),
        "TOVA": torch.cat((last, last.max()[None] + 1)).expand(groups, -1),
        "key norm": -key.norm(dim=-1),
        "key difference": -(key * mean_key).sum(-1) / key.norm(dim=-1) / mean_key.norm(dim=-1),
        "attention x value norm": by_group(prompt[:, -4:].mean(1), groups).sum(1) * value.abs().sum(-1),
        "CriticalKV (SnapKV)": critical,
    }


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_scores_are_those_of_dense_attention(name):
    model, ids = tiny(name), tokens(1, LENGTH)
    spy = Spy()
    posterity.evict(model, None, ids, scorers=[spy], kept=[0.5], **OPTIONS)
    snap = scorers.SnapKV(window=4, kernel=3)
    ours = [scorers.AttentionOracle(), snap, scorers.H2O(), scorers.TOVA(), scorers.KeyNorm(), scorers.KeyDifference(),
            scorers.ValueWeighted(window=4), scorers.CriticalKV(base=snap, first=0.0)]  # fmt: skip
    for prompt, layer in zip(spy.layers, dense_inputs(model, ids[0]), strict=True):
        expected = expected_scores(layer, LENGTH)
        with torch.no_grad():
            for scorer in ours:
                if scorer.name.startswith("CriticalKV"):
                    with posterity.models.attach.watch_model(model):
                        actual = scorer(prompt, 0.5)
                else:
                    actual = scorer(prompt, 0.5)
                scale = expected[scorer.name].abs().max()
                assert (actual - expected[scorer.name]).abs().max() < 1e-5 * scale, scorer.name
        first_and_last = scorers.FirstAndLast(2)(prompt, 0.5)[0].argsort(descending=True).tolist()
        assert first_and_last[:4] == [0, 1, PREFIX - 1, PREFIX - 2]


def test_expected_attention_is_the_mean_over_normal_queries():
    """Without covariance, and with all queries equal, it is the attention of the rotated query itself."""
    model, ids = tiny("llama"), tokens(1, LENGTH)
    spy = Spy()
    posterity.evict(model, None, ids, scorers=[spy], kept=[0.5], **OPTIONS)
    prompt = spy.layers[1]
    scorer = scorers.ExpectedAttention(sinks=1, future=LENGTH - PREFIX)
    with posterity.models.attach.watch_model(model):
        actual = scorer(prompt, 0.5)
    module, hidden = prompt.module, prompt.hidden[:PREFIX].detach()
    cosine, sine = prompt.inputs[1]["position_embeddings"]
    dim, heads = module.head_dim, model.config.num_attention_heads
    query = (hidden @ module.q_proj.weight.detach().mT).view(PREFIX, heads, dim).transpose(0, 1)[:, 1:]
    half = dim // 2
    swap = torch.zeros(dim, dim, dtype=torch.double)
    swap[:half, half:], swap[half:, :half] = -torch.eye(half), torch.eye(half)
    rotation = torch.stack(
        [torch.diag(cosine[0, t].double()) + sine[0, t].double()[:, None] * swap for t in range(PREFIX, LENGTH)]
    ).mean(0)
    key = prompt.key.repeat_interleave(heads // len(prompt.key), 0)[:, 1:]
    mean = query.mean(1) @ rotation.T
    centred = query - query.mean(1, keepdim=True)
    covariance = rotation @ (centred.mT @ centred / query.shape[1]) @ rotation.T
    scores = (key @ mean[..., None])[..., 0] / dim**0.5 + torch.einsum(
        "hni,hij,hnj->hn", key, covariance, key
    ) / dim / 2
    scores = by_group(scores.softmax(-1), len(prompt.key)).mean(1) * prompt.value[:, 1:].norm(dim=-1)
    assert (actual[:, 1:] - scores).abs().max() < 1e-4 * scores.abs().max()
    assert (actual[:, 0] > actual[:, 1:].max()).all()


def test_pairs_are_chosen_by_hand():
    scores = [torch.tensor([[9.0, 1.0, 2.0, 8.0], [3.0, 4.0, 5.0, 6.0]]), torch.tensor([[7.0, 0.0, 0.5, 0.2]])]
    everything = [torch.ones(4, dtype=torch.bool)] * 2
    half = Fraction(1, 2)

    def chosen(visible, share, budget):
        return [mask.nonzero()[:, 0].tolist() for mask in choose_pairs(scores, visible, share, budget)]

    assert chosen(everything, half, MODEL) == [[0, 3], [1, 2, 3], [0]]
    assert chosen(everything, half, EQUAL) == [[0, 3], [2, 3], [0, 2]]
    assert chosen(everything, half, LAYER) == [[0, 3], [2, 3], [0, 2]]
    hidden = [torch.tensor([False, True, True, True]), torch.ones(4, dtype=torch.bool)]
    assert chosen(hidden, half, MODEL) == [[3], [1, 2, 3], [0]]
    assert chosen(hidden, half, EQUAL) == [[3], [3], [0, 2]]
    assert chosen(everything, Fraction(1), MODEL) == [[0, 1, 2, 3]] * 3
    many = [torch.stack((torch.arange(100.0) + 100, torch.arange(100.0)))]
    seen = [torch.ones(100, dtype=torch.bool)]
    masks = choose_pairs(many, seen, half, LAYER)
    assert [int(mask.sum()) for mask in masks] == [90, 10]  # a fifth of 50 for sure
    assert [int(mask.sum()) for mask in choose_pairs(many, seen, half, MODEL)] == [100, 0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_the_divergence_is_that_of_masked_attention(name):
    model, ids = tiny(name), tokens(2, LENGTH)
    result = posterity.evict(model, None, ids, scorers=[Spy()], kept=["1/2", "1"], budgets=[EQUAL], **OPTIONS)
    assert result.sizes == {"document": 2, "scorer": 1, "budget": 1, "kept": 2}
    window = getattr(model.config, "sliding_window", None)
    seen = min(PREFIX, (window or LENGTH) - 1)
    dropped = PREFIX - seen // 2  # the spy keeps the latest

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        if window:
            allowed &= torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1 - window)
        if drop:
            allowed[PREFIX:, :dropped] = False
        groups = query.shape[1] // key.shape[1]
        score = query @ key.repeat_interleave(groups, 1).mT * scaling
        weight = score.masked_fill(~allowed, -torch.inf).softmax(-1)
        return (weight @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("dense_drop", attend)
    AttentionMaskInterface.register("dense_drop", lambda *args, **kwargs: None)
    model.set_attn_implementation("dense_drop")
    for number, row in enumerate(ids):
        with torch.no_grad():
            drop = False
            full = model(input_ids=row[None], use_cache=False).logits[0, PREFIX:-1].log_softmax(-1)
            drop = True
            other = model(input_ids=row[None], use_cache=False).logits[0, PREFIX:-1].log_softmax(-1)
        divergence = (full.exp() * (full - other)).sum(-1).mean()
        change = (full - other).gather(1, row[PREFIX + 1 :, None]).mean()
        loss = -full.gather(1, row[PREFIX + 1 :, None]).mean()
        ours = result.isel(document=number, scorer=0, budget=0)
        tolerance = {"rel": 1e-8 if name == "gpt2" else 1e-4}
        assert float(ours.divergence.sel(kept=0.5)) == pytest.approx(float(divergence), **tolerance)
        assert float(ours.loss_change.sel(kept=0.5)) == pytest.approx(float(change), **tolerance)
        assert float(ours.loss) == pytest.approx(float(loss), rel=1e-6)
        assert float(ours.divergence.sel(kept=1)) == pytest.approx(0, abs=1e-9)


def test_all_scorers_and_files_stand_beside_each_other(tmp_path):
    model, ids = tiny("llama"), tokens(3, 80, seed=3)
    prices = Prices.fit(model, None, tokens(8, 24), context=24, horizon=8, limit=8, progress=False)
    prices.save(tmp_path / "prices")
    options = {"prefix": 70, "continuation": 10, "kept": ("1/2", "1/4"), "progress": False}
    first = posterity.evict(
        model, None, ids, prices=tmp_path / "prices", save_windows=tmp_path / "w.safetensors", **options
    )
    assert "predicted price" in first.scorer.values
    assert len(first.scorer) == 12
    assert torch.equal(load_file(tmp_path / "w.safetensors")["tokens"], ids)
    by_scorer = first.divergence.sel(budget=MODEL, kept=0.5).mean("document")
    assert by_scorer.sel(scorer="oracle: measured price") < by_scorer.median()
    assert (first.correlation.sel(scorer="oracle: measured price") > 1 - 1e-9).all()
    scores = torch.arange(70, dtype=torch.float32).expand(3, 3, 2, 70).contiguous()
    save_file({"scores": scores}, tmp_path / "mine.safetensors", {"scorer": "mine"})
    again = posterity.evict(
        model, None, ids, scorers=[Spy()], scores=[tmp_path / "mine.safetensors"], budgets=[EQUAL, LAYER], **options
    )
    assert list(again.scorer.values) == ["spy", "mine"]
    np.testing.assert_array_equal(again.divergence.sel(scorer="spy"), again.divergence.sel(scorer="mine"))
    posterity.save(again, tmp_path / "e.nc")
    assert posterity.load(tmp_path / "e.nc").identical(again)
    table = posterity.table(again, "eviction")
    row = table.query("quantity == 'divergence' and scorer == 'mine' and budget == 'equal' and kept == 0.25")
    values = again.divergence.sel(scorer="mine", budget=EQUAL, kept=0.25).values
    assert row.value.item() == pytest.approx(values.mean())
    assert row.error.item() == pytest.approx(values.std(ddof=1) / math.sqrt(3))
    with pytest.raises(InputError, match="expected scores of window 0, layer 0, of the shape"):
        posterity.evict(
            model, None, ids, scorers=[], scores=[tmp_path / "mine.safetensors"], **{**options, "prefix": 69}
        )


def test_scorers_go_by_their_names():
    model, ids = tiny("llama"), tokens(1, 90)
    names = ["oracle-measured-price", "first-and-last", "attention-x-value-norm", "criticalkv-snapkv"]
    options = {"prefix": 80, "continuation": 10, "kept": ["1/2"], "progress": False}
    result = posterity.evict(model, None, ids, scorers=names, **options)
    assert result.scorer.values.tolist() == [
        "oracle: measured price", "first and last", "attention x value norm", "CriticalKV (SnapKV)"
    ]  # fmt: skip
    whole = posterity.evict(model, None, ids, **options)
    xr.testing.assert_equal(result.divergence, whole.divergence.sel(scorer=result.scorer))
    with pytest.raises(InputError, match="predicted-price needs prices"):
        posterity.evict(model, None, ids, scorers=["predicted-price"], **options)
    with pytest.raises(InputError, match=r"expected scorers among oracle-measured-price, .*; got 'snap'"):
        posterity.evict(model, None, ids, scorers=["snap"], **options)
    with pytest.raises(InputError, match="expected a scorer at least"):
        posterity.evict(model, None, ids, scorers=[], **options)


def test_an_interrupted_run_goes_on_with_the_same_numbers(tmp_path, monkeypatch):
    model, ids = tiny("llama"), tokens(4, LENGTH)
    options = {"scorers": ["oracle-measured-price", "h2o"], "kept": ["1/2"], **OPTIONS}
    whole = posterity.evict(model, None, ids, **options)
    add, added = eviction._Trial.add, []

    def interrupted(self, sums, number, window):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(number)
        add(self, sums, number, window)

    monkeypatch.setattr(eviction._Trial, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        posterity.evict(model, None, ids, state=tmp_path / "state", **options)
    monkeypatch.setattr(eviction._Trial, "add", lambda *args: added.append(args[2]) or add(*args))
    with pytest.raises(InputError, match="scorers"):
        posterity.evict(model, None, ids, state=tmp_path / "state", **{**options, "scorers": [scorers.H2O()]})
    again = posterity.evict(model, None, ids, state=tmp_path / "state", **options)
    assert 4 <= len(added) < 6
    xr.testing.assert_equal(again, whole)


def test_tasks_are_written_so_that_they_can_be_solved():
    tokenizer = byte_tokenizer(begin=True)
    for task in ("copy", "retrieval"):
        windows, again = (task_windows(task, tokenizer, 3, 120, 60, seed) for seed in (0, 0))
        assert all(torch.equal(x.ids, y.ids) for x, y in zip(windows, again, strict=True))
        assert not torch.equal(windows[0].ids, windows[1].ids)
        for window in windows:
            assert len(window.ids) == 180
            targets = counted_targets(window, 120)
            assert (targets[:120] == -100).all()
            assert targets[-1] == -100
            counted = (targets != -100).nonzero()[:, 0]
            assert len(counted) > 10
            assert torch.equal(targets[counted], window.ids[counted + 1])
    copied = task_windows("copy", tokenizer, 1, 120, 60, 0)[0].ids
    assert any(torch.equal(copied[start : start + 60], copied[120:]) for start in range(4))
    text = tokenizer.decode(task_windows("retrieval", tokenizer, 1, 120, 60, 0)[0].ids)
    assert text.count(":") > 4


def test_wrong_arguments_end_in_one_line(tmp_path):
    model, ids = tiny("llama"), tokens(2, LENGTH)
    assert parse_shares(["1/4", 0.5, "1/4"]) == [Fraction(1, 2), Fraction(1, 4)]
    wrong = [
        ({"kept": ["0"]}, "above 0, at most 1; got 0"),
        ({"kept": ["5/4"]}, "above 0, at most 1; got 5/4"),
        ({"kept": ["many"]}, "expected shares of the cache such as 1/4 or 0.25; got 'many'"),
        ({"kept": []}, "got none"),
        ({"budgets": ["fair"]}, "expected budgets among"),
        ({"prefix": 1}, "a prompt and a continuation of 2 tokens at least"),
        ({"task": "copy"}, "the task 'copy' is written, not read"),
        ({"prices": tmp_path}, r"expected a folder with prices\.safetensors"),
        ({"scores": [tmp_path / "none.safetensors"]}, "expected a safetensors file with `scores`"),
        ({"scorers": [scorers.H2O(), scorers.H2O()]}, "names of their own"),
        ({"scorers": [scorers.SnapKV(window=PREFIX)]}, "expected a prompt longer than"),
    ]
    for options, message in wrong:
        with pytest.raises(InputError, match=message):
            posterity.evict(model, None, ids, **{**OPTIONS, "scorers": [Spy()], **options})
    with pytest.raises(InputError, match="expected one of the tasks text, copy, retrieval; got 'sort'"):
        posterity.evict(model, None, None, **{**OPTIONS, "task": "sort"})
    with pytest.raises(InputError, match="Expected Attention needs rotary embeddings"):
        posterity.evict(tiny("gpt2"), None, ids, **{**OPTIONS, "scorers": [scorers.ExpectedAttention()]})
    other = Prices.fit(tiny("qwen3"), None, tokens(4, 24), context=24, horizon=8, progress=False)
    with pytest.raises(InputError, match="expected the model that the prices were fitted on"):
        posterity.evict(model, None, ids, **{**OPTIONS, "prices": other})
