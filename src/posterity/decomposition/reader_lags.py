"""How far away the readers of a key are: the lags within which parts of what its edges carry lie, for short texts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.axes import READER_QUANTITIES
from posterity.decomposition.edge_blocks import KINDS, edge_blocks
from posterity.ops.attention import Backward

CANCELLED = 1e-3  # where the edges of a key cancel to less of their sizes than this, no lag is known


def edge_sums(back: Backward) -> Float[Tensor, "quantity query key"]:
    """Sum each of `READER_QUANTITIES` over the documents and heads of a backward pass, edge by edge; float64, N x N."""
    length = back.lse.shape[2]
    sums = torch.zeros(len(READER_QUANTITIES), length, length, dtype=torch.float64, device=back.lse.device)
    for tile, quantities in edge_blocks(back):
        for index, name in enumerate(READER_QUANTITIES):
            sums[index, tile.rows, tile.columns] += quantities[KINDS.index(name)].sum((0, 1), dtype=torch.float64)
    lag = torch.arange(length, device=sums.device)
    lag = (lag[:, None] - lag).clamp(min=0)
    for name, factor in (("key credit", back.key_factor), ("value credit", back.value_factor)):
        if factor is not None:
            sums[READER_QUANTITIES.index(name)] *= factor[lag]
    return sums


def lags_within(
    edges: Float[Tensor, "quantity query key"], levels: Sequence[float]
) -> Float[Tensor, "quantity level key"]:
    """Return the smallest lag at which the edges of each key, added up from lag 0, first reach a part of their sum.

    Credit can be negative, so that the sum can fall again later: the first crossing counts. NaN where the sum is not
    positive, or where the edges cancel to less than a thousandth of their sizes.
    """
    key = torch.arange(edges.shape[-1], device=edges.device)
    query = key[:, None] + key  # of each lag and key
    by_lag = edges[:, query.clamp(max=len(key) - 1), key].where(query < len(key), 0.0)
    running = by_lag.cumsum(1)
    total = running[:, -1]
    known = total > CANCELLED * by_lag.abs().sum(1)
    lags = [(running >= level * total[:, None]).int().argmax(1).double().where(known, torch.nan) for level in levels]
    return torch.stack(lags, 1)
