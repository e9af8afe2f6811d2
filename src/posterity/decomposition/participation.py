"""The participation ratio of a key's edges: how many queries effectively read it.

A key at position j of a window of N tokens has N - j readers, the queries at j, j + 1, ..., N - 1. By weights w_ij they
count as (sum_i |w_ij|)^2 / sum_i w_ij^2: all N - j if the weights are equal, one if a single edge has them all.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.decomposition.edge_blocks import KINDS, edge_blocks
from posterity.ops.attention import Backward


def participation_ratio(back: Backward) -> Float[Tensor, "kind batch head key"]:
    """Return the participation ratio of every key's edges, by each of `KINDS` (docs/method.md); NaN where all are 0.

    Float64. One block of scores at a time, as for the sums by lag: memory is O(heads N d) and a block. Padding is no
    reader.
    """
    sums, squares = torch.zeros(2, len(KINDS), *back.lse.shape, dtype=torch.float64, device=back.lse.device)
    for tile, quantities in edge_blocks(back):
        for kind, edge in enumerate(quantities):
            sums[kind][..., tile.columns] += edge.abs().sum(-2, dtype=torch.float64)
            squares[kind][..., tile.columns] += edge.square().sum(-2, dtype=torch.float64)
    return sums.square() / squares.masked_fill(squares == 0, torch.nan)
