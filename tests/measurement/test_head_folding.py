"""Folded heads pass their own value on: inside a `with`, and in a model that was saved and loaded again."""

import copy
import json

import pytest
import torch
from support.loss_oracles import exact
from support.losses_by_hand import mean_loss
from support.price_reference import dense_window_prices
from support.reference import dense_attention
from support.spy import Spy, spy_on, use_attention
from support.texts import tokenizer
from support.tiny import summed_loss, tiny, tokens
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import posterity
from posterity import InputError
from posterity.cli import main as cli
from posterity.inputs import model as loading
from posterity.inputs.limits_folder import save_folded
from posterity.inputs.model import load_folded
from posterity.measurement.head_folding import FoldedHeads, largest_within_budget, price_heads
from posterity.measurement.window_batch import uniform_draws
from posterity.models.attach import watch_model
from posterity.models.folded_heads import fold_heads
from posterity.models.permanent_limits import fold_permanently
from posterity.models.probe import check
from posterity.results import stats

HEADS = {0: [1, 3], 2: [0, 1, 2, 3]}
FAMILIES = ["llama", "qwen3", "phi3", "gpt_neox", "gpt2", "mistral", "gemma2", "deepseek_v3"]


def heads_of(name):
    return {0: [1, 3], 1: [0, 1, 2, 3]} if name == "deepseek_v3" else HEADS


def by_hand(heads):
    """Attention with the diagonal alone for some heads of some layers, in N x N masks."""

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
        allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        allowed = allowed.expand(len(query), query.shape[1], -1, -1).clone()
        allowed[:, heads.get(module.layer_idx, [])] = torch.eye(query.shape[2], dtype=torch.bool)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output, _, _ = dense_attention(query, key, value, scaling, allowed, softcap)
        return output.transpose(1, 2).contiguous(), None

    return attend


def logits_by_hand(model, ids, heads):
    with use_attention(model, "by hand", by_hand(heads)), torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # norms go through float32


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_heads_is_a_diagonal_mask_for_them(name):
    model, ids = tiny(name), tokens(2, 12)
    plain, heads = logits(model, ids), heads_of(name)
    all_heads = {layer: [0, 1, 2, 3] for layer in range(model.config.num_hidden_layers)}
    for subset in (heads, all_heads, {1: [2]}):
        with fold_heads(model, subset):
            actual = logits(model, ids)
        close(actual, logits_by_hand(model, ids, subset))
        assert (actual - plain).abs().max() > 1e-2
    assert torch.equal(logits(model, ids), plain)


def test_folding_is_exact_in_float64_with_its_gradients():
    model, ids = exact("llama"), tokens(2, 12)
    with fold_heads(model, [(layer, head) for layer, subset in HEADS.items() for head in subset]):
        loss = summed_loss(model, ids)
        loss.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with use_attention(model, "by hand", by_hand(HEADS)):
        expected = summed_loss(model, ids)
        expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        # Queries and keys that nobody reads have no gradient; under a mask it is zero.
        grad = torch.zeros_like(parameter) if grad is None else grad
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-10, atol=1e-11)


def test_foldings_nest():
    model, ids = tiny("llama"), tokens(2, 12)
    with fold_heads(model, {0: [1], 2: [0]}), fold_heads(model, {0: [3], 1: [2]}):
        actual = logits(model, ids)
    close(actual, logits_by_hand(model, ids, {0: [1, 3], 1: [2], 2: [0]}))


def test_masks_that_differ_between_heads_stay_with_their_heads():
    model, ids = tiny("llama"), tokens(2, 9)
    mask = torch.ones(2, 4, 9, 9, dtype=torch.bool).tril()
    for head in range(4):
        mask[:, head] &= torch.ones(9, 9, dtype=torch.bool).triu(-head)  # a window of head + 1
    with fold_heads(model, {1: [2]}), torch.no_grad():
        actual = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    mask_there = mask.clone()
    mask_there[:, 2] = torch.eye(9, dtype=torch.bool)

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        output, _, _ = dense_attention(query, key, value, scaling, mask_there if module.layer_idx == 1 else mask)
        return output.transpose(1, 2).contiguous(), None

    with use_attention(model, "by hand", attend):
        close(actual, logits(model, ids))


