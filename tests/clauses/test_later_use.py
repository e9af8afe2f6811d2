"""Row 6: what single keys, heads and edges are worth equals what forward passes changed by hand say."""

import math

import numpy as np
import pytest
import torch
from support.loss_oracles import exact
from support.losses_by_hand import losses_by_hand
from support.tiny import tiny, tokens

from posterity import InputError
from posterity.clauses import later_use
from posterity.clauses.dataset import assemble
from posterity.clauses.drawing import View
from posterity.clauses.later_use import LATER_USE
from posterity.clauses.subject import Plan, Subject
from posterity.models.patching import LATER_MEAN, Patch, patched_losses
from posterity.results.audit_schema import FAILS, HOLDS, MIXED

SMALL = {"short": 9, "pass_tokens": 20, "positions": 3, "share": 0.3, "context": 14, "limit": 3}


def subject(model, ids=None, **changes):
    return Subject(model, None, list(tokens(3, 14) if ids is None else ids), Plan(**(SMALL | changes)))


def test_row_6_is_what_passes_changed_by_hand_say(monkeypatch):
    model, asked = exact("llama"), []

    def recorded(model, ids, patches, **kwargs):
        asked.append((ids, patches))
        return patched_losses(model, ids, patches, **kwargs)

    monkeypatch.setattr(later_use, "patched_losses", recorded)
    finding = LATER_USE.find(subject(model))
    short, long = asked[:2], asked[2:]
    assert [len(ids) for ids, _ in asked] == [9, 9, 14, 14, 14]

    heads, alone = [], []  # (window) -> {(kind, layer, head): ...}
    for ids, patches in short:
        plain = losses_by_hand(model, ids).sum()
        worth = {}
        for patch in patches:
            if patch is None:
                continue
            at = () if patch.positions is None else tuple(patch.positions.tolist())
            assert len(set(at)) == len(at)
            assert set(at) <= set(range(1, 7))  # an own loss and a later reader with a loss
            losses = losses_by_hand(model, ids, patch.kind, patch.layer, patch.head, patch.positions)
            change = (losses.sum() - plain).item()
            worth[patch.kind, patch.layer, patch.head, at if patch.head is None else len(at)] = change
        heads.append({key[:3]: change / (key[3] or 8) for key, change in worth.items() if key[2] is not None})
        alone.append({(key[0], key[1], *key[3]): change for key, change in worth.items() if key[2] is None})
        assert {key[3] for key in worth if key[2] is not None} == {0, 3}  # a share of 0.3 of 9 positions
    for name, (kind, _, _) in later_use.EFFECTS.items():
        windows = np.array([[[one[kind, layer, head] for head in range(4)] for layer in range(3)] for one in heads])
        near(finding.variables[f"later_use_{name}"], windows.mean(0))
        near(finding.variables[f"later_use_{name}_error"], windows.std(0, ddof=1) / math.sqrt(2))

    later = [[] for _ in range(3)]
    for one in alone:
        cases = {key[1:] for key in one}
        assert len(cases) == 9  # three positions in each of three layers
        for layer, at in cases:
            later[layer].append(one["later mean", layer, at] > one["own mean", layer, at])
    near(finding.variables["later_use_share"], np.mean(later, 1))
    for name in ("own", "later"):
        values = [[x for one in alone for k, x in one.items() if k[:2] == (f"{name} mean", n)] for n in range(3)]
        near(finding.variables[f"later_use_position_{name}"], np.mean(values, 1))

    whole = np.array(
        [[losses_by_hand(model, ids, kind).mean() for kind in (None, "no self", "self only")] for ids, _ in long]
    )
    near(finding.variables["later_use_loss"], whole.mean(0))
    near(finding.variables["later_use_loss_error"], whole.std(0, ddof=1) / math.sqrt(3))
    figures = {one.name: one for one in finding.figures}
    near(figures["loss"].value, whole[:, 0].mean())
    near(figures["loss with self edges only"].value, whole[:, 2].mean())
    near(figures["loss with no self edges"].baseline, whole[:, 0].mean())
    near(figures["positions worth more later"].value, np.mean(later))
    for name in ("no_self", "own_mean"):
        kind, words, _ = later_use.EFFECTS[name]
        near(
            figures[f"{words}, mean over heads"].value,
            np.mean([x for one in heads for k, x in one.items() if k[0] == kind]),
        )
    back = [one["self and first", *k[1:]] > x for one in heads for k, x in one.items() if k[0] == "no self"]
    near(figures["heads that need the look-back more"].value, np.mean(back))


