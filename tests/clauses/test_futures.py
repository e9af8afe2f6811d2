"""Rows 9 and 10: futures and pasts against dense autograd, enumeration of all continuations, and loops over pairs."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from support.loss_oracles import close, exact
from support.reference import dense_attention
from support.spy import attending, spied
from support.tiny import CONFIGS, tiny, tokens

from posterity import InputError
from posterity.clauses import futures, pasts
from posterity.clauses.clause import Plan, Subject
from posterity.clauses.continuations import pulls, read, recurring, sample, verify
from posterity.clauses.dataset import assemble
from posterity.clauses.drawing import View
from posterity.models.language_model import frozen
from posterity.models.watch import watches
from posterity.results.audit_schema import FAILS, HOLDS, MIXED
from posterity.results.files import load, save

PREFIX = 7


class Held:
    """An attention function for one uncached pass, in which the keys and values of the first positions are leaves."""

    def __init__(self, length):
        self.length, self.leaves = length, []

    def attend(self, module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        leaves = [x[:, :, : self.length].detach().clone().requires_grad_() for x in (key, value)]
        self.leaves.append(leaves)
        key, value = (torch.cat((a, x[:, :, self.length :]), 2) for a, x in zip(leaves, (key, value), strict=True))
        allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output, _, _ = dense_attention(query, key, value, scaling, allowed, softcap, s_aux)
        return output.transpose(1, 2).contiguous(), None


def held_logits(model, prefix, continuations):
    """Logits of every continuation token in one uncached pass, and the leaves of every layer."""
    ids = torch.cat((prefix.expand(len(continuations), -1), continuations[:, :-1]), 1)
    held = Held(len(prefix) - 1)
    with attending(model, "held", held.attend):
        logits = model(input_ids=ids, use_cache=False).logits[:, len(prefix) - 1 :]
    return logits, held.leaves


def right_pulls(model, prefix, continuations):
    """[layer][stream]: gradients of each log-likelihood at the leaves, and the log-likelihoods."""
    logits, leaves = held_logits(model, prefix, continuations)
    told = torch.log_softmax(logits, -1).gather(2, continuations[:, :, None])[..., 0].sum(1)
    grads = torch.autograd.grad(told.sum(), list(itertools.chain(*leaves)))
    return list(zip(grads[::2], grads[1::2], strict=True)), told.detach()


def every(vocabulary, length):
    return torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))


def flat(layers):
    """(continuation, everything)."""
    return torch.cat([x.flatten(1) for pair in layers for x in pair], 1)


def subject(name="llama", count=150, vocabulary=60, **plan):
    ids = torch.randint(1, vocabulary, (count,), generator=torch.Generator().manual_seed(3))
    plan = {"prefixes": 4, "prefix": PREFIX, "future": 4, "draws": 3, "context": 12} | plan
    return Subject(exact(name), None, [ids], Plan(**plan))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("small_blocks")
def test_pulls_are_those_of_autograd_through_one_uncached_pass(name):
    model, ids = exact(name), tokens(4, 6, seed=2)
    prefix = tokens(1, PREFIX)[0]
    right, _ = right_pulls(model, prefix, ids)
    mine = pulls(model, read(model, prefix), ids)
    for one, other in zip(mine, right, strict=True):
        for x, y in zip(one, other, strict=True):
            close(x, y)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2", "deepseek_v3"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_mean_pull_of_all_continuations_vanishes(name, length):
    model, prefix = exact(name, vocab_size=5), tokens(1, PREFIX)[0] % 5
    ids = every(5, length)
    weight = right_pulls(model, prefix, ids)[1].exp()
    assert weight.sum().item() == pytest.approx(1, abs=1e-12)
    grads = flat(pulls(model, read(model, prefix), ids))
    assert (weight @ grads).abs().max() < 1e-10 * grads.abs().max()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_information_is_that_of_every_choice_in_turn(name):
    """E|g|² = sum over tokens of E tr J^T (diag p - p p^T) J, J the Jacobian of the token's logits at the entries."""
    model, prefix = exact(name, vocab_size=4), tokens(1, PREFIX)[0] % 4
    ids = every(4, 2)
    logits, leaves = held_logits(model, prefix, ids)
    weight = right_pulls(model, prefix, ids)[1].exp()
    right = 0.0
    for step in range(2):
        p = logits[:, step].softmax(-1).detach()
        rows = [
            flat([torch.autograd.grad(logits[:, step, at].sum(), pair, retain_graph=True) for pair in leaves])
            for at in range(4)
        ]
        jacobian = torch.stack(rows, 1)  # continuation, vocabulary, entry
        fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        right = right + weight @ torch.einsum("cve,cvw,cwe->ce", jacobian, fisher, jacobian)
    grads = flat(pulls(model, read(model, prefix), ids))
    close(weight @ grads.square(), right)
    if name == "llama":  # one token: the first step alone
        one = weight.view(4, 4).sum(1) @ flat(pulls(model, read(model, prefix), every(4, 1))).square()
        p = logits[0, 0].softmax(-1).detach()
        first = [
            torch.autograd.grad(logits[0, 0, at], [x for y in leaves for x in y], retain_graph=True) for at in range(4)
        ]
        first = torch.stack([torch.cat([x[0].flatten() for x in row]) for row in first])
        close(one, torch.einsum("ve,vw,we->e", first, torch.diag(p) - torch.outer(p, p), first))