def test_a_head_is_ranked_by_the_price_of_a_window_of_one_token():
    model, ids = exact("llama"), tokens(3, 10)
    prices = price_heads(model, list(ids), seed=2)
    by_window = []
    for row in ids:
        with spy_on(model) as spy:
            predictions = model(input_ids=row[None], use_cache=False).logits[:, :-1]
            below = predictions.softmax(-1).cumsum(-1) <= uniform_draws(row, 2)[None, :-1, None]
            torch.nn.functional.cross_entropy(predictions.mT, below.sum(-1), reduction="sum").backward()
        first = torch.zeros(1, 1, 1, 10, dtype=torch.bool)
        layers = [
            dense_window_prices((query, key, value), output.grad, scale, allowed, first)[0][0, :, 0]
            for query, key, value, output, scale, allowed, *_ in spy.calls
        ]
        by_window.append(torch.stack(layers) / 9)
    torch.testing.assert_close(prices.cost, torch.stack(by_window).mean(0), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(prices.error, torch.stack(by_window).std(0) / 3**0.5, rtol=1e-9, atol=1e-15)
    order = [float(prices.cost[head] + prices.error[head]) for head in prices.order]
    assert order == sorted(order)
    assert len(order) == 12


@pytest.fixture(scope="module")
def folded():
    return posterity.fold(exact("llama"), None, tokens(9, 12, 3), context=12, limit=3, budget=0.05, progress=False)


def test_the_joint_cost_is_within_the_budget_and_measured(folded):
    model, ids = exact("llama"), tokens(9, 12, 3)
    assert 0 < len(folded.heads) < 12
    assert folded.selection.change <= 0.05
    assert folded.heads == tuple(folded.prices.order[: len(folded.heads)])
    for losses, subset in ((folded.selection, ids[3:6]), (folded.held_out, ids[6:])):
        before, after = mean_loss(model, subset, {}), mean_loss(model, subset, folded.by_layer)
        assert losses.before == pytest.approx(float(before.mean()), abs=1e-12)
        assert losses.after == pytest.approx(float(after.mean()), abs=1e-12)
        assert losses.change == pytest.approx(float((after - before).mean()), abs=1e-12)
        assert losses.error == pytest.approx(float((after - before).std()) / 3**0.5, abs=1e-12)
    assert folded.joint[len(folded.heads)] == folded.selection.change
    assert folded.joint[len(folded.heads) + 1] > 0.05


def test_bisection_finds_the_longest_prefix_of_a_cost_that_grows():
    tried = []

    def cost(number):
        tried.append(number)
        return float(number > answer)

    for answer in range(8):
        tried.clear()
        assert largest_within_budget(cost, 7, 0.5) == answer
        assert len(tried) <= 3
    assert largest_within_budget(lambda number: 1.0, 7, 0.0) == 0
    assert largest_within_budget(lambda number: -1.0, 7, 0.0) == 7


def test_no_budget_folds_harmless_heads_only(folded):
    model, ids = exact("llama"), tokens(9, 12, 3)
    none = posterity.fold(model, None, ids, context=12, limit=3, budget=0, progress=False)
    assert none.selection.change <= 0
    assert len(none.heads) <= len(folded.heads)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()  # no head does anything
    harmless = posterity.fold(model, None, ids, context=12, limit=3, budget=0, progress=False)
    assert (len(harmless.heads), harmless.selection.change, harmless.held_out.change) == (12, 0.0, 0.0)


# A model that runs folded for good


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "folded"
    save_folded(tiny("llama"), tokenizer(), HEADS, path, {"budget": 0.5})
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_runs_folded_has_the_logits_of_the_mask(name):
    model, ids = tiny(name), tokens(2, 12)
    expected = logits_by_hand(model, ids, heads_of(name))
    fold_permanently(model, heads_of(name))
    close(logits(model, ids), expected)
    close(logits(copy.deepcopy(model), ids), expected)


def test_a_saved_model_is_folded_for_posterity_and_plain_for_transformers(folder):
    model, ids = tiny("llama"), tokens(2, 12)
    with fold_heads(model, HEADS):
        expected = logits(model, ids)
    for loaded in (load_folded(folder), loading.load_model(str(folder), device="cpu").model):
        assert torch.equal(logits(loaded.cpu(), ids), expected)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    close(logits(plain, ids), logits(model, ids))
    assert "posterity_folded" not in (folder / "config.json").read_text()
    assert check(plain).ok
    data = json.loads((folder / "folded.json").read_text())
    assert data == {"version": 1, "heads": {"0": [1, 3], "2": [0, 1, 2, 3]}, "budget": 0.5}


def test_a_folded_model_that_transformers_saves_again_stays_folded(folder, tmp_path):
    model, ids = load_folded(folder).cpu(), tokens(2, 12)
    model.save_pretrained(tmp_path / "again")
    tokenizer().save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loading.load_model(str(tmp_path / "again"), device="cpu").model, ids), logits(model, ids))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_generating_with_a_cache_gives_what_it_gives_without(name):
    model, ids = tiny(name), tokens(2, 6)
    fold_permanently(model, HEADS)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options))
    close(logits(model, cached[:, :-1])[:, 5:].argmax(-1), cached[:, 6:])
    cache = model(input_ids=cached[:, :7], use_cache=True).past_key_values
    rest = model(input_ids=cached[:, 7:11], past_key_values=cache).logits
    close(rest, logits(model, cached)[:, 7:11])


