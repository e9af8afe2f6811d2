"""Row 9, futures: against dense autograd, enumeration of all continuations, and loops over pairs."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from support.loss_oracles import close, exact
from support.reference import dense_attention
from support.spy import use_attention
from support.tiny import CONFIGS, tiny, tokens

from posterity import InputError
from posterity.clauses import futures, pasts
from posterity.clauses.agreement import pair_means
from posterity.clauses.continuations import pulls, read_prefix, sample_continuations, verify_cache
from posterity.clauses.dataset import assemble
from posterity.clauses.drawing import View
from posterity.clauses.futures import FUTURES
from posterity.clauses.ngrams import recurring_ngrams
from posterity.clauses.pasts import PASTS
from posterity.clauses.pull_products import mean_pull_z
from posterity.clauses.subject import Plan, Subject
from posterity.models.interception import interceptions
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
    with use_attention(model, "held", held.attend):
        logits = model(input_ids=ids, use_cache=False).logits[:, len(prefix) - 1 :]
    return logits, held.leaves


def right_pulls(model, prefix, continuations):
    """[layer][stream]: gradients of each log-likelihood at the leaves, and the log-likelihoods."""
    logits, leaves = held_logits(model, prefix, continuations)
    likelihoods = torch.log_softmax(logits, -1).gather(2, continuations[:, :, None])[..., 0].sum(1)
    grads = torch.autograd.grad(likelihoods.sum(), list(itertools.chain(*leaves)))
    return list(zip(grads[::2], grads[1::2], strict=True)), likelihoods.detach()


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
    expected, _ = right_pulls(model, prefix, ids)
    gradients = pulls(model, read_prefix(model, prefix), ids)
    for layer, expected_layer in zip(gradients, expected, strict=True):
        for x, y in zip(layer, expected_layer, strict=True):
            close(x, y)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2", "deepseek_v3"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_mean_pull_of_all_continuations_vanishes(name, length):
    model, prefix = exact(name, vocab_size=5), tokens(1, PREFIX)[0] % 5
    ids = every(5, length)
    weight = right_pulls(model, prefix, ids)[1].exp()
    assert weight.sum().item() == pytest.approx(1, abs=1e-12)
    grads = flat(pulls(model, read_prefix(model, prefix), ids))
    assert (weight @ grads).abs().max() < 1e-10 * grads.abs().max()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_information_is_that_of_every_choice_in_turn(name):
    """E|g|² = sum over tokens of E tr J^T (diag p - p p^T) J, J the Jacobian of the token's logits at the entries."""
    model, prefix = exact(name, vocab_size=4), tokens(1, PREFIX)[0] % 4
    ids = every(4, 2)
    logits, leaves = held_logits(model, prefix, ids)
    weight = right_pulls(model, prefix, ids)[1].exp()
    expected = 0.0
    for step in range(2):
        p = logits[:, step].softmax(-1).detach()
        rows = [
            flat([torch.autograd.grad(logits[:, step, token].sum(), pair, retain_graph=True) for pair in leaves])
            for token in range(4)
        ]
        jacobian = torch.stack(rows, 1)  # continuation, vocabulary, entry
        fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        expected = expected + weight @ torch.einsum("cve,cvw,cwe->ce", jacobian, fisher, jacobian)
    grads = flat(pulls(model, read_prefix(model, prefix), ids))
    close(weight @ grads.square(), expected)
    if name == "llama":  # one token: the first step alone
        single_step = weight.view(4, 4).sum(1) @ flat(pulls(model, read_prefix(model, prefix), every(4, 1))).square()
        p = logits[0, 0].softmax(-1).detach()
        first = [
            torch.autograd.grad(logits[0, 0, token], [x for y in leaves for x in y], retain_graph=True)
            for token in range(4)
        ]
        first = torch.stack([torch.cat([x[0].flatten() for x in row]) for row in first])
        close(single_step, torch.einsum("ve,vw,we->e", first, torch.diag(p) - torch.outer(p, p), first))