def test_continuations_do_not_know_of_each_other():
    model, ids = exact("gemma2"), tokens(5, 4, seed=1)
    prefix = read(model, tokens(1, PREFIX)[0])
    together = flat(pulls(model, prefix, ids))
    for row, one in enumerate(ids):
        close(together[row], flat(pulls(model, prefix, one[None]))[0])
    assert prefix.cache.get_seq_length() == PREFIX - 1


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_draws_follow_the_models_own_distribution(name):
    model, prefix = exact(name, vocab_size=4), tokens(1, PREFIX)[0] % 4
    ids, number = every(4, 3), 20000
    chance = right_pulls(model, prefix, ids)[1].exp()
    drawn = sample(model, read(model, prefix), number, 3, torch.Generator().manual_seed(5))
    counts = torch.bincount(drawn @ torch.tensor([16, 4, 1]), minlength=64)
    expected = number * chance
    assert expected.max() / expected.min() > 3  # far from uniform
    rare = expected < 10  # in one cell
    counts, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    square, freedom = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    assert freedom > 30
    assert abs(square - freedom) < 4 * math.sqrt(2 * freedom)  # mean and variance of chi-square
    again = sample(model, read(model, prefix), number, 3, torch.Generator().manual_seed(5))
    assert torch.equal(drawn, again)


def test_pairs_of_draws_are_uncorrelated_so_that_their_squares_give_the_error_of_z():
    model, prefix = exact("llama", vocab_size=4), tokens(1, PREFIX)[0] % 4
    ids = every(4, 2)
    weight = right_pulls(model, prefix, ids)[1].exp()
    grads = flat(pulls(model, read(model, prefix), ids))
    product = grads @ grads.T
    total = product[:, :, None] + product[:, None, :] + product[None, :, :]  # T of three draws
    chances = weight[:, None, None] * weight[:, None] * weight
    mean, variance = (chances * total).sum(), (chances * total**2).sum()
    assert abs(mean) < 1e-10 * variance.sqrt()
    squares = (product**2)[:, :, None] + (product**2)[:, None, :] + (product**2)[None, :, :]
    assert (chances * squares).sum().item() == pytest.approx(variance.item(), rel=1e-10)


def test_z_and_consensus_are_those_of_a_loop_over_pairs():
    pulled = torch.randn(3, 4, 6, dtype=torch.float64)
    products = (pulled @ pulled.mT).numpy()
    terms = [[a @ b for a, b in itertools.combinations(prefix, 2)] for prefix in pulled]
    flat_terms = [float(x) for row in terms for x in row]
    assert futures.score(products) == pytest.approx(sum(flat_terms) / math.sqrt(sum(x * x for x in flat_terms)))
    pairs, norms = futures.unbiased(products)
    np.testing.assert_allclose(pairs, [np.mean(row) for row in terms])
    np.testing.assert_allclose(norms, [np.mean([a @ a for a in prefix]) for prefix in pulled])