def near(values, expected):
    np.testing.assert_allclose(values, expected, rtol=1e-8, atol=1e-11)


def test_a_last_key_is_worth_nothing_to_later_queries():
    """Why positions are drawn from 1 to N - 3: the reader of position N - 2 is the last one, which has no loss."""
    model, ids = exact("llama"), tokens(1, 9)[0]
    patches = [Patch(LATER_MEAN, layer, None, torch.tensor([at])) for at in (6, 7, 8) for layer in range(3)]
    change = (patched_losses(model, ids, [None, *patches])[1:] - patched_losses(model, ids, [None])).abs().sum(1)
    assert (change[:2] > 1e-6).all()  # in the last layer the reader needs a loss of its own
    assert (change[3:] == 0).all() or change[3:].max() < 1e-12


def single(shares, cases=16):
    """Loss changes of two windows: in each layer, later use is worth more in a share of the cases."""
    rows = [[1.0] * round(share * cases) + [-1.0] * (cases - round(share * cases)) for share in shares]
    later = np.array([rows, rows])
    return np.stack([np.zeros_like(later), later], 1)


def test_the_error_of_a_share_is_at_least_that_of_coins_and_ties_count_half():
    share, error = later_use.later_share(single([1, 0.5, 0], 2))
    near(share, [1, 0.5, 0])
    near(error, 0.5 / math.sqrt(4))
    share, _ = later_use.later_share(np.zeros((2, 2, 1, 4)))
    near(share, 0.5)
    uneven = np.zeros((2, 2, 1, 100))
    uneven[0, 1], uneven[1, 1] = 1, -1
    near(later_use.later_share(uneven)[1], 0.5)


@pytest.mark.parametrize(
    ("shares", "costs", "verdict"),
    [
        ([1, 1, 1], (0.1, 5), HOLDS), ([0, 0, 0], (5, 0.1), FAILS), ([1, 0, 1], (0.1, 5), MIXED),
        ([1, 1, 1], (5, 0.1), MIXED), ([0, 0, 0], (0.1, 5), MIXED), ([0.5, 0.5, 0.5], (0.1, 5), MIXED),
    ],
)  # fmt: skip
def test_the_verdict_of_row_6_needs_the_layers_and_the_whole_model(shares, costs, verdict):
    losses = np.array([[3, 3 + costs[0], 3 + costs[1]]] * 2)
    finding = later_use._finding(np.ones((2, 4, 3, 4)), single(shares), losses)
    assert finding.verdict == verdict
    assert f"most in {sum(share == 1 for share in shares)} of 3 layers" in finding.reason
    assert f"{costs[1]:.3f} nats per token, their absence {costs[0]:.3f}" in finding.reason
    if 0 in shares:
        assert "few in layer" in finding.reason


def test_row_6_draws_from_the_saved_audit_alone_and_bears_what_is_missing():
    finding = LATER_USE.find(subject(tiny("llama"), pass_tokens=9))
    clause = LATER_USE
    audit = assemble({"one": {6: finding}}, [clause], {})
    charts = clause.draw(View(audit, "one"))
    assert [chart.traces[0]["type"] for chart in charts] == ["bar", "scatter", *["heatmap"] * 4]
    near(charts[0].traces[0]["y"], finding.variables["later_use_loss"])
    assert np.shape(charts[2].traces[0]["z"]) == (3, 4)
    names = [name for name in audit.data_vars if str(name).startswith("later_use_")]
    assert clause.draw(View(audit.drop_vars(names), "one")) == []
    for name in names:
        clause.draw(View(audit.drop_vars(name), "one"))
        clause.draw(View(audit.assign({name: audit[name] * math.nan}), "one"))


def test_row_6_is_seeded():
    one, two, other = (
        LATER_USE.find(subject(tiny("llama"), seed=seed)).variables["later_use_own_mean"] for seed in (0, 0, 1)
    )
    assert one.equals(two)
    assert not one.equals(other)


def test_what_row_6_cannot_measure_is_refused_in_one_line():
    with pytest.raises(InputError, match="row 6 expects windows of at least 4 tokens; got short=3"):
        LATER_USE.find(subject(tiny("llama"), short=3))
    model = tiny("llama")
    mix = lambda module, args, output: output + 0.1 * output.cumsum(1)  # noqa: E731
    model.model.layers[0].mlp.register_forward_hook(mix)
    with pytest.raises(InputError, match="needs every path between positions to go through attention"):
        LATER_USE.find(subject(model))