def test_continuations_do_not_know_of_each_other():
    model, ids = exact("gemma2"), tokens(5, 4, seed=1)
    prefix = read_prefix(model, tokens(1, PREFIX)[0])
    together = flat(pulls(model, prefix, ids))
    for row, continuation in enumerate(ids):
        close(together[row], flat(pulls(model, prefix, continuation[None]))[0])
    assert prefix.cache.get_seq_length() == PREFIX - 1


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_draws_follow_the_models_own_distribution(name):
    model, prefix = exact(name, vocab_size=4), tokens(1, PREFIX)[0] % 4
    ids, number = every(4, 3), 20000
    chance = right_pulls(model, prefix, ids)[1].exp()
    drawn = sample_continuations(model, read_prefix(model, prefix), number, 3, torch.Generator().manual_seed(5))
    counts = torch.bincount(drawn @ torch.tensor([16, 4, 1]), minlength=64)
    expected = number * chance
    assert expected.max() / expected.min() > 3  # far from uniform
    rare = expected < 10  # in one cell
    counts, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    square, freedom = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    assert freedom > 30
    assert abs(square - freedom) < 4 * math.sqrt(2 * freedom)  # mean and variance of chi-square
    again = sample_continuations(model, read_prefix(model, prefix), number, 3, torch.Generator().manual_seed(5))
    assert torch.equal(drawn, again)


def test_pairs_of_draws_are_uncorrelated_so_that_their_squares_give_the_error_of_z():
    model, prefix = exact("llama", vocab_size=4), tokens(1, PREFIX)[0] % 4
    ids = every(4, 2)
    weight = right_pulls(model, prefix, ids)[1].exp()
    grads = flat(pulls(model, read_prefix(model, prefix), ids))
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
    assert mean_pull_z(products) == pytest.approx(sum(flat_terms) / math.sqrt(sum(x * x for x in flat_terms)))
    pairs, norms = pair_means(products)
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
    ngrams = recurring_ngrams(documents, length, future, 3, 50, torch.Generator().manual_seed(0))
    assert len(ngrams) == 3
    most = max(len(x) for x in places.values())
    assert most > 4
    assert len(places[tuple(ngrams[0][0].tolist())]) == most
    used = set()
    for ngram, continuations in ngrams:
        apart = {}
        for after, (number, start) in places[tuple(ngram.tolist())].items():
            last = list(apart.values())[-1] if apart else (-1, 0)
            if number != last[0] or start - last[1] >= length + future:
                apart[after] = number, start
        assert sorted(map(tuple, continuations.tolist())) == sorted(apart)
        positions = {(number, start + offset) for number, start in apart.values() for offset in range(length)}
        assert not used & positions
        used |= positions
    limited = recurring_ngrams(documents, length, future, 3, 2, torch.Generator().manual_seed(0))
    assert all(len(continuations) == 2 for _, continuations in limited)