def test_recurring_ngrams_are_those_of_a_search_by_hand():
    text = torch.randint(3, (400,), generator=torch.Generator().manual_seed(1))
    documents, length, future = [text[:150], text[150:]], 4, 3
    places = {}  # n-gram -> future -> its first place
    for number, document in enumerate(documents):
        for start in range(len(document) - length - future + 1):
            ngram, after = document[start : start + length], document[start + length : start + length + future]
            places.setdefault(tuple(ngram.tolist()), {}).setdefault(tuple(after.tolist()), (number, start))
    found = recurring(documents, length, future, 3, 50, torch.Generator().manual_seed(0))
    assert len(found) == 3
    most = max(len(x) for x in places.values())
    assert most > 4
    assert len(places[tuple(found[0][0].tolist())]) == most
    used = set()
    for ngram, continuations in found:
        kept = {}
        for after, (number, start) in places[tuple(ngram.tolist())].items():
            last = list(kept.values())[-1] if kept else (-1, 0)
            if number != last[0] or start - last[1] >= length + future:
                kept[after] = number, start
        assert sorted(map(tuple, continuations.tolist())) == sorted(kept)
        tokens_of = {(number, start + at) for number, start in kept.values() for at in range(length)}
        assert not used & tokens_of
        used |= tokens_of
    few = recurring(documents, length, future, 3, 2, torch.Generator().manual_seed(0))
    assert all(len(continuations) == 2 for _, continuations in few)


def test_a_text_that_repeats_itself_has_no_ngram_with_several_futures():
    generator = torch.Generator().manual_seed(0)
    assert recurring([torch.arange(8).repeat(20)], 4, 3, 3, 5, generator) == []
    assert recurring([torch.arange(50)], 4, 3, 3, 5, generator) == []
    assert recurring([torch.arange(3)], 4, 3, 3, 5, generator) == []


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_row_9_is_what_plain_autograd_gives_for_the_same_draws(name, monkeypatch):
    one, drawn = subject(name, draws=3), []

    def noting(model, prefix, *rest):
        drawn.append((prefix.ids, sample(model, prefix, *rest)))
        return drawn[-1][1]

    monkeypatch.setattr(futures, "sample", noting)
    found = futures.on_average_over_futures(one)
    assert len(drawn) == 4
    norms, pairs, lags, real = [], [], [], []
    for ids, continuations in drawn:
        start = next(x for x in range(0, 150, PREFIX + 4) if torch.equal(one.documents[0][x : x + PREFIX], ids))
        future = one.documents[0][start + PREFIX : start + PREFIX + 4]
        grads, _ = right_pulls(one.model, ids, torch.cat((continuations, future[None])))
        squares = torch.stack([torch.stack([x.square().sum(-1) for x in pair]) for pair in grads])
        norms.append(squares[:, :, :3])  # layer, stream, draw, head, position
        lags.append(squares[:, :, :3].mean((2, 3)).flip(-1))
        real.append(squares[:, :, 3].sum((-1, -2)))
        pairs.append([[[(a * b).sum() for a, b in itertools.combinations(x[:3], 2)] for x in pair] for pair in grads])
    norms, pairs, real = torch.stack(norms), torch.tensor(pairs), torch.stack(real)
    variables = found.variables
    close(variables["futures_information"], torch.stack(lags).mean(0))
    assert variables["futures_information"].lag.values.tolist() == list(range(2, PREFIX + 1))
    close(variables["futures_information_by_layer"], norms.mean((0, 3, 4, 5)))
    close(variables["futures_information_by_head"], norms.mean((0, 3, 5)).transpose(1, 2))
    squared = norms.sum((4, 5)).mean(3)  # prefix, layer, stream
    close(variables["futures_consensus"].sel(future="drawn"), pairs.mean(-1).sum(0) / squared.sum(0))
    close(variables["futures_ratio"], real.sum(0) / squared.sum(0))
    close(variables["futures_z"], pairs.sum((0, 3)) / pairs.square().sum((0, 3)).sqrt())
    figures = {figure.name: figure for figure in found.figures}
    assert len(figures) == len(found.figures)
    for at, stream in enumerate(("key", "value")):
        each = norms[:, :, at].mean((1, 2, 3, 4))
        information = figures[f"information of a {stream} about its future"]
        assert information.value == pytest.approx(each.mean().item(), rel=1e-10)
        assert information.error == pytest.approx(each.std().item() / 2, rel=1e-10)
        summed = pairs[:, :, at].sum(1)
        z = figures[f"z of the mean pull on {stream}s"].value
        assert z == pytest.approx((summed.sum() / summed.square().sum().sqrt()).item(), rel=1e-10)
        consensus = figures[f"consensus of drawn futures on {stream}s"].value
        assert consensus == pytest.approx((summed.mean(1).sum() / squared[:, :, at].sum()).item(), rel=1e-10)
        real_share = figures[f"real over drawn squared pull on {stream}s"].value
        assert real_share == pytest.approx((real[:, :, at].sum() / squared[:, :, at].sum()).item(), rel=1e-10)
    assert np.isnan(figures["consensus of real futures on keys"].value)
    assert "not known" in found.reason


