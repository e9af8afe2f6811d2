# pyright: reportIndexIssue=false, reportCallIssue=false
# A kernel is launched by an index, its grid; Triton has no types for it.
"""The sums of the sweep by Triton kernels (kernels/edge_reductions.py): by bin of lags, and for prices.

Products take the inputs' own precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.kernels.edge_reductions import SLOTS, lag_kernel, pair_kernel, window_kernel
from posterity.kernels.tiles import padded
from posterity.ops.attention import Backward
from posterity.ops.block_table import BlockTable
from posterity.ops.fused_kernels import HALF
from posterity.ops.precision import dot, working_dtype
from posterity.ops.triton_attention import precision

_SUMS = 7  # credit of (query, key, value), mass of the same, attention
_PARTS = 64  # programs of a head, at most
_WARPS = 4


@dataclass(frozen=True)
class KernelOperands:
    """The tensors of a backward pass as the kernels read them, and how they are called.

    Attributes:
        back: The backward pass.
        table: The blocks of its mask.
        counted: 1 for keys whose edges are counted, else 0.
    """

    back: Backward
    table: BlockTable
    counted: Float[Tensor, "batch key"]

    @classmethod
    def of(cls, back: Backward, table: BlockTable, left_out: Sequence[Sequence[slice]]) -> "KernelOperands":
        """Prepare a pass; `left_out`: keys whose edges are not counted, for each document of the batch."""
        counted = back.lse.new_ones(len(back.lse), back.key.shape[2])
        for row, columns in zip(counted, left_out, strict=True):
            for keys in columns:
                row[keys] = 0.0
        return cls(back, table, counted)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """q, k, v, do, lse and D."""
        back = self.back
        delta = dot(back.grad_output, back.output)
        return tuple(x.contiguous() for x in (back.query, back.key, back.value, back.grad_output, back.lse, delta))

    def blocks(self, by_column: bool = False) -> tuple:
        """Return the blocks of a table, their edges and what forms scores."""
        lists = self.table.by_column if by_column else self.table.by_row
        return *lists, self.table.edges, self.back.scale, self.back.softcap or 1.0

    def sizes(self, by_column: bool = False) -> tuple[int, ...]:
        """Return length, heads, groups, the strides of tables, the number of lines of blocks, and the widths."""
        _, heads, length, dim = self.back.query.shape
        lines = self.table.count[by_column]
        return length, heads, self.back.key.shape[1], *self.table.strides, lines, dim, self.back.value.shape[3]

    def tile(self) -> tuple[int, ...]:
        """Return the shape of a block, and the padded widths."""
        return *self.table.shape, padded(self.back.query.shape[3]), padded(self.back.value.shape[3])


@torch.no_grad()
def sum_bins(operands: KernelOperands, first: Sequence[int]) -> Float[Tensor, "sum batch head bin"]:
    """Sum all edges by bin of lags, in float64: credit of each stream, mass of each, attention of readers.

    `first`: smallest lag of each bin.
    """
    back, table, device = operands.back, operands.table, operands.back.lse.device
    batch, heads, length = back.lse.shape
    grads = (back.stream_gradient(stream).contiguous() for stream in range(3))
    operand_norms = (x.to(working_dtype(x.dtype)).norm(dim=-1) for x in (back.query, back.key, back.grad_output))
    readers = back.mask.readers(length)
    reader = back.lse.new_ones(batch, length) if readers is None else readers.to(back.lse.dtype).expand(batch, -1)
    bin_first = torch.tensor([*first, length], dtype=torch.int32, device=device)
    bin_of = torch.searchsorted(bin_first, torch.arange(length, device=device), right=True).int() - 1
    bins, parts = padded(len(first)), min(_PARTS, table.count[0])
    sums = torch.empty(batch * heads, parts, SLOTS.value, bins, dtype=torch.float64, device=device)
    factors = back.key_factor, back.value_factor
    *blocks, scale, softcap = operands.blocks()
    lag_kernel[parts, batch * heads](
        *operands.tensors, *grads, *(x.contiguous() for x in operand_norms), reader.contiguous(), operands.counted,
        *(reader if x is None else x.contiguous() for x in factors),
        *blocks, _far_end(table, _far_lag(first, sum(table.shape))), bin_first, bin_of, sums, scale, softcap,
        *operands.sizes(), *operands.tile(), bins, back.softcap is not None, *(x is not None for x in factors),
        precision(back.query.dtype), num_warps=_WARPS, num_stages=1,  # more would spill registers
    )  # fmt: skip
    by_bin = sums.sum(1)[:, :_SUMS, : len(first)].unflatten(0, (batch, heads)).movedim(2, 0)
    by_bin[[0, 1, 3, 4]] *= back.scale
    return by_bin


def sweep_tile_shape(query: Tensor, value: Tensor) -> tuple[int, int]:
    """Return queries and keys of a block, so that what a program holds fits its registers."""
    width = max(query.shape[-1], value.shape[-1])
    return (64, 32) if query.dtype in HALF else (32, 32) if width <= 128 else (16, 16)


def _far_lag(first: Sequence[int], lags: int) -> int:
    """Return the lag from which on so many consecutive lags lie in two bins at most."""
    return max((end for start, end in pairwise(first) if end - start < lags), default=0)


def _far_end(table: BlockTable, far_lag: int) -> Tensor:
    """Return for each row of blocks the entry behind those that hold no smaller lag; nearer blocks follow."""
    (height, width), rows = table.shape, table.count[0]
    start = table.by_row.start
    line = torch.repeat_interleave(start.diff(), output_size=len(table.by_row.other))
    nearest = line % rows * height - table.by_row.other * width - width + 1
    far = torch.cat((start.new_zeros(1), (nearest >= far_lag).cumsum(0).int()))
    return start[:-1] + far[start[1:].long()] - far[start[:-1].long()]


@torch.no_grad()
def square_changes(operands: KernelOperands, ends: Sequence[int]) -> Float[Tensor, "batch group segment key"]:
    """Return the `squares` of `PriceSums`: what leaving out a pair costs its later readers, squared, by segment."""
    back, table, device = operands.back, operands.table, operands.back.lse.device
    batch, length = len(back.lse), back.lse.shape[2]
    groups, segments = back.key.shape[1], len(ends)
    squares = torch.empty(batch, groups, segments, length, dtype=torch.float64, device=device)
    bounds = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    pair_kernel[table.count[1], batch * groups](
        *operands.tensors, operands.counted, bounds, squares, *operands.blocks(True), *operands.sizes(True), segments,
        *operands.tile(), padded(segments), back.softcap is not None,
        1 - torch.finfo(back.lse.dtype).eps, precision(back.query.dtype), num_warps=_WARPS,
    )  # fmt: skip
    return squares


@torch.no_grad()
def sum_octaves(operands: KernelOperands, octaves: int) -> Float[Tensor, "two batch head octave query"]:
    """Return `beyond` of `PriceSums`: attention and ds_ij of each query, by octave of lags."""
    back, table = operands.back, operands.table
    batch, heads, length = back.lse.shape
    beyond = back.lse.new_zeros(2, batch, heads, octaves, length)
    if octaves:
        window_kernel[table.count[0], batch * heads](
            *operands.tensors, operands.counted, beyond[0], beyond[1], *operands.blocks(), *operands.sizes(), octaves,
            *operands.tile(), padded(octaves), back.softcap is not None, precision(back.query.dtype), num_warps=_WARPS,
        )  # fmt: skip
    return beyond
