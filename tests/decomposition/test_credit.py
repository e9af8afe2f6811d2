"""The ledger against the dense account of every single edge, and against its own laws."""

import pytest
import torch
from support.attention_cases import BIASES, DIM, DIM_V, HEADS, LENGTHS, MASKS, leaves, mask_case, run_backward
from support.reference import allowed_pairs, by_lag, dense_account

from posterity.decomposition.bins import Bins
from posterity.decomposition.credit import pass_credit, self_edge_gradients
from posterity.decomposition.lag_sums import sum_by_lag
from posterity.decomposition.participation import participation_ratio
from posterity.errors import InputError
from posterity.ops.attention import attention
from posterity.ops.mask import Mask


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dim_v", [DIM_V, DIM])
@pytest.mark.usefixtures("small_blocks")
def test_every_account_equals_the_dense_one(length, name, softcap, sinks, dim_v):
    query, key, value, sink = leaves(length, dim_v, sinks)
    grad = torch.randn(2, HEADS, length, dim_v, dtype=torch.double)
    mask, allowed, readers = mask_case(name, length)
    back = run_backward(query, key, value, grad, mask=mask, softcap=softcap, sinks=sink)
    credit, mass, weight, pairs, grads, _ = dense_account(query, key, value, grad, 0.7, allowed, softcap, sink, readers)
    part = self_edge_gradients(back)
    ours = pass_credit(back, part, Bins.of("all", length))

    def same(actual, expected):
        torch.testing.assert_close(actual, expected.to(actual.dtype).expand_as(actual), rtol=1e-10, atol=1e-12)

    same(ours.credit.sum(-2), by_lag(credit).movedim(0, 2))
    same(ours.mass.sum(-2), by_lag(mass).movedim(0, 2))
    same(ours.attention.sum(-2), by_lag(weight))
    same(ours.edges.sum(-2), by_lag(pairs.long())[:, 0])
    starts = [0, 0] if readers is None else readers.int().argmax(1).tolist()
    same(ours.attention_first, torch.stack([weight[d, :, :, start].sum(-1) for d, start in enumerate(starts)]))
    self_credit = credit.diagonal(0, -2, -1)
    total = torch.stack((credit[0].sum(-1), credit[1].sum(-2), credit[2].sum(-2)))
    by_position = torch.stack((self_credit, total - self_credit)).permute(2, 3, 1, 0, 4)
    shifted = torch.stack([x.roll(-start, -1) for x, start in zip(by_position, starts, strict=True)])
    same(ours.credit_by_position, shifted)
    # the ledger balances against autograd
    for stream, expected in enumerate(grads):
        same(ours.credit.sum((1, 3, 4))[:, stream], expected.square().sum((1, 2, 3)))
    # the elementwise self part is lag 0 of the sweep
    same(ours.credit_by_position[:, :, :, 0].sum(-1), ours.credit[..., 0].sum(-1))


