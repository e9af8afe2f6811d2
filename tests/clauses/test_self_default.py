"""Row 7, self as the default: every number equals dense float64 code over an eager model and autograd's gradients."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.loss_oracles import exact
from support.reference import dense_attention
from support.spy import spy_on
from support.tiny import summed_loss, tiny, tokens

from posterity import InputError
from posterity.clauses import self_default
from posterity.clauses.dataset import assemble
from posterity.clauses.dense_attention import DenseAttention, spearman
from posterity.clauses.drawing import View
from posterity.clauses.self_default import SELF_DEFAULT, default_places, measure_self_default
from posterity.clauses.subject import Plan, Subject
from posterity.models.attach import observe_model
from posterity.models.language_model import freeze_parameters
from posterity.results.audit_schema import FAILS, HOLDS, MIXED

NAMES = ["llama", "qwen3", "gpt2", "mistral", "gemma2", "gpt_oss"]


def subject(model, ids, **changes):
    return Subject(model, None, list(ids), Plan(**({"context": ids.shape[1], "limit": len(ids)} | changes)))


def rank(xs):
    """By counting: how many are smaller, and half of the others that are equal."""
    return [sum(y < x for y in xs) + (sum(y == x for y in xs) - 1) / 2 for x in xs]


def correlation(xs, ys):
    return np.corrcoef(rank(xs), rank(ys))[0, 1]


def by_hand(model, ids):
    """The numbers of one window: name -> (layer, head), places (4, layer, head), and the defaults."""
    with spy_on(model) as spy:
        summed_loss(model, ids[None]).backward()
    numbers = {name: [] for name in ("correlation", "permuted", "weight", "first", "cosine", "places")}
    for query, key, value, output, scale, allowed, softcap, sinks in spy.calls:
        query, key, value, output = (x.detach() for x in (query, key, value, output))
        _, score, weight = dense_attention(query, key, value, scale, allowed, softcap, sinks)
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)[0]
        score, weight, allowed, length = score[0], weight[0], allowed[0, 0], len(ids)
        rows = {name: [] for name in numbers}
        for h in range(query.shape[1]):
            others = {i: [j for j in range(1, i) if allowed[i, j]] for i in range(2, length)}
            best = {i: max(score[h, i, j].item() for j in keys) for i, keys in others.items() if keys}
            queries = sorted(best)
            rows["correlation"].append(correlation([weight[h, i, i].item() for i in queries], list(best.values())))
            changed = score[h].clone()  # the permutation of the test turns the order of the queries around
            for i, other in zip(queries, queries[::-1], strict=True):
                changed[i, i] = score[h, other, other]
            own = []
            for i in queries:
                logits = [changed[i, j] for j in range(i + 1) if allowed[i, j]]
                logits += [] if sinks is None else [sinks[h].detach()]
                own.append((torch.exp(changed[i, i]) / torch.exp(torch.stack(logits)).sum()).item())
            rows["permuted"].append(correlation(own, list(best.values())))
            rows["weight"].append(np.mean([weight[h, i, i].item() for i in range(1, length)]))
            rows["first"].append(np.mean([weight[h, i, 0].item() for i in range(1, length)]))
            cosines = [torch.cosine_similarity(output[0, h, i], value[h, i], 0).item() for i in range(1, length)]
            rows["cosine"].append(np.mean(cosines))
            weakest = sorted(queries, key=lambda i: best[i])[: math.ceil(len(queries) / 4)]
            of_query = [
                [
                    weight[h, i, i].item(),
                    weight[h, i, 0].item(),
                    sum(weight[h, i, j].item() for j in others[i]),
                    1 - weight[h, i].sum().item(),
                ]
                for i in weakest
            ]
            rows["places"].append(np.mean(of_query, 0))
        for name, row in rows.items():
            numbers[name].append(row)
    numbers = {name: np.array(rows) for name, rows in numbers.items()}
    return numbers | {"places": np.moveaxis(numbers["places"], 2, 0)}


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_that_of_dense_code(name, monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda number, generator: torch.arange(number).flip(0))
    model, ids = exact(name), tokens(3)
    finding = measure_self_default(subject(model, ids))
    windows = [by_hand(model, window) for window in ids]
    for measure in ("correlation", "permuted", "weight", "first", "cosine", "places"):
        expected = np.stack([window[measure] for window in windows])
        close(finding.variables[f"{measure}"], expected.mean(0))
        close(finding.variables[f"{measure}_error"], expected.std(0, ddof=1) / math.sqrt(3))
    assert (finding.variables["identity"] < 1e-12).all()
    places = np.mean([window["places"] for window in windows], 0)
    default = [[{0: 1, 1: 2}.get(int(np.argmax(places[:, layer, head])), 0) for head in range(4)] for layer in range(3)]
    close(finding.variables["default"], default)
    first = np.stack([window["first"] for window in windows])
    figures = {window.name: window for window in finding.figures}
    close(figures["heads with self as default"].value, np.mean(np.array(default) == 1))
    close(figures["heads with the first as default"].value, np.mean(np.array(default) == 2))
    close(figures["sinks"].value, (first.mean(0) > 0.3).mean())
    close(figures["sinks"].error, (first > 0.3).mean((1, 2)).std(ddof=1) / math.sqrt(3))
    close(figures["rank correlation"].value, np.mean([window["correlation"] for window in windows]))
    close(figures["rank correlation"].baseline, np.mean([window["permuted"] for window in windows]))
    close(figures["self weight"].value, np.mean([window["weight"] for window in windows]))
    close(figures["output along the own value"].value, np.mean([window["cosine"] for window in windows]))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_the_self_score_pays_what_all_others_and_the_sink_get_and_an_error_is_seen(name):
    """Against autograd's own gradient of the scores, for the dense side; a wrong log-sum-exp is no rounding."""
    model, ids = tiny(name, torch.float32), tokens(1)
    calls, sinks = [], []
    with (
        freeze_parameters(model),
        observe_model(model, lambda layer, back, project: calls.append(back)) as watch,
        watch.replace_outputs(lambda layer, call: sinks.append(call.sinks)),
    ):
        summed_loss(model, ids).backward()
    for back, sink in zip(calls, sinks[::-1], strict=True):
        rounded = DenseAttention(back, sink).identity_error()
        assert 0 < rounded.max() < 1e-5
        wrong = DenseAttention(replace(back, lse=back.lse + 0.01), sink)
        assert (wrong.identity_error() > 1e-3).any()
        if sink is not None:
            without = DenseAttention(back, None).identity_error()
            assert (without > 1e-3).any()


