"""Bins of lags and positions: their edges and names, and where they stand on an axis of number + 1 with a log scale."""

import numpy as np
import xarray as xr

EXACT = 16  # positions that have a bin of their own; the rest is binned by quarter octaves, as lags are


def position_bins(result: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last position of each bin, made of whole bins of the result."""
    length = int(result.position_end[-1]) + 1
    octaves = (round(EXACT * 2 ** (step / 4)) for step in range(4 * max(length.bit_length(), 1)))
    first = np.intersect1d([*range(EXACT), *octaves], result.position.values)
    return first, np.append(first[1:] - 1, length - 1)


def sum_positions(values: np.ndarray, result: xr.Dataset, axis: int = -1) -> np.ndarray:
    """Add up, along one axis, the positions of each bin of `position_bins`."""
    first, _ = position_bins(result)
    return np.add.reduceat(values, np.searchsorted(result.position.values, first), axis=axis)


def bin_names(first: np.ndarray, last: np.ndarray) -> list[str]:
    """Name each bin by its numbers: "3", "16–18"."""
    pairs = zip(first.tolist(), last.tolist(), strict=True)
    return [str(low) if low == high else f"{low}–{high}" for low, high in pairs]


def bin_middles(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the geometric middle of each bin, which covers first + 1 to last + 2 on the axis."""
    return np.sqrt((first + 1) * (last + 2.0))


def doublings(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the width of each bin in doublings of number + 1."""
    return np.log2((last + 2) / (first + 1))


def single_shares(share: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the share of one number of each bin, for a log scale.

    NaN where it is below a thousandth of an even part: zero, negative or rounding.
    """
    density = share / (last - first + 1)
    return np.where(density > 1e-3 / (last[-1] + 1), density, np.nan)