def test_consensus_of_real_futures_is_that_of_a_loop_over_their_pairs(monkeypatch):
    one = subject(count=120, vocabulary=4, prefix=3, draws=5)
    met = []

    def noting(*given):
        met.extend(recurring(*given))
        return met

    monkeypatch.setattr(futures, "recurring", noting)
    found = futures.on_average_over_futures(one)
    assert len(met) == 4
    pairs, norms = [], []
    for ngram, continuations in met:
        assert len(ngram) == 3
        grads, _ = right_pulls(one.model, ngram, continuations)
        norms.append([[x.square().sum().item() / len(x) for x in pair] for pair in grads])
        pairs.append(
            [[np.mean([(a * b).sum().item() for a, b in itertools.combinations(x, 2)]) for x in pair] for pair in grads]
        )
    pairs, norms = np.array(pairs), np.array(norms)
    close(found.variables["futures_consensus"].sel(future="real"), pairs.sum(0) / norms.sum(0))
    for at, stream in enumerate(("key", "value")):
        figure = next(x for x in found.figures if x.name == f"consensus of real futures on {stream}s")
        part, whole = pairs[:, :, at].sum(1), norms[:, :, at].sum(1)
        share = part.sum() / whole.sum()
        assert figure.value == pytest.approx(share, rel=1e-10)
        error = math.sqrt(4 / 3 * ((part - share * whole) ** 2).sum()) / whole.sum()
        assert figure.error == pytest.approx(error, rel=1e-8)


def test_a_verdict_on_futures_needs_information_the_law_and_disagreement():
    far, error, nothing = np.array([4.0, 3.0]), np.array([0.5, 0.5]), np.full(2, np.nan)
    layers = np.array([[0.1, 0.2], [0.3, 0.2]]), np.full((2, 2), 0.05)
    common = np.array([0.2, 0.2]), np.array([0.05, 0.05])
    z = np.array([1.0, -1.5])

    def judged(information=far, z=z, layers=layers, ngrams=4):
        return futures._judged(information, error, z, common, layers, ngrams)

    assert judged()[0] == HOLDS
    assert judged(ngrams=0)[0] == HOLDS
    assert "not known" in judged(ngrams=0)[1]
    assert judged(z=np.array([1.0, 4.5])) == (
        MIXED, "the mean pull of the model's own futures should vanish, but z = 4.5: nothing is said"
    )  # fmt: skip
    assert judged(z=nothing)[0] == MIXED
    assert judged(information=np.array([0.9, 3.0]))[0] == FAILS
    assert judged(layers=(1 - layers[0], layers[1]))[0] == FAILS
    verdict, reason = judged(layers=(np.array([[0.1, 0.9], [0.3, 0.2]]), layers[1]))
    assert verdict == MIXED
    assert "above one half in layer 0" in reason


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.usefixtures("small_blocks")
def test_query_gradients_are_those_of_dense_autograd(name):
    model, ids = exact(name), tokens(3, 12)
    with frozen(model):
        mine = pasts.query_gradients(model, ids, PREFIX)
    with spied(model) as spy:
        logits = model(input_ids=ids, use_cache=False).logits
    told = torch.log_softmax(logits, -1)
    loss = -sum(told[:, at, :].gather(1, ids[:, at + 1 : at + 2]).sum() for at in range(PREFIX, 11))
    loss.backward()
    assert len(mine) == len(spy.calls)
    for (grad, query), call in zip(mine, spy.calls, strict=True):
        close(grad, call[0].grad[:, :, PREFIX:11])
        close(query, call[0].detach()[:, :, PREFIX:11])
        assert (call[0].grad[:, :, 11] == 0).all()


