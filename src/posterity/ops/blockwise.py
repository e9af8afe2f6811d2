"""Attention one block of scores at a time, forward and backward (Dao 2023, arXiv 2307.08691).

The formulas stand at the top of attention.py.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.ops.heads import repeat_heads
from posterity.ops.mask import Tile
from posterity.ops.precision import dot, working_dtype
from posterity.ops.scores import Scoring, bias_block, block_scores


def block_forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Softmax over blocks of keys with a running maximum; return output and log-sum-exp.

    A row without edges gets output 0 and lse +inf, so that a = 0.
    """
    key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
    output = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=working_dtype(query.dtype))
    for rows, tiles in scoring.mask.tiles(query.shape[2], key.shape[2], query.device):
        maximum = lse.new_full((*query.shape[:2], rows.stop - rows.start, 1), -torch.inf)
        if sinks is not None:
            maximum = maximum.maximum((sinks if sinks.shape[2] == 1 else sinks[:, :, rows])[..., None])
        total = torch.zeros_like(maximum) if sinks is None else torch.ones_like(maximum)
        weighted = maximum.new_zeros(*maximum.shape[:3], value.shape[3])
        for tile in tiles:
            score, _ = block_scores(query, key, tile, scoring)
            new_maximum = maximum.maximum(score.amax(-1, keepdim=True))
            weight = torch.exp(score - new_maximum.nan_to_num(neginf=0.0))
            shrink = torch.exp(maximum - new_maximum.nan_to_num(neginf=0.0))
            total = total * shrink + weight.sum(-1, keepdim=True)
            weighted = weighted * shrink + weight @ value[:, :, tile.columns].to(weight.dtype)
            maximum = new_maximum
        empty = total == 0
        output[:, :, rows] = (weighted / total.masked_fill(empty, 1)).to(output.dtype)
        lse[:, :, rows] = (maximum + total.log()).masked_fill(empty, torch.inf).squeeze(-1)
    return output, lse


def block_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scoring: Scoring,
    factors: Sequence[Tensor | None] = (None, None),
    grad_bias: Tensor | None = None,
) -> list[Tensor]:
    """Return dq, and each query head's own dk and dv under `factors` by lag (of keys, of values); None: all are 1.

    `key` and `value` are repeated for the query heads. Adds ds_ij to `grad_bias`, summed where the bias is broadcast.
    """
    grads = [torch.zeros_like(x, dtype=working_dtype(x.dtype)) for x in (query, key, value)]
    delta = dot(grad_output, output)[..., None]
    for rows, tiles in scoring.mask.tiles(query.shape[2], key.shape[2], query.device):
        query_rows, grad_rows = query[:, :, rows].to(lse.dtype), grad_output[:, :, rows].to(lse.dtype)
        for tile in tiles:
            columns = tile.columns
            score, slope = block_scores(query, key, tile, scoring)
            weight = score.sub_(lse[:, :, rows, None]).exp_()
            grad_score = (grad_rows @ value[:, :, columns].to(lse.dtype).mT).sub_(delta[:, :, rows]).mul_(weight)
            if grad_bias is not None:
                block = bias_block(grad_bias, tile)
                block += grad_score.sum_to_size(block.shape)
            grad_score.mul_(scoring.scale if slope is None else scoring.scale * slope)
            grads[0][:, :, rows] += grad_score @ key[:, :, columns].to(lse.dtype)
            for grad, edge, reader, by_lag in zip(
                grads[1:], (grad_score, weight), (query_rows, grad_rows), factors, strict=True
            ):
                block_factors = None if by_lag is None else _block_factors(by_lag, tile)
                if block_factors is None or block_factors.any():
                    grad[:, :, columns] += (edge if block_factors is None else edge * block_factors).mT @ reader
    return [grad.to(query.dtype) for grad in grads]


def _block_factors(by_lag: Float[Tensor, " lag"], tile: Tile) -> Float[Tensor, "rows columns"]:
    """Lay factors by lag out on the pairs of a block; what they are where key > query does not matter."""
    rows, columns = (torch.arange(x.start, x.stop, device=by_lag.device) for x in (tile.rows, tile.columns))
    return by_lag[(tile.offset + rows[:, None] - columns).clamp_(min=0)]