def test_a_text_that_repeats_itself_has_no_ngram_with_several_futures():
    generator = torch.Generator().manual_seed(0)
    assert recurring_ngrams([torch.arange(8).repeat(20)], 4, 3, 3, 5, generator) == []
    assert recurring_ngrams([torch.arange(50)], 4, 3, 3, 5, generator) == []
    assert recurring_ngrams([torch.arange(3)], 4, 3, 3, 5, generator) == []


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_row_9_is_what_plain_autograd_gives_for_the_same_draws(name, monkeypatch):
    audit_subject, drawn = subject(name, draws=3), []

    def record_sample(model, prefix, *options):
        drawn.append((prefix.ids, sample_continuations(model, prefix, *options)))
        return drawn[-1][1]

    monkeypatch.setattr(futures, "sample_continuations", record_sample)
    finding = futures.measure_futures(audit_subject)
    assert len(drawn) == 4
    norms, pairs, lags, real = [], [], [], []
    text = audit_subject.documents[0]
    for ids, continuations in drawn:
        start = next(x for x in range(0, 150, PREFIX + 4) if torch.equal(text[x : x + PREFIX], ids))
        future = text[start + PREFIX : start + PREFIX + 4]
        grads, _ = right_pulls(audit_subject.model, ids, torch.cat((continuations, future[None])))
        squares = torch.stack([torch.stack([x.square().sum(-1) for x in pair]) for pair in grads])
        norms.append(squares[:, :, :3])  # layer, stream, draw, head, position
        lags.append(squares[:, :, :3].mean((2, 3)).flip(-1))
        real.append(squares[:, :, 3].sum((-1, -2)))
        pairs.append([[[(a * b).sum() for a, b in itertools.combinations(x[:3], 2)] for x in pair] for pair in grads])
    norms, pairs, real = torch.stack(norms), torch.tensor(pairs), torch.stack(real)
    variables = finding.variables
    close(variables["information"], torch.stack(lags).mean(0))
    assert variables["information"].lag.values.tolist() == list(range(2, PREFIX + 1))
    close(variables["information_by_layer"], norms.mean((0, 3, 4, 5)))
    close(variables["information_by_head"], norms.mean((0, 3, 5)).transpose(1, 2))
    squared = norms.sum((4, 5)).mean(3)  # prefix, layer, stream
    close(variables["consensus"].sel(future="drawn"), pairs.mean(-1).sum(0) / squared.sum(0))
    close(variables["ratio"], real.sum(0) / squared.sum(0))
    close(variables["z"], pairs.sum((0, 3)) / pairs.square().sum((0, 3)).sqrt())
    figures = {figure.name: figure for figure in finding.figures}
    assert len(figures) == len(finding.figures)
    for index, stream in enumerate(("key", "value")):
        by_prefix = norms[:, :, index].mean((1, 2, 3, 4))
        information = figures[f"information of a {stream} about its future"]
        assert information.value == pytest.approx(by_prefix.mean().item(), rel=1e-10)
        assert information.error == pytest.approx(by_prefix.std().item() / 2, rel=1e-10)
        summed = pairs[:, :, index].sum(1)
        z = figures[f"z of the mean pull on {stream}s"].value
        assert z == pytest.approx((summed.sum() / summed.square().sum().sqrt()).item(), rel=1e-10)
        consensus = figures[f"consensus of drawn futures on {stream}s"].value
        assert consensus == pytest.approx((summed.mean(1).sum() / squared[:, :, index].sum()).item(), rel=1e-10)
        real_share = figures[f"real over drawn squared pull on {stream}s"].value
        assert real_share == pytest.approx((real[:, :, index].sum() / squared[:, :, index].sum()).item(), rel=1e-10)
    assert np.isnan(figures["consensus of real futures on keys"].value)
    assert "not known" in finding.reason


def test_consensus_of_real_futures_is_that_of_a_loop_over_their_pairs(monkeypatch):
    audit_subject = subject(count=120, vocabulary=4, prefix=3, draws=5)
    ngrams = []

    def record_ngrams(*call):
        ngrams.extend(recurring_ngrams(*call))
        return ngrams

    monkeypatch.setattr(futures, "recurring_ngrams", record_ngrams)
    finding = futures.measure_futures(audit_subject)
    assert len(ngrams) == 4
    pairs, norms = [], []
    for ngram, continuations in ngrams:
        assert len(ngram) == 3
        grads, _ = right_pulls(audit_subject.model, ngram, continuations)
        norms.append([[x.square().sum().item() / len(x) for x in pair] for pair in grads])
        pairs.append(
            [[np.mean([(a * b).sum().item() for a, b in itertools.combinations(x, 2)]) for x in pair] for pair in grads]
        )
    pairs, norms = np.array(pairs), np.array(norms)
    close(finding.variables["consensus"].sel(future="real"), pairs.sum(0) / norms.sum(0))
    for index, stream in enumerate(("key", "value")):
        figure = next(x for x in finding.figures if x.name == f"consensus of real futures on {stream}s")
        part, norm = pairs[:, :, index].sum(1), norms[:, :, index].sum(1)
        share = part.sum() / norm.sum()
        assert figure.value == pytest.approx(share, rel=1e-10)
        error = math.sqrt(4 / 3 * ((part - share * norm) ** 2).sum()) / norm.sum()
        assert figure.error == pytest.approx(error, rel=1e-8)