def by_hand(segments):
    """Agreement, error, chance and its error of segments [segment][past] -> vector, pair by pair."""

    def agreement(some):
        norms = [np.mean([g @ g for g in one]) for one in some]
        pairs = [np.mean([a @ b for a, b in itertools.permutations(one, 2)]) for one in some]
        others = [a @ b for x, y in itertools.permutations(some, 2) for a in x for b in y]
        return norms, pairs, np.mean(others) / np.mean(norms) if len(some) > 1 else math.nan

    norms, pairs, chance = agreement(segments)
    share, n = np.sum(pairs) / np.sum(norms), len(segments)
    residuals = np.array(pairs) - share * np.array(norms)
    error = math.sqrt(n / (n - 1) * (residuals**2).sum()) / np.sum(norms)
    without = np.array([agreement(segments[:at] + segments[at + 1 :])[2] for at in range(n)])
    return share, error, chance, math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())


def test_agreement_and_chance_are_those_of_loops_over_pairs():
    found, layers = pasts._Segments(), []
    for _ in range(4):
        layers.append([torch.randn(3, heads, 5, 6) + torch.randn(heads, 5, 6) for heads in (2, 3)])
        found.add(layers[-1])
    mine = found.agreement()

    def vectors(pick):
        return [[np.concatenate([pick(x, past) for x in segment], None) for past in range(3)] for segment in layers]

    whole = by_hand(vectors(lambda x, past: x[past].double().numpy().ravel()))
    close(np.array(mine.over(1, 2, 3)), whole)
    head = by_hand([[segment[1][past, 2].double().numpy().ravel() for past in range(3)] for segment in layers])
    close(np.array([x[1, 2] for x in mine.over(3)]), head)
    assert np.isnan([x[0, 2] for x in mine.over(3)]).all()  # the first layer has two heads
    offset = by_hand(vectors(lambda x, past: x[past, :, 4].double().numpy().ravel()))
    close(np.array([x[4] for x in mine.over(1, 2)]), offset)