def test_padding_on_the_left_changes_nothing():
    model, ids = tiny("llama"), tokens(1, 8)
    fold_permanently(model, HEADS)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), 1)
    mask = torch.tensor([[0] * 3 + [1] * 8])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    actual = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    close(actual[:, 3:], logits(model, ids))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_a_folded_model_is_measured_as_it_runs(name):
    model, ids = tiny(name), tokens(3, 12)
    fold_permanently(model, HEADS)
    assert str(check(model)) == "can be measured: 3 attention layers"
    result = posterity.measure(model, None, ids, context=12, lags="all", losses=True, progress=False)
    assert float(stats.balance(result).max()) < 1e-6
    torch.testing.assert_close(torch.tensor(result.loss.values), mean_loss_of(model, ids), rtol=1e-6, atol=0)
    other = result.credit.isel(lag=slice(1, None))
    for layer, subset in HEADS.items():
        assert not other.sel(layer=layer, head=subset).any()
        assert (result.attention.sel(layer=layer, head=subset).sum(("reader_of", "lag")) == 3 * 12).all()
        unread = result.credit.sel(layer=layer, head=subset, stream=["query", "key"])
        # The rounding of ds_ii, times the gradient of a key that other heads of the group read.
        assert float(abs(unread).max()) < 64 * torch.finfo(torch.float64).eps * float(abs(result.credit).max())
    assert other.sel(layer=1).any()


def mean_loss_of(model, ids):
    return torch.stack([summed_loss(model, row[None]).detach() / 11 for row in ids])