@pytest.mark.parametrize("sinks", [0, 1, 4, 50])
@pytest.mark.parametrize("name", [*MASKS, "packed documents"])
@pytest.mark.parametrize("lags", ["all", "octaves", "self"])
@pytest.mark.usefixtures("small_blocks")
def test_edges_into_the_first_keys_of_each_document_are_told_apart(name, sinks, lags):
    length, spans = 21, None
    if name == "packed documents":
        spans = [[slice(0, 6), slice(6, 12), slice(12, 18), slice(18, 21)]] * 2
    query, key, value, _ = leaves(length)
    bias = torch.randn(BIASES["whole"](length)).double()
    mask, allowed, readers = mask_case(name.removesuffix(" documents"), length)
    grad = torch.randn(2, HEADS, length, DIM_V, dtype=torch.double)
    back = run_backward(query, key, value, grad, mask=mask, softcap=1.5, bias=bias)
    credit, mass, weight, pairs, *_ = dense_account(query, key, value, grad, 0.7, allowed, 1.5, None, readers, bias)
    starts = [0, 0] if readers is None else readers.int().argmax(1).tolist()
    starts = [[start] for start in starts] if spans is None else [[span.start for span in row] for row in spans]
    first = torch.zeros(2, 1, 1, length, dtype=torch.bool)
    for row, columns in zip(first, starts, strict=True):
        for start in columns:
            row[..., start : min(start + sinks, start + 6 if spans else length)] = True
    bins = Bins.of(lags, length)
    ours = pass_credit(back, self_edge_gradients(back), bins, spans=spans, sinks=sinks)

    def same(actual, by_edge):
        expected = torch.stack([bins.sum(by_lag(by_edge * part)) for part in (first, ~first)], -2)
        if not bins.needs_sweep and by_edge is not credit and by_edge is not pairs:
            actual, expected = actual[..., 0], expected[..., 0]
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-10, atol=1e-12)

    same(ours.credit.movedim(2, 0), credit)
    same(ours.mass.movedim(2, 0), mass)
    same(ours.attention, weight)
    same(ours.edges[:, None], pairs)
    by_side = torch.stack((credit.diagonal(0, -2, -1).sum(-1), credit.tril(-1).sum((-2, -1))), -1)
    first_credit = credit * first
    of_first = torch.stack((first_credit.diagonal(0, -2, -1).sum(-1), first_credit.tril(-1).sum((-2, -1))), -1)
    expected = torch.stack((of_first, by_side - of_first), -2).movedim(0, 2)
    torch.testing.assert_close(ours.credit_by_side, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", BIASES)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("name", ["plain", "left padding"])
@pytest.mark.usefixtures("small_blocks")
def test_every_account_under_a_bias_equals_the_dense_one(length, shape, softcap, name):
    query, key, value, _ = leaves(length)
    bias, sinks = torch.randn(BIASES[shape](length)).double(), torch.randn(2, HEADS, length).double()
    grad = torch.randn(2, HEADS, length, DIM_V, dtype=torch.double)
    mask, allowed, real = mask_case(name, length)
    back = run_backward(query, key, value, grad, mask=mask, softcap=softcap, sinks=sinks, bias=bias)
    credit, mass, weight, *_ = dense_account(query, key, value, grad, 0.7, allowed, softcap, sinks, real, bias)
    part = self_edge_gradients(back)
    ours = pass_credit(back, part, Bins.of("all", length))

    def same(actual, expected):
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-10, atol=1e-12)

    starts = [0, 0] if real is None else real.int().argmax(1).tolist()
    same(ours.credit.sum(-2), by_lag(credit).movedim(0, 2))
    same(ours.mass.sum(-2), by_lag(mass).movedim(0, 2))
    same(ours.attention.sum(-2), by_lag(weight))
    same(ours.attention_first, torch.stack([weight[d, :, :, start].sum(-1) for d, start in enumerate(starts)]))
    same(ours.credit_by_position[:, :, :, 0].sum(-1), ours.credit[..., 0].sum(-1))
    same(participation_ratio(back)[0].nan_to_num(), (weight.sum(-2).square() / weight.square().sum(-2)).nan_to_num())


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.usefixtures("small_blocks")
def test_the_self_part_is_the_diagonal_term_of_each_gradient(name):
    query, key, value, _ = leaves(9)
    grad = torch.randn(2, HEADS, 9, DIM_V, dtype=torch.double)
    mask, allowed, _ = mask_case(name, 9)
    part = self_edge_gradients(run_backward(query, key, value, grad, mask=mask))
    terms = dense_account(query, key, value, grad, 0.7, allowed)[5]
    for actual, term in zip((part.query, part.key, part.value), terms, strict=True):
        torch.testing.assert_close(actual, term.diagonal(0, 2, 3).mT, rtol=1e-10, atol=1e-12)


def test_the_self_score_is_the_default_the_look_back_competes_with():
    """sum_j ds_ij = 0: with one more, constant key coordinate, its query gradient is c sum_j ds_ij."""
    query, key, value, _ = leaves(33)
    key = torch.cat((key.detach(), torch.ones_like(key[..., :1])), -1).requires_grad_()
    query = torch.cat((query.detach(), torch.randn_like(query[..., :1])), -1).requires_grad_()
    attention(query, key, value).square().sum().backward()
    assert query.grad[..., -1].abs().max() < 1e-14 < query.grad[..., 0].abs().max()