def test_a_planted_default_is_found():
    """Values, keys and queries by hand: one head falls back on itself, one on the first position, one on nothing."""
    length = 40
    generator = torch.Generator().manual_seed(1)
    best = torch.rand(length, generator=generator)  # how well each query matches the one before it
    scores = torch.full((3, length, length), -60.0)
    for i in range(length):
        scores[:, i, max(i - 1, 0)] = 6 * best[i] - 3
        scores[:, i, 0] = -60.0
        scores[0, i, i], scores[1, i, i], scores[2, i, i] = 0.0, -60.0, -60.0
        scores[1, i, 0] = 0.0
    dense = object.__new__(DenseAttention)
    edges = torch.ones(length, length, dtype=torch.bool).tril().expand(3, -1, -1)
    dense.edges, dense.score = edges, scores.double().masked_fill(~edges, -torch.inf)
    dense.weight = torch.softmax(dense.score, -1)
    dense.sink = torch.full((3, length, 1), -torch.inf, dtype=torch.float64)
    dense.sink_weight = torch.zeros(3, length, dtype=torch.float64)
    dense.self_weight = dense.weight.diagonal(0, 1, 2)
    others = edges.tril(-1).clone()
    others[..., 0] = False
    dense.best_match = dense.score.masked_fill(~others, -torch.inf).amax(-1)
    dense.query_mask = others.any(-1)
    assert default_places(dense.place_weights().numpy()).tolist() == [1, 2, 0]
    correlation = dense.correlation(dense.self_weight)
    torch.testing.assert_close(correlation[0].item(), -1.0, rtol=0, atol=1e-6)


def test_ranks_with_ties_are_mean_ranks():
    x = torch.tensor([3.0, 1, 3, 2, 3, 1], dtype=torch.float64)
    y = torch.tensor([1.0, 5, 2, 2, 4, 4], dtype=torch.float64)
    close(spearman(x, y).item(), correlation(x.tolist(), y.tolist()))
    close(spearman(x, x).item(), 1)
    assert spearman(x, torch.ones_like(x)).isnan()


def test_the_permuted_baseline_is_seeded_and_the_model_comes_back():
    model, ids = tiny("llama"), tokens(2)
    first, second = (measure_self_default(subject(model, ids)).variables for _ in range(2))
    assert all(first[name].identical(second[name]) for name in first)
    other = measure_self_default(subject(model, ids, seed=1)).variables
    assert not first["permuted"].equals(other["permuted"])
    assert first["correlation"].equals(other["correlation"])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("share", "verdict"), [([4, 4, 4], HOLDS), ([0, 0, 0], FAILS), ([4, 0, 4], MIXED), ([4, 2, 4], HOLDS)]
)
def test_the_verdict_follows_the_share_of_heads_layer_by_layer(share, verdict):
    places = np.zeros((4, 3, 4))
    places[1] = 0.5
    for layer, number in enumerate(share):
        places[0, layer, :number] = 0.9
    numbers = {name: np.zeros((2, 3, 4)) for name in self_default.HEAD_NUMBERS}
    finding = self_default._finding(numbers, np.stack([places, places]))
    assert finding.verdict == verdict
    assert f"default of {sum(share)} of 12 heads" in finding.reason
    assert f"first position is that of {12 - sum(share)}" in finding.reason


def test_charts_come_from_the_saved_audit_alone_and_bear_what_is_missing():
    finding = SELF_DEFAULT.find(subject(tiny("llama"), tokens(1)))
    audit = assemble({"one": {7: finding}}, [SELF_DEFAULT], {})
    charts = SELF_DEFAULT.draw(View(audit, "one"))
    assert [chart.title for chart in charts] == [
        "Defaults", "Self weight against other matches", "Sinks", "Self by layer",
    ]  # fmt: skip
    assert np.shape(charts[0].traces[0]["z"]) == (3, 4)
    close(charts[3].traces[0]["y"], finding.variables["self_default_weight"].mean("head"))
    names = [name for name in audit.data_vars if str(name).startswith("self_default_")]
    assert SELF_DEFAULT.draw(View(audit.drop_vars(names), "one")) == []
    for name in names:
        SELF_DEFAULT.draw(View(audit.drop_vars(name), "one"))
        SELF_DEFAULT.draw(View(audit.assign({name: audit[name] * math.nan}), "one"))


def test_windows_that_are_too_short_are_refused_in_one_line():
    with pytest.raises(InputError, match="row 7 expects windows of at least 4 tokens; got context=3"):
        measure_self_default(subject(tiny("llama"), tokens(1, 3)))
