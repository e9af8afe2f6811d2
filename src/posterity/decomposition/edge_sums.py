"""Sums over all edges of a backward pass: by Triton kernels where they apply, else by the sweep of blocks (sweep.py).

Both give the same numbers to rounding; the kernels take the products in the inputs' own precision.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from posterity.decomposition.bins import Bins
from posterity.decomposition.lag_sums import DiagonalSums
from posterity.decomposition.price_sums import PriceSums, octaves
from posterity.decomposition.sweep import Scratch, sweep
from posterity.ops.attention import Backward
from posterity.ops.block_kernels import kernel_table, report_refusal
from posterity.ops.block_table import BlockTable

if TYPE_CHECKING:
    from posterity.decomposition.triton_sums import KernelOperands
try:
    from posterity.decomposition import triton_sums
except ImportError:  # no Triton
    triton_sums = None

BinSums = tuple[Tensor, Tensor, Tensor]  # credit, mass (batch, head, stream, bin) and attention (batch, head, bin)
_MOST_BINS = 256  # that a kernel keeps at once


def sum_edges(
    back: Backward,
    bins: Bins | None,
    ends: Sequence[int] | None,
    left_out: Sequence[Sequence[slice]],
    scratch: Scratch | None = None,
) -> tuple[BinSums | None, PriceSums | None]:
    """Sum all edges of a backward pass by bin of lags, and for prices.

    Args:
        back: The backward pass.
        bins: Of lags; None for no sums by lag.
        ends: Of the segments of readers that price a pair; None for no sums for prices.
        left_out: Keys whose edges are not counted, for each document of the batch.
        scratch: Keeps memory between calls.
    """
    operands = None if bins is None and ends is None else _operands(back, left_out)
    by_bin = None if bins is None else _kernel_bins(operands, bins)
    priced = None if ends is None else _kernel_prices(operands, ends)
    prices = PriceSums.of(back, ends) if ends is not None and priced is None else None
    diagonals = DiagonalSums.of(back) if bins is not None and by_bin is None else None
    sums = [x for x in (prices, diagonals) if x is not None]
    if sums:
        sweep(back, sums, scratch, left_out)
    if diagonals is not None and bins is not None:
        lags = diagonals.by_lag(back)
        by_bin = bins.sum(lags.credit).movedim(0, 2), bins.sum(lags.mass).movedim(0, 2), bins.sum(lags.attention)
    return by_bin, prices if priced is None else priced


def sweep_path(back: Backward, bins: Bins) -> str:
    """Return what sums the edges of a pass by lag: "none", "triton" or "blocks"."""
    if not bins.needs_sweep:
        return "none"
    return "blocks" if _table(back) is None or _has_too_many(bins, back) else "triton"


def _table(back: Backward) -> BlockTable | None:
    """Return the blocks of a mask for the kernels; None where they do not apply."""
    shape = None if triton_sums is None else triton_sums.sweep_tile_shape(back.query, back.value)
    return kernel_table(back.query, back.key, back.value, back, shape)


def _has_too_many(bins: Bins, back: Backward) -> bool:
    """Return whether there are more bins than a kernel keeps, and report it."""
    if len(bins.first) <= _MOST_BINS:
        return False
    report_refusal(back.query, f"they sum at most {_MOST_BINS} bins of lags, not {len(bins.first)}")
    return True


def _operands(back: Backward, left_out: Sequence[Sequence[slice]]) -> "KernelOperands | None":
    table = _table(back)
    return None if table is None or triton_sums is None else triton_sums.KernelOperands.of(back, table, left_out)


def _kernel_bins(operands: "KernelOperands | None", bins: Bins) -> BinSums | None:
    if operands is None or triton_sums is None or _has_too_many(bins, operands.back):
        return None
    sums = triton_sums.sum_bins(operands, bins.first)
    return sums[:3].movedim(0, 2), sums[3:6].movedim(0, 2), sums[6]


def _kernel_prices(operands: "KernelOperands | None", ends: Sequence[int]) -> PriceSums | None:
    if operands is None or triton_sums is None:
        return None
    if operands.table.heads > 1:
        reason = "the heads of a layer have masks of their own, under which kernels price no pairs"
        report_refusal(operands.back.query, reason)
        return None
    beyond = triton_sums.sum_octaves(operands, octaves(operands.back.lse.shape[2]))
    return PriceSums(triton_sums.square_changes(operands, ends), beyond, tuple(ends))
