"""Sums over edges that prices are made of, one block of scores at a time: squares by key, attention beyond windows.

A query i that does without some keys reads the renormalised rest. For the edges S of one head that are left out, the
first-order change of the loss is -sum_S ds_ij / (1 - sum_S a_ij), with ds_ij at the weights' own scores, behind the
soft-cap (docs/method.md, Prices). These sums hold its square for each cached pair of a key/value head, whose query
heads share it, and its two sums for the edges beyond each window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.decomposition.sweep import Blocks, BlockViews, Operands
from posterity.ops.attention import Backward
from posterity.ops.mask import Tile


@dataclass(frozen=True)
class PriceSums:
    """Sums over edges of a backward pass, or of a few heads of one document (no batch axis)."""

    squares: Float[Tensor, "*batch group segment key"]  # of what a pair costs each reader after it, float64
    beyond: Float[Tensor, "two *batch head octave query"]  # attention and ds_ij, by lag: 1, 2 to 3, 4 to 7, ...
    ends: tuple[int, ...]  # of the segments of readers: up to the first, from there to the second, ...
    whole_groups: bool = True

    @classmethod
    def of(cls, back: Backward, ends: Sequence[int]) -> "PriceSums":
        """Start with zeros for all heads of a backward pass."""
        batch, heads, length = back.lse.shape
        squares = torch.zeros(batch, back.key.shape[1], len(ends), length, dtype=torch.float64, device=back.lse.device)
        return cls(squares, back.lse.new_zeros(2, batch, heads, octaves(length), length), tuple(ends))

    def start_part(self, heads: int) -> "PriceSums":
        """Return sums over no edges, of so many heads of a document."""
        groups = heads * self.squares.shape[1] // self.beyond.shape[2]
        squares = self.squares.new_zeros(groups, *self.squares.shape[2:])
        return PriceSums(squares, self.beyond.new_zeros(2, heads, *self.beyond.shape[3:]), self.ends)

    def add_part_(self, document: int, heads: slice, part: "PriceSums") -> None:
        """Add what was summed over some edges of these heads of a document."""
        heads_per_group = self.beyond.shape[2] // self.squares.shape[1]
        self.squares[document, heads.start // heads_per_group : heads.stop // heads_per_group] += part.squares
        self.beyond[:, document, heads] += part.beyond

    def add_(self, blocks: Blocks, operands: Operands, tile: Tile) -> None:
        """Add a block of edges; the free block is overwritten."""
        del operands
        self._add_beyond(blocks.weight, blocks.capped, tile)
        change, by_diagonal = blocks.free
        write_changes_(change, blocks.weight[0], blocks.capped[0])
        if (own := tile.lag + tile.shape[0]) in range(by_diagonal.shape[-1]):
            by_diagonal[..., own] = 0.0  # a position always reads itself
        add_squares_(self.squares, self.ends, change, tile)

    def _add_beyond(self, weight: BlockViews, grad_score: BlockViews, tile: Tile) -> None:
        height, width = tile.shape
        smallest, largest = max(tile.lag - width + 1, 1), tile.lag + height - 1
        for octave in range(smallest.bit_length() - 1, largest.bit_length()):
            nearest, farthest = max(smallest, 1 << octave), min(largest, (2 << octave) - 1)
            for sums, (block, by_diagonal) in zip(self.beyond, (weight, grad_score), strict=True):
                if (nearest, farthest) == (tile.lag - width + 1, largest):
                    part = block
                else:  # the largest lag first
                    part = by_diagonal[..., tile.lag + height - farthest : tile.lag + height - nearest + 1]
                sums[:, octave, tile.rows] += part.sum(-1)


def write_changes_(change: Tensor, weight: Tensor, grad_score: Tensor) -> None:
    """Write ds_ij / (1 - a_ij), the first-order change of the loss without one edge, up to its sign."""
    torch.clamp(weight, max=1 - torch.finfo(change.dtype).eps, out=change)
    torch.sub(change.new_ones(()), change, out=change)
    torch.div(grad_score, change, out=change)


def add_squares_(
    squares: Float[Tensor, "group segment key"],
    ends: Sequence[int],
    change: Float[Tensor, "head rows columns"],
    tile: Tile,
) -> None:
    """Add the squares of changes, each summed over the heads that share a pair, to the segments of their readers."""
    shared = change.unflatten(0, (len(squares), -1))
    change = shared[:, 0] if shared.shape[1] == 1 else shared.sum(1)
    for segment, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        first, last = max(start, tile.rows.start) - tile.rows.start, min(end, tile.rows.stop) - tile.rows.start
        if first < last:
            part = change[:, first:last]
            squares[:, segment, tile.columns] += (part * part).sum(1)


def octaves(length: int) -> int:
    """Return how many windows of 1, 2, 4, ... positions are shorter than so many positions."""
    return (length - 1).bit_length()
