"""Patched forward passes: every loss equals that of an eager model whose edges, keys and values are changed by hand."""

import math

import numpy as np
import pytest
import torch
from support.loss_oracles import exact
from support.spy import attending
from support.tiny import tiny, tokens

from posterity import InputError
from posterity.clauses import later_use
from posterity.clauses.clause import Plan, Subject
from posterity.clauses.dataset import assemble
from posterity.clauses.drawing import View
from posterity.models.attach import watching
from posterity.models.patching import (
    LATER_MEAN,
    NO_SELF,
    OWN_MEAN,
    SELF_ONLY,
    SINK_AND_SELF,
    Patch,
    head_counts,
    patched_losses,
)
from posterity.results.audit_schema import FAILS, HOLDS, MIXED

NAMES = ["llama", "qwen3", "gpt2", "mistral", "gemma2", "gpt_oss"]
AT = torch.tensor([2, 5, 6])
ALL = [(NO_SELF, None), (SINK_AND_SELF, None), (SELF_ONLY, None), (OWN_MEAN, AT), (LATER_MEAN, AT)]


def one_head(query, key, value, allowed, scale, softcap, sink, kind, at):
    """One head under a patch: every edge (i, j) has a key and a value of its own, (query, key, dim)."""
    length = len(query)
    seen = torch.zeros(length, length, dtype=torch.bool)
    keys, values = key.repeat(length, 1, 1), value.repeat(length, 1, 1)
    for i, j in allowed.nonzero().tolist():
        alone = allowed[i].sum() == 1
        seen[i, j] = {"no self": i != j or alone, "self and first": j in (0, i), "self only": i == j}.get(kind, True)
        if (kind == "own mean" and i == j in at) or (kind == "later mean" and i > j and j in at):
            keys[i, j], values[i, j] = key.sum(0) / length, value.sum(0) / length
    score = scale * torch.einsum("id,ijd->ij", query, keys)
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    weight = torch.exp(score) * seen
    total = weight.sum(1) + (0 if sink is None else torch.exp(sink))
    return torch.einsum("ij,ijd->id", weight / total[:, None], values)


