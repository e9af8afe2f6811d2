"""Sums over all edges by lag: credit, mass and attention, from the blocks of the sweep (sweep.py).

Beside the two products of a block the credit of each stream takes one more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.axes import STREAMS
from posterity.decomposition.sweep import Blocks, Operands, Scratch, largest_tile, sweep
from posterity.ops.attention import Backward
from posterity.ops.mask import Tile

# The sums of an edge lie in one tensor, in the order credit of (query, key, value), mass of the same, attention.
_MASS = len(STREAMS)
_ATTENTION = 2 * len(STREAMS)
SUMS = _ATTENTION + 1


@dataclass(frozen=True)
class LagSums:
    """Credit and mass of each stream's terms, and attention, summed over all edges of each lag, in float64.

    Attention counts readers only (`Mask.readers`).
    """

    credit: Float[Tensor, "stream batch head lag"]
    mass: Float[Tensor, "stream batch head lag"]
    attention: Float[Tensor, "batch head lag"]

    @classmethod
    def of(cls, sums: Float[Tensor, "sum batch head lag"], back: Backward) -> "LagSums":
        """Split sums that lie in one tensor; those of ds_ij get the scale of queries and keys, all a horizon's factors.

        The sums are changed in place.
        """
        credit, mass = sums[:_MASS], sums[_MASS:_ATTENTION]
        for terms in (credit, mass):
            terms[:2] *= back.scale
            for stream, factor in ((1, back.key_factor), (2, back.value_factor)):
                if factor is not None:
                    terms[stream] *= factor
        return cls(credit, mass, sums[_ATTENTION])


def sum_by_lag(
    back: Backward, scratch: Scratch | None = None, left_out: Sequence[Sequence[slice]] | None = None
) -> LagSums:
    """Sweep all blocks of one backward pass for the sums by lag alone; the arguments are those of `sweep`."""
    sums = DiagonalSums.of(back)
    sweep(back, (sums,), scratch, left_out)
    return sums.by_lag(back)


@dataclass(frozen=True)
class DiagonalSums:
    """The sums of an edge, summed along the diagonals of blocks; the largest lag first: index `length - lag`.

    Beyond lag 0 there is room for the masked entries (key after query) of blocks on the diagonal.
    """

    sums: Float[Tensor, "sum *batch head diagonal"]
    length: int
    whole_groups: bool = False

    @classmethod
    def of(cls, back: Backward) -> "DiagonalSums":
        """Start with zeros for all heads of a backward pass."""
        batch, heads, length = back.lse.shape
        diagonals = 1 + length + sum(largest_tile(back))
        return cls(torch.zeros(SUMS, batch, heads, diagonals, dtype=torch.float64, device=back.lse.device), length)

    def start_part(self, heads: int) -> "DiagonalSums":
        """Return sums over no edges, of so many heads of a document."""
        return DiagonalSums(self.sums.new_zeros(SUMS, heads, self.sums.shape[-1]), self.length)

    def add_part_(self, document: int, heads: slice, part: "DiagonalSums") -> None:
        """Add what was summed over some edges of these heads of a document."""
        self.sums[:, document, heads] += part.sums

    def add_(self, blocks: Blocks, operands: Operands, tile: Tile) -> None:
        """Add a block of edges; the block is overwritten."""
        i, j = (slice(None), tile.rows), (slice(None), tile.columns)
        weight, score, credit = blocks.tiles[:3]
        sheared_weight, sheared_score, sheared_credit = blocks.sheared[:3]
        by_diagonal = weight.new_empty(SUMS, len(weight), sheared_weight.shape[-1])
        for stream, (left, right, edge) in enumerate(
            (
                (operands.grad_query, operands.key, score),
                (operands.query, operands.grad_key, score),
                (operands.grad, operands.grad_value, weight),
            )
        ):
            torch.bmm(left[i], right[j].mT, out=credit)
            credit.mul_(edge)
            torch.sum(sheared_credit, 1, out=by_diagonal[stream])
        score.abs_()
        torch.bmm(operands.query_norm[..., tile.rows], sheared_score, out=by_diagonal[_MASS + 1, :, None])
        score.mul_(operands.key_norm[..., tile.columns])
        torch.sum(sheared_score, 1, out=by_diagonal[_MASS])
        # mass of the values and attention in one product
        torch.bmm(operands.readers[..., tile.rows], sheared_weight, out=by_diagonal[_MASS + 2 :].transpose(0, 1))
        first = self.length - tile.lag - tile.shape[0]
        self.sums[..., first : first + by_diagonal.shape[-1]] += by_diagonal

    def by_lag(self, back: Backward) -> LagSums:
        """Return the sums of each lag."""
        return LagSums.of(self.sums[..., 1 : self.length + 1].flip(-1), back)