def test_the_ledger_of_a_folded_model_is_that_of_masks_by_hand():
    model, ids = exact("llama"), tokens(1, 12)
    fold_permanently(model, HEADS)
    result = posterity.measure(model, None, ids, context=12, lags="all", weights=False, progress=False)
    plain = exact("llama")
    spy = Spy()

    def attend(module, query, key, value, attention_mask, **kwargs):
        mask = attention_mask.expand(-1, query.shape[1], -1, -1).clone()
        diagonal = torch.full((12, 12), torch.finfo(mask.dtype).min, dtype=mask.dtype).fill_diagonal_(0)
        mask[:, HEADS.get(module.layer_idx, [])] = diagonal
        return spy.attend(module, query, key, value, mask, **kwargs)

    with use_attention(plain, "spied by hand", attend):
        summed_loss(plain, ids).backward()
    for layer, (credit, *_) in enumerate(spy.accounts()):
        dense = torch.stack([credit.diagonal(-lag, -2, -1).sum(-1) for lag in range(12)], -1)[:, 0]
        actual = torch.tensor(result.credit.sum("reader_of").sel(layer=layer).transpose("stream", "head", "lag").values)
        torch.testing.assert_close(actual, dense, rtol=1e-9, atol=1e-12)


def test_a_folded_model_folds_further_and_keeps_what_it_had(folder, tmp_path):
    model, ids = load_folded(folder).cpu(), tokens(2, 12)
    save_folded(model, tokenizer(), {1: [2]}, tmp_path / "more", {})
    actual = logits(load_folded(tmp_path / "more").cpu(), ids)
    close(actual, logits_by_hand(tiny("llama"), ids, {**HEADS, 1: [2]}))
    close(logits(model, ids), logits_by_hand(tiny("llama"), ids, HEADS))


# What cannot be


def test_mistakes_are_one_line(tmp_path, folder):
    model, ids = tiny("llama"), tokens(4, 12)
    for heads, message in (({3: [0]}, r"\(3, 0\)"), ({0: [4]}, r"\(0, 4\)"), ([(-1, 0)], r"\(-1, 0\)")):
        with pytest.raises(InputError, match=f"layers from 0 to 2 and heads from 0 to 3; got {message}"):
            fold_heads(model, heads).__enter__()
    with pytest.raises(InputError, match="budget of at least 0 nats per token; got -1"):
        posterity.fold(model, None, ids, budget=-1, context=12, progress=False)
    with pytest.raises(InputError, match="three windows of 12 tokens at least"):
        posterity.fold(model, None, ids[:1], context=12, progress=False)
    with pytest.raises(InputError, match="fold it outside"), fold_heads(model, HEADS):
        posterity.fold(model, None, ids, context=12, progress=False)
    with pytest.raises(InputError, match=r"has no folded\.json: load it as any model"):
        load_folded(tmp_path)
    (tmp_path / "else").write_text("something")
    with pytest.raises(InputError, match="it holds something else"):
        save_folded(model, None, HEADS, tmp_path, {})
    with pytest.raises(InputError, match="it is a file: choose another"):
        save_folded(model, None, HEADS, tmp_path / "else", {})
    with pytest.raises(InputError, match="is none to write in"):
        save_folded(model, None, HEADS, tmp_path / "nowhere" / "folder", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["else"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "it is damaged: fold it again"),
        ('{"version": 2}', "is of version 2"),
        ('{"version": 1}', "it is damaged"),
        ('{"version": 1, "heads": {"7": [0]}}', r"got \(7, 0\)"),
    ],
)
def test_a_damaged_list_of_heads_is_never_read_as_none(data, message, tmp_path):
    save_folded(tiny("llama"), tokenizer(), HEADS, tmp_path / "folded", {})
    (tmp_path / "folded" / "folded.json").write_text(data)
    with pytest.raises(InputError, match=message):
        loading.load_model(str(tmp_path / "folded"))


def test_sinks_and_modules_without_a_number_of_their_own_are_refused():
    model = tiny("gpt_oss")
    with pytest.raises(InputError, match="GptOssForCausalLM cannot be folded: its attention has sinks"):
        posterity.fold(model, None, tokens(4, 12), context=12, progress=False)
    model = tiny("llama")
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(InputError, match="cannot be limited for good"):
        fold_permanently(model, HEADS)
    assert model.config._attn_implementation == "eager"