def test_row_10_puts_every_segment_behind_its_own_past_and_those_of_others(monkeypatch):
    one, batches = subject(count=140, prefixes=3, draws=4, future=5), []

    def noting(model, ids, past):
        batches.append(ids)
        return query_gradients(model, ids, past)

    query_gradients = pasts.query_gradients
    monkeypatch.setattr(pasts, "query_gradients", noting)
    found = pasts.on_average_over_pasts(one)
    assert len(batches) == 3
    windows = one.documents[0][: 140 // 12 * 12].view(-1, 12)
    for ids in batches:
        assert any(torch.equal(ids[0], window) for window in windows)
        assert (ids[:, PREFIX:] == ids[0, PREFIX:]).all()
        behind = {tuple(row[:PREFIX].tolist()) for row in ids}
        assert len(behind) == 4
        assert behind <= {tuple(window[:PREFIX].tolist()) for window in windows}
    with frozen(one.model):
        grads = [query_gradients(one.model, ids, PREFIX) for ids in batches]
    rows = [[np.concatenate([g[past].numpy().ravel() for g, _ in one]) for past in range(4)] for one in grads]
    value, error, chance, _ = by_hand(rows)
    assert (found.figures[0].value, found.figures[0].error, found.figures[0].baseline) == pytest.approx(
        (value, error, chance), rel=1e-9
    )
    cosines = [
        torch.nn.functional.cosine_similarity(q[a], q[b], dim=-1).mean().item()
        for one in grads for _, q in one for a, b in itertools.combinations(range(4), 2)
    ]  # fmt: skip
    assert found.figures[1].value == pytest.approx(np.mean(cosines), rel=1e-9)
    layer = by_hand([[one[1][0][past].numpy().ravel() for past in range(4)] for one in grads])
    assert float(found.variables["pasts_by_layer"][1]) == pytest.approx(layer[0], rel=1e-9)
    assert float(found.variables["pasts_chance_by_layer"][1]) == pytest.approx(layer[2], rel=1e-9)
    assert found.variables["pasts_by_head_and_offset"].shape == (3, 4, 4)


def test_pasts_that_are_the_same_agree_fully():
    found = pasts._Segments()
    for _ in range(3):
        found.add([torch.randn(1, 2, 3, 4).expand(5, -1, -1, -1)])
    value, error, _, _ = found.agreement().over(1, 2, 3)
    assert value == pytest.approx(1, abs=1e-12)
    assert error == pytest.approx(0, abs=1e-12)


def test_a_verdict_on_pasts_needs_disagreement_and_more_than_chance():
    few = np.full(3, 0.01)
    low, half, high = np.full(3, 0.01), np.full(3, 0.3), np.array([0.3, 0.3, 0.9])
    assert pasts._judged(half, few, low, few)[0] == HOLDS
    assert pasts._judged(half, few, np.full(3, np.nan), np.full(3, np.nan))[0] == HOLDS
    assert pasts._judged(low, few, half, few) == (
        FAILS, "0 of 3 layers hold it; no more than chance in layers 0, 1 and 2"
    )  # fmt: skip
    assert pasts._judged(high, few, low, few) == (
        MIXED, "2 of 3 layers hold it; more than half is common in layer 2"
    )  # fmt: skip


def test_windows_are_spread_over_the_text():
    for seed in range(20):
        chosen = pasts.spread(103, 4, torch.Generator().manual_seed(seed))
        assert [at * 4 // 104 for at in chosen] == sorted(at * 4 // 104 for at in chosen)
        assert all(low <= at < high for at, low, high in zip(chosen, (0, 25, 51, 77), (25, 51, 77, 103), strict=True))
    assert pasts.spread(3, 4, torch.Generator()) == [0, 1, 2]


def test_the_model_is_left_as_it_was():
    one = subject()
    before = [p.requires_grad for p in one.model.parameters()]
    for clause in futures.CLAUSES:
        clause.measure(one)
        assert [p.requires_grad for p in one.model.parameters()] == before
        assert all(p.grad is None for p in one.model.parameters())
        assert one.model.config._attn_implementation == "eager"
        assert not watches


@pytest.mark.parametrize("vocabulary", [60, 4])
@pytest.mark.parametrize("prefixes", [1, 4])
def test_every_finding_is_saved_and_drawn_from_the_file(tmp_path, vocabulary, prefixes):
    one = subject(vocabulary=vocabulary, prefixes=prefixes, prefix=4)
    found = {clause.number: clause.measure(one) for clause in futures.CLAUSES}
    for finding in found.values():
        for name, variable in finding.variables.items():
            assert name.startswith(("futures_", "pasts_"))
            assert variable.attrs["units"]
            assert variable.attrs["long_name"]
    audit = load(save(assemble({"m": found}, futures.CLAUSES, {}), tmp_path / "audit.nc"))
    for clause in futures.CLAUSES:
        charts = clause.draw(View(audit, "m"))
        assert charts
        for chart in charts:
            assert chart.traces
            json.dumps([chart.traces, chart.layout], allow_nan=False)
        assert (
            clause.draw(View(audit.drop_vars([x for x in audit if str(x).startswith(("futures", "pasts"))]), "m")) == []
        )


def test_what_cannot_be_measured_is_refused_in_one_line():
    with pytest.raises(InputError, match="segments of at least 2 tokens; got a future of 1"):
        pasts.on_average_over_pasts(subject(future=1))
    with pytest.raises(InputError, match="two windows of 11 tokens"):
        pasts.on_average_over_pasts(subject(count=12))
    for clause in futures.CLAUSES:
        with pytest.raises(InputError, match="reads at most 64 tokens; got a context of 70"):
            clause.measure(subject(prefix=60, future=10))
    model = tiny("llama")
    own = model.forward

    def forward(*args, past_key_values=None, **kwargs):
        output = own(*args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None:
            output.logits = output.logits + 0.01
        return output

    prefix, future = tokens(1, PREFIX)[0], tokens(1, 4)[0]
    verify(model, read(model, prefix), future)
    model.forward = forward
    with pytest.raises(
        InputError, match=r"LlamaForCausalLM: with a cache of keys and values its logits move by 1\.0e-02"
    ):
        verify(model, read(model, prefix), future)


def test_row_9_refuses_models_with_other_paths_between_positions(monkeypatch):
    monkeypatch.setattr("posterity.models.probe.find_leaks", lambda *given: ("Convolution (layers.0)",))
    with pytest.raises(InputError, match=r"the pull of futures .* but Convolution \(layers.0\) carries"):
        futures.on_average_over_futures(subject())
