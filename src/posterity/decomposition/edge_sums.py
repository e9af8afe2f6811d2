"""Sums over all edges of a backward pass: by Triton kernels where they apply, else by the sweep of blocks (sweep.py).

Both give the same numbers to rounding; the kernels take the products in the inputs' own precision.
"""

from collections.abc import Sequence

from torch import Tensor

from posterity.decomposition.bins import Bins
from posterity.decomposition.lag_sums import DiagonalSums
from posterity.decomposition.price_sums import PriceSums, octaves
from posterity.decomposition.sweep import Scratch, sweep
from posterity.ops.attention import Backward
from posterity.ops.block_kernels import kernel_table, report_refusal
from posterity.ops.block_table import BlockTable

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
    by_bin = None if bins is None else _kernel_bins(back, bins, left_out)
    priced = None if ends is None else _kernel_prices(back, ends, left_out)
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
    return "blocks" if _table(back, bins) is None else "triton"


def _table(back: Backward, bins: Bins | None = None) -> BlockTable | None:
    """Return the blocks of a mask for the kernels; None where they do not apply, or not to so many bins."""
    shape = None if triton_sums is None else triton_sums.sweep_tile_shape(back.query, back.value)
    table = kernel_table(back.query, back.key, back.value, back, shape)
    if table is not None and bins is not None and len(bins.first) > _MOST_BINS:
        report_refusal(back.query, f"they sum at most {_MOST_BINS} bins of lags, not {len(bins.first)}")
        return None
    return table


def _kernel_bins(back: Backward, bins: Bins, left_out: Sequence[Sequence[slice]]) -> BinSums | None:
    table = _table(back, bins)
    if table is None or triton_sums is None:
        return None
    sums = triton_sums.sum_bins(back, table, bins.first, left_out)
    return sums[:3].movedim(0, 2), sums[3:6].movedim(0, 2), sums[6]


def _kernel_prices(back: Backward, ends: Sequence[int], left_out: Sequence[Sequence[slice]]) -> PriceSums | None:
    table = _table(back)
    if table is None or triton_sums is None:
        return None
    if table.heads > 1:
        report_refusal(back.query, "the heads of a layer have masks of their own, under which kernels price no pairs")
        return None
    squares = triton_sums.square_changes(back, table, ends, left_out)
    return PriceSums(squares, triton_sums.sum_octaves(back, table, octaves(back.lse.shape[2]), left_out), tuple(ends))
