"""Prices against attention that really does without the keys, written down densely."""

import itertools

import pytest
import torch
from support.attention_cases import BIASES, DIM_V, HEADS, MASKS, leaves, mask_case, run_backward
from support.reference import dense_attention

from posterity.decomposition.first_keys import FirstKeys
from posterity.decomposition.prices import pass_prices

SCALE = 0.7


def dense_change(inputs, grad, allowed, without, **options):
    """Return the first-order change of the loss by query and head when each query does without some of its edges."""
    query, key, value = (x.detach() for x in inputs)
    output, _, _ = dense_attention(query, key, value, SCALE, allowed, **options)
    rest, _, _ = dense_attention(query, key, value, SCALE, allowed & ~without, **options)
    return (grad * (rest - output)).sum(-1)


def dense_pair_prices(inputs, grad, allowed, ends, **options):
    """Return the price of each pair for the readers of each segment: (batch, group, segment, key)."""
    length, groups = grad.shape[2], inputs[1].shape[1]
    key, starts = torch.arange(length), (0, *ends[:-1])
    prices = []
    for position in range(length):
        without = ((key == position) & (key[:, None] > position))[None, None]
        change = dense_change(inputs, grad, allowed, without, **options)
        squares = change.unflatten(1, (groups, -1)).sum(2).square() / 2
        prices.append(torch.stack([squares[..., a:b].sum(-1) for a, b in zip(starts, ends, strict=True)], -1))
    return torch.stack(prices, -1)


def dense_window_prices(inputs, grad, allowed, first, windows, **options):
    """Return the prices of windows for each head, and for each layer: (batch, head, window) and (batch, window)."""
    lag = torch.arange(grad.shape[2])[:, None] - torch.arange(grad.shape[2])
    changes = [dense_change(inputs, grad, allowed, (lag >= w) & ~first, **options) for w in windows]
    change = torch.stack(changes, -1)
    return change.square().sum(2) / 2, change.sum(1).square().sum(1) / 2


def first_columns(spans_or_starts, sinks, length):
    first = torch.zeros(2, 1, 1, length, dtype=torch.bool)
    for row, spans in zip(first, spans_or_starts, strict=True):
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
        bounds = [*range(0, length, 6), length]
        spans = [[slice(start, stop) for start, stop in itertools.pairwise(bounds)]] * 2
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
    documents = (
        [[(start, length)] for start in starts] if spans is None else [[(s.start, s.stop) for s in spans[0]]] * 2
    )
    ends = (length,) if length < 3 else (length // 3, length // 3 + 1, length)
    ours = pass_prices(back, FirstKeys.of(back, sinks, spans), ends)
    torch.testing.assert_close(
        ours.pairs, dense_pair_prices(inputs, grad, allowed, ends, **options), rtol=1e-9, atol=1e-11
    )
    windows = [2**power for power in range(length.bit_length()) if 2**power < length]
    assert ours.windows.shape == (2, HEADS, len(windows))
    if windows:
        first = first_columns(documents, sinks, length)
        by_head, by_layer = dense_window_prices(inputs, grad, allowed, first, windows, **options)
        torch.testing.assert_close(ours.windows, by_head, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(ours.layer_windows, by_layer, rtol=1e-9, atol=1e-11)
