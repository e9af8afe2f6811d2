"""Row 10, pasts: query gradients against dense autograd, agreement and chance against loops over pairs."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from support.loss_oracles import close, exact
from support.spy import spy_on
from support.tiny import tokens

from posterity.clauses import pasts
from posterity.clauses.agreement import SegmentVectors
from posterity.clauses.subject import Plan, Subject, spread_indices
from posterity.models.language_model import freeze_parameters
from posterity.results.audit_schema import FAILS, HOLDS, MIXED

PREFIX = 7


def subject(count, **plan):
    ids = torch.randint(1, 60, (count,), generator=torch.Generator().manual_seed(3))
    plan = {"prefixes": 4, "prefix": PREFIX, "future": 4, "draws": 3, "context": 12} | plan
    return Subject(exact("llama"), None, [ids], Plan(**plan))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.usefixtures("small_blocks")
def test_query_gradients_are_those_of_dense_autograd(name):
    model, ids = exact(name), tokens(3, 12)
    with freeze_parameters(model):
        gradients = pasts.query_gradients(model, ids, PREFIX)
    with spy_on(model) as spy:
        logits = model(input_ids=ids, use_cache=False).logits
    likelihood = torch.log_softmax(logits, -1)
    loss = -sum(
        likelihood[:, position, :].gather(1, ids[:, position + 1 : position + 2]).sum()
        for position in range(PREFIX, 11)
    )
    loss.backward()
    assert len(gradients) == len(spy.calls)
    for (grad, query), call in zip(gradients, spy.calls, strict=True):
        close(grad, call[0].grad[:, :, PREFIX:11])
        close(query, call[0].detach()[:, :, PREFIX:11])
        assert (call[0].grad[:, :, 11] == 0).all()


def by_hand(segments):
    """Agreement, error, chance and its error of segments [segment][past] -> vector, pair by pair."""

    def agreement(subset):
        norms = [np.mean([g @ g for g in segment]) for segment in subset]
        pairs = [np.mean([a @ b for a, b in itertools.permutations(segment, 2)]) for segment in subset]
        others = [a @ b for x, y in itertools.permutations(subset, 2) for a in x for b in y]
        return norms, pairs, np.mean(others) / np.mean(norms) if len(subset) > 1 else math.nan

    norms, pairs, chance = agreement(segments)
    share, n = np.sum(pairs) / np.sum(norms), len(segments)
    residuals = np.array(pairs) - share * np.array(norms)
    error = math.sqrt(n / (n - 1) * (residuals**2).sum()) / np.sum(norms)
    without = np.array([agreement(segments[:index] + segments[index + 1 :])[2] for index in range(n)])
    return share, error, chance, math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())


def test_agreement_and_chance_are_those_of_loops_over_pairs():
    segments, layers = SegmentVectors(), []
    for _ in range(4):
        layers.append([torch.randn(3, heads, 5, 6) + torch.randn(heads, 5, 6) for heads in (2, 3)])
        segments.add(layers[-1])
    agreement = segments.agreement()

    def vectors(pick):
        return [[np.concatenate([pick(x, past) for x in segment], None) for past in range(3)] for segment in layers]

    pooled = by_hand(vectors(lambda x, past: x[past].double().numpy().ravel()))
    close(np.array(agreement.over(1, 2, 3)), pooled)
    head = by_hand([[segment[1][past, 2].double().numpy().ravel() for past in range(3)] for segment in layers])
    close(np.array([x[1, 2] for x in agreement.over(3)]), head)
    assert np.isnan([x[0, 2] for x in agreement.over(3)]).all()  # the first layer has two heads
    offset = by_hand(vectors(lambda x, past: x[past, :, 4].double().numpy().ravel()))
    close(np.array([x[4] for x in agreement.over(1, 2)]), offset)


def test_row_10_puts_every_segment_behind_its_own_past_and_those_of_others(monkeypatch):
    audit_subject, batches = subject(count=140, prefixes=3, draws=4, future=5), []

    def record_batch(model, ids, past):
        batches.append(ids)
        return query_gradients(model, ids, past)

    query_gradients = pasts.query_gradients
    monkeypatch.setattr(pasts, "query_gradients", record_batch)
    finding = pasts.measure_pasts(audit_subject)
    assert len(batches) == 3
    windows = audit_subject.documents[0][: 140 // 12 * 12].view(-1, 12)
    for ids in batches:
        assert any(torch.equal(ids[0], window) for window in windows)
        assert (ids[:, PREFIX:] == ids[0, PREFIX:]).all()
        behind = {tuple(row[:PREFIX].tolist()) for row in ids}
        assert len(behind) == 4
        assert behind <= {tuple(window[:PREFIX].tolist()) for window in windows}
    with freeze_parameters(audit_subject.model):
        grads = [query_gradients(audit_subject.model, ids, PREFIX) for ids in batches]
    rows = [[np.concatenate([g[past].numpy().ravel() for g, _ in layers]) for past in range(4)] for layers in grads]
    value, error, chance, _ = by_hand(rows)
    assert (finding.figures[0].value, finding.figures[0].error, finding.figures[0].baseline) == pytest.approx(
        (value, error, chance), rel=1e-9
    )
    cosines = [
        torch.nn.functional.cosine_similarity(q[a], q[b], dim=-1).mean().item()
        for layers in grads for _, q in layers for a, b in itertools.combinations(range(4), 2)
    ]  # fmt: skip
    assert finding.figures[1].value == pytest.approx(np.mean(cosines), rel=1e-9)
    layer = by_hand([[layers[1][0][past].numpy().ravel() for past in range(4)] for layers in grads])
    assert float(finding.variables["by_layer"][1]) == pytest.approx(layer[0], rel=1e-9)
    assert float(finding.variables["chance_by_layer"][1]) == pytest.approx(layer[2], rel=1e-9)
    assert finding.variables["by_head_and_offset"].shape == (3, 4, 4)


def test_pasts_that_are_the_same_agree_fully():
    segments = SegmentVectors()
    for _ in range(3):
        segments.add([torch.randn(1, 2, 3, 4).expand(5, -1, -1, -1)])
    value, error, _, _ = segments.agreement().over(1, 2, 3)
    assert value == pytest.approx(1, abs=1e-12)
    assert error == pytest.approx(0, abs=1e-12)


def test_a_verdict_on_pasts_needs_disagreement_and_more_than_chance():
    few = np.full(3, 0.01)
    low, half, high = np.full(3, 0.01), np.full(3, 0.3), np.array([0.3, 0.3, 0.9])
    judge = partial(pasts._judge, segments=6)
    assert judge(half, few, low, few)[0] == HOLDS
    assert judge(half, few, np.full(3, np.nan), np.full(3, np.nan))[0] == HOLDS
    assert judge(low, few, half, few) == (
        FAILS, "0 of 3 layers hold it; no more than chance in layers 0, 1 and 2"
    )  # fmt: skip
    assert judge(high, few, low, few) == (
        MIXED, "2 of 3 layers hold it; more than half is common in layer 2"
    )  # fmt: skip


def test_windows_are_spread_over_the_text():
    for seed in range(20):
        indices = spread_indices(103, 4, torch.Generator().manual_seed(seed))
        assert [index * 4 // 104 for index in indices] == sorted(index * 4 // 104 for index in indices)
        assert all(
            low <= index < high for index, low, high in zip(indices, (0, 25, 51, 77), (25, 51, 77, 103), strict=True)
        )
    assert spread_indices(3, 4, torch.Generator()) == [0, 1, 2]
