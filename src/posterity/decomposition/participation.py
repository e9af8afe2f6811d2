"""The participation ratio of a key's edges: how many queries effectively read it.

A key at position j of a window of N tokens has N - j readers, the queries at j, j + 1, ..., N - 1. By weights w_ij they
count as (sum_i |w_ij|)^2 / sum_i w_ij^2: all N - j if the weights are equal, one if a single edge has them all.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.ops.attention import Backward
from posterity.ops.precision import dot
from posterity.ops.scores import block_scores

KINDS = ("attention", "key mass", "value mass", "key credit", "value credit")


def participation_ratio(back: Backward) -> Float[Tensor, "kind batch head key"]:
    """Return the participation ratio of every key's edges, by each of `KINDS` (docs/method.md); NaN where all are 0.

    Float64. One block of scores at a time, as for the sums by lag: memory is O(heads N d) and a block. Padding is no
    reader.
    """
    batch, heads, length = back.lse.shape
    sums, squares = torch.zeros(2, len(KINDS), batch, heads, length, dtype=torch.float64, device=back.lse.device)
    key, value = back.repeat(back.key), back.repeat(back.value)
    _, grad_key, grad_value = back.total_gradients()
    delta = dot(back.grad_output, back.output)[..., None]
    query_norm, grad_norm = (x.to(back.lse.dtype).norm(dim=-1)[..., None] for x in (back.query, back.grad_output))
    readers = back.mask.readers(length)
    for _, tiles in back.mask.tiles(length, length, back.lse.device):
        for tile in tiles:
            i, j = (..., tile.rows, slice(None)), (..., tile.columns, slice(None))
            score, slope = block_scores(back.query, key, tile, back)
            weight = torch.exp(score - back.lse[:, :, tile.rows, None])
            if readers is not None:
                weight = weight * readers[:, None, tile.rows, None]
            grad_score = (
                (back.scale if slope is None else back.scale * slope)
                * weight
                * (_product(back.grad_output[i], value[j], back) - delta[i])
            )
            edges = (
                weight,
                grad_score * query_norm[i],
                weight * grad_norm[i],
                grad_score * _product(back.query[i], grad_key[j], back),
                weight * _product(back.grad_output[i], grad_value[j], back),
            )
            for kind, edge in enumerate(edges):
                sums[kind][j[:-1]] += edge.abs().sum(-2, dtype=torch.float64)
                squares[kind][j[:-1]] += edge.square().sum(-2, dtype=torch.float64)
    return sums.square() / squares.masked_fill(squares == 0, torch.nan)


def _product(left: Tensor, right: Tensor, back: Backward) -> Tensor:
    return left.to(back.lse.dtype) @ right.to(back.lse.dtype).mT