def by_hand(model, ids, kind=None, layer=None, head=None, at=None):
    """Losses of one window, by position."""
    at = None if at is None else at.tolist()

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        share = query.shape[1] // key.shape[1]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows = []
        for h in range(query.shape[1]):
            mine = layer in (None, module.layer_idx) and head in (None, h)
            given = query[0, h], key[0, h // share], value[0, h // share], attention_mask[0, 0] == 0
            sink = None if s_aux is None else s_aux[h]
            rows.append(one_head(*given, scaling, softcap, sink, kind if mine else None, at))
        return torch.stack(rows, 1)[None], None

    with torch.no_grad(), attending(model, "by_hand", attend):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return torch.stack([torch.logsumexp(x, -1) - x[target] for x, target in zip(logits[:-1], ids[1:], strict=True)])


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_every_patch_is_an_edge_or_a_key_and_value_changed_by_hand(name):
    model, ids = exact(name), tokens(1)[0]
    cases = [
        (kind, layer, head, at) for kind, at in ALL for layer, head in ((1, 3), (2, None), (None, 1), (None, None))
    ]
    found = patched_losses(model, ids, [Patch(*case) for case in cases], batch=3)
    for row, case in zip(found, cases, strict=True):
        close(row, by_hand(model, ids, *case))
    plain = by_hand(model, ids)
    close(patched_losses(model, ids, [None])[0], plain)
    assert ((found - plain).abs().amax(1) > 1e-4).all()  # every one of these patches matters


@pytest.mark.parametrize("name", NAMES)
def test_every_head_of_a_batch_has_its_own_patch_and_the_shortcut_changes_nothing(name):
    model, ids = exact(name), tokens(1, 9)[0]
    patches = [Patch(NO_SELF, layer, head) for head in range(4) for layer in range(3)] + [None]
    done = []
    with watching(model):
        short = patched_losses(model, ids, patches, batch=4, advance=lambda *x: done.append(x))
        long = patched_losses(model, ids, patches, batch=5, shortcut=False)
    torch.testing.assert_close(short, long, rtol=1e-13, atol=1e-13)
    close(short, torch.stack([by_hand(model, ids, *(("no self", p.layer, p.head) if p else ())) for p in patches]))
    assert sum(rows for rows, _ in done) == len(patches)
    assert sum(count for _, count in done) == 9 * len(patches)


def test_layers_below_a_patch_are_not_computed():
    model, ids = exact("llama"), tokens(1)[0]
    calls = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
    with watching(model):
        calls.clear()
        patched_losses(model, ids, [Patch(NO_SELF, 2, head) for head in range(4)], batch=2)
    plain, sound, batches = [0, 1, 2], [2], [2, 2]
    assert calls == plain + sound + batches


def test_the_model_comes_back_as_it_was_after_patches_and_after_errors():
    model, ids = exact("llama"), tokens(1)[0]
    own = [dict(vars(module)) for module in model.modules()]
    before = model(input_ids=ids[None]).logits
    patched_losses(model, ids, [Patch(SELF_ONLY, 2)])
    with pytest.raises(InputError, match="a head from 0 to 3; got 4"):
        patched_losses(model, ids, [Patch(SELF_ONLY, 2, 4)])
    for module, fields in zip(model.modules(), own, strict=True):
        assert vars(module).get("forward") is fields.get("forward")
    assert torch.equal(model(input_ids=ids[None]).logits, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_is_no_plain_stack_falls_back_to_whole_passes():
    ids = tokens(1)[0]
    patches = [Patch(NO_SELF, layer) for layer in (0, 1, 2)]
    around = exact("llama")  # what the last layer adds is put down by the first, outside the stack
    seen = {}
    first, last = around.model.layers[0].mlp, around.model.layers[2].mlp
    first.register_forward_hook(lambda module, args, output: seen.update(first=output))
    last.register_forward_hook(lambda module, args, output: output + seen.pop("first"))
    found = patched_losses(around, ids, patches, batch=2)
    assert torch.equal(found, patched_losses(around, ids, patches, batch=2, shortcut=False))
    close(found, torch.stack([by_hand(around, ids, "no self", layer) for layer in (0, 1, 2)]))


def test_what_an_earlier_patch_left_behind_is_found_out():
    """The last layer reads what the middle one put down, which a patch of the middle one has changed."""
    model, ids, seen = exact("llama"), tokens(1)[0], {}
    middle, last = model.model.layers[1].mlp, model.model.layers[2].mlp
    middle.register_forward_hook(lambda module, args, output: seen.update(output=output))
    last.register_forward_hook(lambda module, args, output: output + seen["output"])
    found = patched_losses(model, ids, [Patch(SELF_ONLY, layer) for layer in (1, 2)], batch=1)
    close(found, torch.stack([by_hand(model, ids, "self only", layer) for layer in (1, 2)]))


def test_a_module_that_is_called_twice_is_patched_call_by_call():
    """A stack run through twice: layer numbers are those of the calls, and nothing is left out."""
    model, ids = exact("llama"), tokens(1)[0]
    own = model.model.layers[1].forward
    model.model.layers[1].forward = lambda hidden, **kwargs: own(own(hidden, **kwargs), **kwargs)
    assert head_counts(model, ids) == [4, 4, 4, 4]
    found = patched_losses(model, ids, [Patch(NO_SELF, layer) for layer in range(4)])
    whole = patched_losses(model, ids, [None, Patch(NO_SELF)], shortcut=False)
    assert len({round(row[-1].item(), 9) for row in (*found, *whole)}) == 6  # six different things
    close(found[0], by_hand(model, ids, "no self", 0))
    close(found[3], by_hand(model, ids, "no self", 2))
    close(whole[1], by_hand(model, ids, "no self"))


def test_an_impossible_patch_is_refused_in_one_line():
    model, ids = exact("llama"), tokens(1)[0]
    with pytest.raises(InputError, match=r"expects one of the kinds no self, .* got 'selfless'"):
        Patch("selfless")
    for kind, at in ((OWN_MEAN, None), (NO_SELF, AT)):
        with pytest.raises(InputError, match="expects positions for its kinds own mean and later mean only"):
            Patch(kind, positions=at)
    for patch, message in (
        (Patch(NO_SELF, 3), "a layer from 0 to 2; got 3"),
        (Patch(NO_SELF, -1), "a layer from 0 to 2; got -1"),
        (Patch(OWN_MEAN, positions=torch.tensor([12])), "positions from 0 to 11; got"),
        (Patch(OWN_MEAN, positions=torch.tensor([], dtype=torch.long)), "positions from 0 to 11; got"),
    ):
        with pytest.raises(InputError, match=message):
            patched_losses(model, ids, [patch])
    for wrong, batch in ((ids[:1], 8), (ids[None], 8), (ids, 0)):
        with pytest.raises(InputError, match="a window of 2 tokens and a batch of 1 at least"):
            patched_losses(model, wrong, [None], batch=batch)


# ---- row 6 -----------------------------------------------------------------------------------------------------------


SMALL = {"short": 9, "budget": 20, "positions": 3, "share": 0.3, "context": 14, "limit": 3}


def subject(model, ids=None, **changes):
    return Subject(model, None, list(tokens(3, 14) if ids is None else ids), Plan(**(SMALL | changes)))


def test_row_6_is_what_passes_changed_by_hand_say(monkeypatch):
    model, asked = exact("llama"), []

    def recorded(model, ids, patches, **kwargs):
        asked.append((ids, patches))
        return patched_losses(model, ids, patches, **kwargs)

    monkeypatch.setattr(later_use, "patched_losses", recorded)
    finding = later_use.measure(subject(model))
    short, long = asked[:2], asked[2:]
    assert [len(ids) for ids, _ in asked] == [9, 9, 14, 14, 14]

    heads, alone = [], []  # (window) -> {(kind, layer, head): ...}
    for ids, patches in short:
        plain = by_hand(model, ids).sum()
        worth = {}
        for patch in patches:
            if patch is None:
                continue
            at = () if patch.positions is None else tuple(patch.positions.tolist())
            assert len(set(at)) == len(at)
            assert set(at) <= set(range(1, 7))  # an own loss and a later reader with a loss
            losses = by_hand(model, ids, patch.kind, patch.layer, patch.head, patch.positions)
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

    whole = np.array([[by_hand(model, ids, kind).mean() for kind in (None, "no self", "self only")] for ids, _ in long])
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


def near(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-11)


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
    seen = later_use._Seen()
    seen.heads = [np.ones((4, 3, 4))] * 2
    seen.single = list(single(shares))
    seen.whole = [np.array([3, 3 + costs[0], 3 + costs[1]])] * 2
    finding = later_use._finding(seen)
    assert finding.verdict == verdict
    assert f"most in {sum(share == 1 for share in shares)} of 3 layers" in finding.reason
    assert f"{costs[1]:.3f} nats per token, their absence {costs[0]:.3f}" in finding.reason
    if 0 in shares:
        assert "few in layer" in finding.reason


def test_row_6_draws_from_the_saved_audit_alone_and_bears_what_is_missing():
    finding = later_use.measure(subject(tiny("llama"), budget=9))
    clause = later_use.CLAUSES[0]
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
        later_use.measure(subject(tiny("llama"), seed=seed)).variables["later_use_own_mean"] for seed in (0, 0, 1)
    )
    assert one.equals(two)
    assert not one.equals(other)


def test_what_row_6_cannot_measure_is_refused_in_one_line():
    with pytest.raises(InputError, match="row 6 expects windows of at least 4 tokens; got short=3"):
        later_use.measure(subject(tiny("llama"), short=3))
    model = tiny("llama")
    mix = lambda module, args, output: output + 0.1 * output.cumsum(1)  # noqa: E731
    model.model.layers[0].mlp.register_forward_hook(mix)
    with pytest.raises(InputError, match="needs every path between positions to go through attention"):
        later_use.measure(subject(model))