def test_a_verdict_on_futures_needs_information_the_law_and_disagreement():
    far, error, nothing = np.array([4.0, 3.0]), np.array([0.5, 0.5]), np.full(2, np.nan)
    layers = np.array([[0.1, 0.2], [0.3, 0.2]]), np.full((2, 2), 0.05)
    common = np.array([0.2, 0.2]), np.array([0.05, 0.05])
    z = np.array([1.0, -1.5])

    def judged(information=far, z=z, layers=layers, ngrams=4):
        return futures._judge((information, error), z, common, layers, 6, ngrams)

    assert judged()[0] == HOLDS
    assert judged(ngrams=0)[0] == HOLDS
    assert "not known" in judged(ngrams=0)[1]
    assert judged(z=np.array([1.0, 4.5])) == (
        MIXED, "the mean gradient of continuations that the model draws should vanish, but z = 4.5: nothing is said"
    )  # fmt: skip
    assert judged(z=nothing)[0] == MIXED
    assert judged(information=np.array([0.9, 3.0]))[0] == FAILS
    assert judged(layers=(1 - layers[0], layers[1]))[0] == FAILS
    verdict, reason = judged(layers=(np.array([[0.1, 0.9], [0.3, 0.2]]), layers[1]))
    assert verdict == MIXED
    assert "above one half in layer 0" in reason


def test_the_model_is_left_as_it_was():
    audit_subject = subject()
    before = [p.requires_grad for p in audit_subject.model.parameters()]
    for clause in (FUTURES, PASTS):
        clause.find(audit_subject)
        assert [p.requires_grad for p in audit_subject.model.parameters()] == before
        assert all(p.grad is None for p in audit_subject.model.parameters())
        assert audit_subject.model.config._attn_implementation == "eager"
        assert not any(interceptions.values())


@pytest.mark.parametrize("vocabulary", [60, 4])
@pytest.mark.parametrize("prefixes", [1, 4])
def test_every_finding_is_saved_and_drawn_from_the_file(tmp_path, vocabulary, prefixes):
    audit_subject = subject(vocabulary=vocabulary, prefixes=prefixes, prefix=4)
    findings = {clause.number: clause.find(audit_subject) for clause in (FUTURES, PASTS)}
    for finding in findings.values():
        for name, variable in finding.variables.items():
            assert name.startswith(("futures_", "pasts_"))
            assert variable.attrs["units"]
            assert variable.attrs["long_name"]
    audit = load(save(assemble({"m": findings}, (FUTURES, PASTS), {}), tmp_path / "audit.nc"))
    for clause in (FUTURES, PASTS):
        charts = clause.draw(View(audit, "m"))
        assert charts
        for chart in charts:
            assert chart.traces
            json.dumps([trace.to_plotly_json() for trace in chart.traces], allow_nan=False)
        assert (
            clause.draw(View(audit.drop_vars([x for x in audit if str(x).startswith(("futures", "pasts"))]), "m")) == []
        )


def test_what_cannot_be_measured_is_refused_in_one_line():
    with pytest.raises(InputError, match="segments of at least 2 tokens; got a future of 1"):
        pasts.measure_pasts(subject(future=1))
    with pytest.raises(InputError, match="two windows of 11 tokens"):
        pasts.measure_pasts(subject(count=12))
    for clause in (FUTURES, PASTS):
        with pytest.raises(InputError, match="reads at most 64 tokens; got a context of 70"):
            clause.measure(subject("gpt2", prefix=60, future=10))
    model = tiny("llama")
    own = model.forward

    def forward(*args, past_key_values=None, **kwargs):
        output = own(*args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None:
            output.logits = output.logits + 0.01
        return output

    prefix, future = tokens(1, PREFIX)[0], tokens(1, 4)[0]
    verify_cache(model, read_prefix(model, prefix), future)
    model.forward = forward
    with pytest.raises(
        InputError, match=r"LlamaForCausalLM: with a cache of keys and values its logits move by 1\.0e-02"
    ):
        verify_cache(model, read_prefix(model, prefix), future)


def test_row_9_refuses_models_with_other_paths_between_positions(monkeypatch):
    monkeypatch.setattr("posterity.models.probe.find_other_paths", lambda *_: ("Convolution (layers.0)",))
    with pytest.raises(InputError, match=r"the pull of futures .* but Convolution \(layers.0\) carries"):
        futures.measure_futures(subject())
