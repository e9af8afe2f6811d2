"""Bins of lags and positions: their edges and names, and where they stand on an axis of number + 1 with a log scale."""

import numpy as np

EXACT = 16  # positions that have a bin of their own; the rest is binned by quarter octaves, as lags are


def position_bins(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last position of each bin."""
    octaves = (round(EXACT * 2 ** (step / 4)) for step in range(4 * max(length.bit_length(), 1)))
    first = np.array([*range(min(EXACT, length)), *(edge for edge in octaves if edge < length)])
    return first, np.append(first[1:] - 1, length - 1)


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