@pytest.mark.parametrize("lags", ["octaves", "self"])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 40, 150])
def test_bins_are_sums_of_lags(lags, length):
    query, key, value, _ = leaves(length)
    grad = torch.randn(2, HEADS, length, DIM_V, dtype=torch.double)
    back = run_backward(query, key, value, grad)
    part = self_edge_gradients(back)
    fine, coarse = pass_credit(back, part, Bins.of("all", length)), pass_credit(back, part, Bins.of(lags, length))
    bins = Bins.of(lags, length)
    for b, (first, last) in enumerate(zip(bins.first, bins.last, strict=True)):
        torch.testing.assert_close(coarse.credit[..., b], fine.credit[..., first : last + 1].sum(-1))
        assert (coarse.edges[..., b] == fine.edges[..., first : last + 1].sum(-1)).all()
        if bins.needs_sweep or b == 0:
            torch.testing.assert_close(coarse.mass[..., b], fine.mass[..., first : last + 1].sum(-1))
            torch.testing.assert_close(coarse.attention[..., b], fine.attention[..., first : last + 1].sum(-1))
        else:
            assert coarse.mass[..., 1, b].isnan().all()


def test_bins_cover_every_lag_once():
    for context in range(1, 300):
        for lags in ("octaves", "all", "self"):
            bins = Bins.of(lags, context)
            assert bins.first[0] == 0
            assert bins.last[0] == 0
            assert bins.last[-1] == context - 1
            assert all(last + 1 == first for last, first in zip(bins.last, bins.first[1:], strict=False))
    with pytest.raises(InputError, match="octaves"):
        Bins.of("thirds", 8)


def test_float32_balances_to_rounding():
    query, key, value, _ = leaves(700, DIM, dtype=torch.float32)
    back = run_backward(query, key, value, torch.randn(2, HEADS, 700, DIM))
    ours = pass_credit(back, self_edge_gradients(back), Bins.of("octaves", 700))
    for stream, leaf in enumerate((query, key, value)):
        total = leaf.grad.double().square().sum()
        assert abs(ours.credit.sum((0, 1, 3, 4))[stream] / total - 1) < 1e-5


def equal_scores(context):
    """Queries that score all keys alike, and a gradient of norm 1: the mass of a value's edge is its attention."""
    query = torch.zeros(1, 2, context, 1, dtype=torch.double, requires_grad=True)
    key = torch.ones(1, 1, context, 1, dtype=torch.double, requires_grad=True)
    value = torch.zeros(1, 1, context, 1, dtype=torch.double, requires_grad=True)
    return query, key, value, torch.ones(1, 2, context, 1, dtype=torch.double)


