"""Prices against attention that really does without the keys, written down densely."""

from itertools import pairwise

import pytest
import torch
from support.attention_cases import BIASES, DIM_V, HEADS, MASKS, leaves, mask_case, run_backward
from support.price_reference import dense_pair_prices, dense_window_prices

from posterity.decomposition.bins import Bins
from posterity.decomposition.credit import pass_credit, self_edge_gradients
from posterity.decomposition.first_keys import FirstKeys
from posterity.decomposition.prices import pass_prices

SCALE = 0.7


def first_columns(documents, sinks, length):
    """Mark the first keys of each row's documents: (batch, 1, 1, key)."""
    first = torch.zeros(len(documents), 1, 1, length, dtype=torch.bool)
    for row, spans in zip(first, documents, strict=True):
        for start, stop in spans:
            row[..., start : min(start + sinks, stop)] = True
    return first


@pytest.mark.parametrize("length", [1, 2, 21, 40])
@pytest.mark.parametrize("name", [*MASKS, "packed documents"])
@pytest.mark.parametrize(("softcap", "bias", "extra"), [(None, False, False), (1.5, True, False), (None, False, True)])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.usefixtures("small_blocks")
def test_prices_are_those_of_attention_that_does_without(length, name, softcap, bias, extra, sinks):
    spans = None
    if name == "packed documents":
        spans = [[slice(start, stop) for start, stop in pairwise([*range(0, length, 6), length])]] * 2
    inputs = leaves(length)[:3]
    options = {"softcap": softcap}
    if bias:
        options["bias"] = torch.randn(BIASES["whole"](length)).double()
    if extra:
        options["sinks"] = torch.randn(HEADS).double()
    mask, allowed, readers = mask_case(name.removesuffix(" documents"), length)
    grad = torch.randn(2, HEADS, length, DIM_V, dtype=torch.double)
    if readers is not None:
        grad = grad * readers[:, None, :, None]
    back = run_backward(*inputs, grad, mask=mask, **options)
    starts = [0, 0] if readers is None else readers.int().argmax(1).tolist()
    documents = [[(x.start, x.stop) for x in row] for row in spans or ()] or [[(start, length)] for start in starts]
    ends = (length,) if length < 3 else (length // 3, length // 3 + 1, length)
    ours = pass_prices(back, FirstKeys.of(back, sinks, spans), ends)

    def same(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)

    same(ours.pairs, dense_pair_prices(inputs, grad, SCALE, allowed, ends, **options))
    assert ours.windows.shape == (2, HEADS, (length - 1).bit_length())
    if length > 1:
        first = first_columns(documents, sinks, length)
        by_head, by_layer = dense_window_prices(inputs, grad, SCALE, allowed, first, **options)
        same(ours.windows, by_head)
        same(ours.layer_windows, by_layer)


@pytest.mark.parametrize("lags", ["all", "self"])
@pytest.mark.usefixtures("small_blocks")
def test_prices_in_the_sweep_of_the_credit_are_those_of_their_own_sweep_and_leave_it_alone(lags):
    back = run_backward(*leaves(21)[:3], torch.randn(2, HEADS, 21, DIM_V, dtype=torch.double), softcap=1.5)
    part, bins = self_edge_gradients(back), Bins.of(lags, 21)
    both, credit = (pass_credit(back, part, bins, prices=prices) for prices in (True, False))
    alone = pass_prices(back, FirstKeys.of(back, 4))
    for name in ("pairs", "windows", "layer_windows"):
        torch.testing.assert_close(getattr(both.prices, name), getattr(alone, name), rtol=1e-12, atol=1e-15)
    for name in ("credit", "mass", "attention"):
        torch.testing.assert_close(getattr(both, name), getattr(credit, name), rtol=0, atol=0, equal_nan=True)
    assert credit.prices is None


def test_a_key_that_takes_all_attention_has_a_finite_price():
    query, key, value = (torch.randn(1, 1, 8, 4) for _ in range(3))
    key[:, :, 0], query[..., 0] = torch.tensor([400.0, 0, 0, 0]), 1.0
    inputs = [x.requires_grad_() for x in (query, key, value)]
    back = run_backward(*inputs, torch.randn(1, 1, 8, 4))
    prices = pass_prices(back, FirstKeys.of(back, 0))
    assert prices.pairs.isfinite().all()
    assert prices.windows.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_split_of_the_work_over_threads_changes_no_price(threads):
    back = run_backward(*leaves(700, batch=1)[:3], torch.randn(1, HEADS, 700, DIM_V, dtype=torch.double))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        ours = pass_prices(back, FirstKeys.of(back, 4), (300, 700))
    finally:
        torch.set_num_threads(before)
    inputs, grad = (back.query, back.key, back.value), back.grad_output
    allowed = torch.ones(700, 700, dtype=torch.bool).tril()[None, None]
    first = first_columns([[(0, 700)]], 4, 700)
    by_head, by_layer = dense_window_prices(inputs, grad, SCALE, allowed, first)
    torch.testing.assert_close(ours.windows, by_head, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.layer_windows, by_layer, rtol=1e-9, atol=1e-11)
