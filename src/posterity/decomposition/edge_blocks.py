"""Attention, mass and credit of every single edge of keys and values, one block of pairs at a time."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.ops.attention import Backward
from posterity.ops.mask import Tile
from posterity.ops.precision import dot
from posterity.ops.scores import block_scores

KINDS = ("attention", "key mass", "value mass", "key credit", "value credit")


def edge_blocks(back: Backward) -> Iterator[tuple[Tile, tuple[Float[Tensor, "batch head query key"], ...]]]:
    """Yield every block of pairs with the quantities of its edges, one for each of `KINDS`; 0 where there is no edge.

    They are those of the backward pass without the factors of a horizon. Padding is no reader. Memory is O(heads N d)
    and a block.
    """
    key, value = back.repeat(back.key), back.repeat(back.value)
    _, grad_key, grad_value = back.total_gradients()
    delta = dot(back.grad_output, back.output)[..., None]
    query_norm, grad_norm = (x.to(back.lse.dtype).norm(dim=-1)[..., None] for x in (back.query, back.grad_output))
    length = back.lse.shape[2]
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
            yield (
                tile,
                (
                    weight,
                    grad_score * query_norm[i],
                    weight * grad_norm[i],
                    grad_score * _product(back.query[i], grad_key[j], back),
                    weight * _product(back.grad_output[i], grad_value[j], back),
                ),
            )


def _product(left: Tensor, right: Tensor, back: Backward) -> Tensor:
    return left.to(back.lse.dtype) @ right.to(back.lse.dtype).mT