@pytest.mark.parametrize("window", [None, 1, 200])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 513, 700])
def test_every_edge_is_counted_once_at_every_block_edge(length, window):
    """Equal scores: query i gives each of its n edges the weight 1/n, so that lag by lag the sums are known."""
    *inputs, grad = equal_scores(length)
    mask = Mask() if window is None else Mask(lambda query, key: (key <= query) & (query - key < window))
    back = run_backward(*inputs, grad, mask=mask)
    ours = pass_credit(back, self_edge_gradients(back), Bins.of("all", length))
    edges = torch.arange(1, length + 1).clamp(max=window or length).double()
    lag = torch.arange(length)
    expected = (1 / edges).flip(0).cumsum(0).flip(0) * (lag < (window or length))  # queries from `lag` on
    torch.testing.assert_close(ours.attention.sum(-2), expected.expand(1, 2, -1), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.mass[:, :, 2].sum(-2), expected.expand(1, 2, -1), rtol=1e-12, atol=0)
    assert (ours.edges.sum(-2) == (length - lag) * (lag < (window or length))).all()


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_weights_too_small_for_float32_count_as_nothing(softcap):
    """Scores hundreds below the largest, and queries that see nothing: no account is NaN, all equal float64's."""
    torch.manual_seed(1)
    wide = [30 * torch.randn(2, heads, 300, 8, dtype=torch.double) for heads in (4, 2, 2)]
    padding = torch.arange(300)[None] >= torch.tensor([[0], [140]])
    entries = []
    for dtype in (torch.float64, torch.float32):
        inputs = [x.to(dtype).requires_grad_() for x in wide]
        grad = torch.ones(2, 4, 300, 8, dtype=dtype)
        back = run_backward(*inputs, grad, mask=Mask(padding=padding), softcap=softcap)
        entries.append(pass_credit(back, self_edge_gradients(back), Bins.of("octaves", 300)))
    # an error of one rounding in scores of size s is one of s roundings in the weights
    bound = 32 * torch.finfo(torch.float32).eps * (30 if softcap else 0.7 * 30**2 * 8)
    for name in ("credit", "mass", "attention"):
        expected, actual = (getattr(entry, name) for entry in entries)
        assert (actual - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("heads", [1, 3, 5])
def test_the_split_of_the_heads_over_threads_changes_nothing(threads, heads):
    before = torch.get_num_threads()
    length = 600  # blocks of one head fill a thread's part of the scratch
    query, key, value, grad = (
        torch.randn(1, heads, length, 4, dtype=torch.double, requires_grad=True) for _ in range(4)
    )
    back = run_backward(query, key, value, grad.detach())
    try:
        torch.set_num_threads(threads)
        entry = pass_credit(back, self_edge_gradients(back), Bins.of("all", length))
    finally:
        torch.set_num_threads(before)
    credit, mass, weight, *_ = dense_account(query, key, value, grad.detach(), 0.7, allowed_pairs(length))
    for actual, expected in (
        (entry.credit, credit.movedim(0, 2)),
        (entry.mass, mass.movedim(0, 2)),
        (entry.attention, weight),
    ):
        torch.testing.assert_close(actual.sum(-2), by_lag(expected), rtol=1e-10, atol=1e-10)


def test_heads_with_different_masks_are_refused():
    query, key, value, _ = leaves(5)
    windows = torch.tensor([1, 2, 3, 4])[None, :, None, None]
    back = run_backward(
        query,
        key,
        value,
        torch.ones(2, HEADS, 5, DIM_V, dtype=torch.double),
        mask=Mask(lambda query, key: (key <= query) & (query - key < windows)),
    )
    with pytest.raises(InputError, match="differs between heads"):
        pass_credit(back, self_edge_gradients(back), Bins.of("all", 5))


def test_a_pass_over_part_of_a_sequence_is_refused():
    query, key, value, _ = leaves(5)
    back = run_backward(query[:, :, 3:], key, value, torch.ones(2, HEADS, 2, DIM_V, dtype=torch.double))
    with pytest.raises(InputError, match="2 queries for 5 keys"):
        pass_credit(back, self_edge_gradients(back), Bins.of("all", 5))


@pytest.mark.parametrize("threads", [1, 2])
def test_masks_that_differ_between_heads_are_swept_right_when_heads_are_swept_in_parts(threads, monkeypatch):
    monkeypatch.setattr(
        "posterity.decomposition.sweep._SCRATCH_BYTES", {"cpu": 1.0}
    )  # as many heads at once as there are threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    length, heads, folded = 21, 5, [1, 4]
    query, key, value = (torch.randn(2, heads, length, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    passes = []
    out = attention(query, key, value, mask=Mask().restrict_to_self(folded, heads), observe=passes.append)
    out.backward(torch.randn_like(out))
    sums = sum_by_lag(passes[0])
    totals = torch.stack([x.square().sum((-1, -2)) for x in passes[0].total_gradients()])
    torch.testing.assert_close(sums.credit.sum(-1), totals, rtol=1e-11, atol=1e-11)
    for lags in (*sums.credit, *sums.mass, sums.attention):
        assert not lags[:, folded, 1:].any()
