"""Scores of edges: of one block of pairs, of the diagonal, or of one key per query."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.ops.mask import Mask, Tile
from posterity.ops.precision import dot, working_dtype


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How scores are formed from queries and keys: scale, then soft-cap, then bias; and which pairs are edges."""

    scale: float
    softcap: float | None
    mask: Mask
    bias: Float[Tensor, "#batch #head #query #key"] | None = None


def block_scores(query: Tensor, key: Tensor, tile: Tile, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """Return the scores of one block, -inf off the edges, and the slope of the soft-cap."""
    dtype = working_dtype(query.dtype)
    score = scoring.scale * query[:, :, tile.rows].to(dtype) @ key[:, :, tile.columns].to(dtype).mT
    slope = None
    if scoring.softcap is not None:
        tanh = torch.tanh(score / scoring.softcap)
        score, slope = scoring.softcap * tanh, 1 - tanh * tanh
    if scoring.bias is not None:
        score += bias_block(scoring.bias, tile)
    return scoring.mask.fill_(score, tile, -torch.inf), slope


def bias_block(bias: Tensor, tile: Tile) -> Tensor:
    """Return one block of a bias (or of its gradient): a view that broadcasts as the bias does."""
    rows, columns = (
        x if size > 1 else slice(None) for x, size in zip((tile.rows, tile.columns), bias.shape[2:], strict=True)
    )
    return bias[:, :, rows, columns]


def self_edges(
    grad_output: Float[Tensor, "batch head position dim_v"],
    query: Float[Tensor, "batch head position dim"],
    key: Float[Tensor, "batch head position dim"],
    value: Float[Tensor, "batch head position dim_v"],
    output: Float[Tensor, "batch head position dim_v"],
    lse: Float[Tensor, "batch head position"],
    scoring: Scoring,
) -> tuple[Float[Tensor, "batch head position"], Float[Tensor, "batch head position"]]:
    """Return a_ii and c ds_ii, elementwise: O(N d), no scores but the diagonal ones."""
    bias = scoring.bias
    if bias is not None:
        bias = bias.expand(-1, -1, query.shape[2], key.shape[2]).diagonal(key.shape[2] - query.shape[2], -2, -1)
    weight, slope = single_edge(query, key, lse, scoring, bias)
    allowed = scoring.mask.diagonal(query.shape[2], key.shape[2], lse.device)
    if allowed is not None:
        weight = weight * allowed
    return weight, scoring.scale * slope * weight * (dot(grad_output, value) - dot(grad_output, output))


def single_edge(
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch head #query dim"],
    lse: Float[Tensor, "batch head query"],
    scoring: Scoring,
    bias: Float[Tensor, "#batch #head #query"] | None,
) -> tuple[Float[Tensor, "batch head query"], Float[Tensor, "batch head query"] | float]:
    """Return the attention of each query on one key, under its bias but without the mask; and the soft-cap's slope."""
    score, slope = scoring.scale * dot(query, key), 1.0
    if scoring.softcap is not None:
        tanh = torch.tanh(score / scoring.softcap)
        score, slope = scoring.softcap * tanh, 1 - tanh * tanh
    if bias is not None:
        score = score + bias
    return torch.exp(score - lse), slope