def test_a_folder_is_written_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    target = tmp_path / "model"
    save_folded(tiny("llama"), tokenizer(), HEADS, target, {})
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("posterity.inputs.limits_folder.write_atomically", full)
    with pytest.raises(InputError, match="No space left on device"):
        save_folded(tiny("llama"), tokenizer(), {1: [0]}, target, {})
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    save_folded(tiny("llama"), tokenizer(), {1: [0]}, target, {})
    assert json.loads((target / "folded.json").read_text())["heads"] == {"1": [0]}


# The command line


@pytest.fixture
def plain(tmp_path):
    tiny("llama", torch.float32).save_pretrained(tmp_path / "plain")
    tokenizer().save_pretrained(tmp_path / "plain")
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in tokens(1, 100)[0].tolist()))
    return tmp_path


def run(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def test_the_command_writes_a_folded_model_and_verifies_it(plain):
    options = ["--budget", 0.5, "--context", 12, "--documents", 2, "--device", "cpu", "-o", plain / "out"]
    answer = run("fold", plain / "plain", plain / "text.txt", *options)
    assert answer.exit_code == 0, answer.output
    assert "of 12 heads look only at themselves" in answer.output
    assert "loss on held-out windows: " in answer.output
    assert "as measured" in answer.output
    data = json.loads((plain / "out" / "folded.json").read_text())
    assert data["budget"] == 0.5
    assert data["losses"]["chosen"]["change"] <= 0.5
    assert sum(map(len, data["heads"].values())) > 0
    assert check(load_folded(plain / "out")).ok


def test_a_folding_beyond_its_budget_on_held_out_windows_is_written_by_force_only(plain):
    other_text = tokens(1, 100, 4)[0].tolist()  # on which heads seem cheaper than they are
    (plain / "text.txt").write_text(" ".join(f"w{number}" for number in other_text))
    options = ["--budget", 0.05, "--context", 12, "--documents", 2, "--device", "cpu", "-o", plain / "out"]
    answer = run("fold", plain / "plain", plain / "text.txt", *options)
    assert answer.exit_code == 1
    assert "there it is more than the budget of 0.05" in answer.stdout
    assert answer.stderr.splitlines()[-1].startswith(f"posterity: {plain / 'out'} is not written: +0.0817 nats")
    assert not (plain / "out").exists()
    answer = run("fold", plain / "plain", plain / "text.txt", *options, "--force")
    assert answer.exit_code == 0, answer.output
    assert check(load_folded(plain / "out")).ok


def test_the_command_fails_where_the_loaded_model_is_another(plain, monkeypatch):
    monkeypatch.setattr(loading, "apply_limits", lambda *args: None)
    options = ["--budget", 0.5, "--context", 12, "--documents", 2, "--device", "cpu", "-o", plain / "out"]
    answer = run("fold", plain / "plain", plain / "text.txt", *options)
    assert answer.exit_code == 2
    assert "posterity: expected the folded model to have the loss that was measured" in answer.output


def test_the_command_says_before_the_work_where_it_cannot_write(plain, monkeypatch):
    monkeypatch.setattr(loading, "load_model", None)
    for output, message in ((plain, "it holds something else"), (plain / "plain", "it is read here")):
        answer = run("fold", plain / "plain", plain / "text.txt", "-o", output)
        assert answer.exit_code == 2
        assert message in answer.output
        assert answer.output.count("\n") == 1


def test_a_finding_prints_every_layer_with_folded_heads(folded):
    assert isinstance(folded, FoldedHeads)
    for layer, subset in folded.by_layer.items():
        assert f"layer {layer}: heads {', '.join(map(str, subset))}\n" in str(folded)
    assert ("more than the budget of 0.05" in str(folded)) == (folded.held_out.change > 0.05)


def test_watching_is_over_after_folding():
    model = tiny("llama")
    with fold_heads(model, HEADS):
        pass
    with watch_model(model) as watch:
        assert watch.replacement is None
    assert model.config._attn_implementation == "eager"
