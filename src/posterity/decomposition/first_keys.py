"""Edges into the first keys of each document: what attention sinks take part in, apart from all other edges.

A few keys for every query: their sums by lag need no sweep. Whatever carries weight at the first position, in many
models most of it, would else hide how far other readers look back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity.decomposition.lag_sums import SUMS, LagSums
from posterity.decomposition.price_sums import PriceSums, add_squares_, write_changes_
from posterity.decomposition.sweep import write_edges_
from posterity.ops.attention import Backward
from posterity.ops.heads import repeat_heads
from posterity.ops.mask import Tile
from posterity.ops.precision import dot
from posterity.ops.scores import bias_block

Spans = Sequence[Sequence[slice]]  # of the documents in each row
SINKS = 4  # first positions of a document that are told apart by default
_BLOCK_BYTES = 8e6  # of the sums of all edges of a few queries


@dataclass(frozen=True)
class FirstKeys:
    """The first `number` keys of each document: of each row, padding on its left aside, or of each packed document."""

    number: int
    documents: tuple[tuple[tuple[int, int], ...], ...]  # for each row the first query of a document, and the end

    @classmethod
    def of(cls, back: Backward, number: int, spans: Spans | None = None) -> "FirstKeys":
        """Find the documents of one backward pass; `spans`: of the documents packed into each row."""
        length = back.lse.shape[2]
        if spans is None:
            starts = back.mask.first_columns(length) or [0] * len(back.lse)
            return cls(number, tuple(((start, length),) for start in starts))
        return cls(number, tuple(tuple((span.start, span.stop) for span in row) for row in spans))

    def columns(self) -> list[list[slice]]:
        """Return the first keys of each row's documents."""
        rows = self.documents if self.number else [()] * len(self.documents)
        return [[slice(start, min(start + self.number, stop)) for start, stop in row] for row in rows]

    def edges(self, back: Backward) -> Int[Tensor, "batch lag"]:
        """Count the edges into the first keys by lag, per head; see `Mask.edges`."""
        length, device = back.lse.shape[2], back.lse.device
        return back.mask.edges_into(length, device, self.number, self.documents).expand(len(self.documents), -1)

    @torch.no_grad()
    def sum_by_lag(self, back: Backward, grads: Sequence[Tensor] | None = None) -> LagSums:
        """Sum the edges into the first keys by lag, in float64.

        Args:
            back: A backward pass.
            grads: The gradients (query, key, value) that credit is taken against; None for those of `back` itself.
        """
        batch, heads, length = back.lse.shape
        sums = torch.zeros(SUMS, batch, heads, length, dtype=torch.float64, device=back.lse.device)
        grads = back.total_gradients() if grads is None else grads
        for row, columns in enumerate(self.columns()):
            for keys, (_, stop) in zip(columns, self.documents[row], strict=False):
                operands = _Operands(back, grads, row, keys)
                for tile in self._tiles(back, keys, stop):
                    by_edge = operands.sums(tile)
                    for column in range(keys.stop - keys.start):
                        lag = tile.lag - column
                        skipped = max(-lag, 0)  # queries before the key
                        by_lag = by_edge[..., skipped:, column]
                        sums[:, row, :, lag + skipped : lag + skipped + by_lag.shape[-1]] += by_lag
        return LagSums.of(sums, back)

    def add_squares_(self, back: Backward, sums: PriceSums) -> None:
        """Add what the first keys cost their later readers to the squares of `sums`."""
        for row, columns in enumerate(self.columns()):
            for keys, (_, stop) in zip(columns, self.documents[row], strict=False):
                operands = _Operands(back, back.total_gradients(), row, keys)
                for tile in self._tiles(back, keys, stop):
                    weight, _, capped = operands.edges(tile)
                    change = torch.empty_like(weight)
                    write_changes_(change, weight, capped)
                    change.diagonal(-tile.lag, 1, 2).zero_()  # a position always reads itself
                    add_squares_(sums.squares[row], sums.ends, change, tile)

    def _tiles(self, back: Backward, keys: slice, stop: int) -> Iterator[Tile]:
        """Yield blocks of a document's queries and its first keys."""
        edge_bytes = 8 * SUMS * back.lse.shape[1] * (keys.stop - keys.start)
        height = max(1, int(_BLOCK_BYTES / edge_bytes))
        for top in range(keys.start, stop, height):
            yield Tile(slice(top, min(top + height, stop)), keys, 0, back.mask.plain)


class _Operands:
    """One document's first keys and values, and their gradients, for each query head: (head, key, width)."""

    def __init__(self, back: Backward, grads: Sequence[Tensor], row: int, keys: slice):
        self.back, self.row, self.dtype = back, row, back.lse.dtype
        self.grad_query = grads[0]
        self.key, self.value, self.grad_key, self.grad_value = (
            repeat_heads(x[row : row + 1, :, keys], back.query.shape[1])[0].to(self.dtype)
            for x in (back.key, back.value, *grads[1:])
        )
        self.readers = back.mask.readers(back.query.shape[2])

    def edges(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Return a_ij, ds_ij and, behind a soft-cap, the gradients of the capped scores: (head, query, key) each."""
        back, row = self.back, self.row
        query, grad, output = (x[row, :, tile.rows].to(self.dtype) for x in (back.query, back.grad_output, back.output))
        lse, delta = back.lse[row, :, tile.rows, None], dot(grad, output)[..., None]
        weight = grad.new_empty(*query.shape[:2], self.key.shape[1])
        score = torch.empty_like(weight)
        capped = score if back.softcap is None else torch.empty_like(weight)
        bias = back.bias
        if bias is not None:
            bias = bias_block(bias, tile)
            bias = bias[row if len(bias) > 1 else 0]
        write_edges_(weight, score, (query, grad, lse, delta), (self.key, self.value), back, bias, capped)
        back.mask.fill_(weight, tile, 0.0, row)
        score *= weight
        if capped is not score:
            capped *= weight
        return weight, score, capped

    def sums(self, tile: Tile) -> Float[Tensor, "sum head query key"]:
        """Return what each edge adds: credit and mass of each stream, without the scale, and attention."""
        weight, score, _ = self.edges(tile)
        query, grad, grad_query = (
            x[self.row, :, tile.rows].to(self.dtype) for x in (self.back.query, self.back.grad_output, self.grad_query)
        )
        slope, attention = score.abs(), weight
        if self.readers is not None:
            attention = weight * self.readers[self.row, tile.rows, None]
        by_edge = (
            (grad_query @ self.key.mT) * score,
            (query @ self.grad_key.mT) * score,
            (grad @ self.grad_value.mT) * weight,
            slope * self.key.norm(dim=-1)[:, None],
            slope * query.norm(dim=-1)[..., None],
            weight * grad.norm(dim=-1)[..., None],
            attention,
        )
        return torch.stack(by_edge).double()
