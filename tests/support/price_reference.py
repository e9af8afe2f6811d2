"""Prices written down densely: attention that really does without keys. It imports nothing of the package."""

import torch
from support.reference import dense_attention


def dense_change(inputs, grad, scale, allowed, without, **options):
    """Return the first-order change of the loss by query and head when each query does without some of its edges."""
    query, key, value = (x.detach() for x in inputs)
    output, _, _ = dense_attention(query, key, value, scale, allowed, **options)
    rest, _, _ = dense_attention(query, key, value, scale, allowed & ~without, **options)
    return (grad * (rest - output)).sum(-1)


def dense_pair_prices(inputs, grad, scale, allowed, ends=None, **options):
    """Return the price of each pair for the readers of each segment: (batch, group, segment, key)."""
    length, groups = grad.shape[2], inputs[1].shape[1]
    ends = (length,) if ends is None else ends
    key, starts = torch.arange(length), (0, *ends[:-1])
    prices = []
    for position in range(length):
        without = ((key == position) & (key[:, None] > position))[None, None]
        change = dense_change(inputs, grad, scale, allowed, without, **options)
        squares = change.unflatten(1, (groups, -1)).sum(2).square() / 2
        prices.append(torch.stack([squares[..., a:b].sum(-1) for a, b in zip(starts, ends, strict=True)], -1))
    return torch.stack(prices, -1)


def dense_window_prices(inputs, grad, scale, allowed, first, **options):
    """Return the prices of windows of 1, 2, 4, ... for each head, and for each layer; `first`: keys that stay.

    Dims (batch, head, window) and (batch, window).
    """
    length = grad.shape[2]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    windows = [2**power for power in range(length.bit_length()) if 2**power < length]
    changes = [dense_change(inputs, grad, scale, allowed, (lag >= w) & ~first, **options) for w in windows]
    change = torch.stack(changes, -1)
    return change.square().sum(2) / 2, change.sum(1).square().sum(1) / 2
