"""Between the ends of a bin of lags: its credit, attention or mass is taken as evenly spread over its lags."""

from typing import Any

import numpy as np

SLACK = 1e-9  # of a lag, for rounding


def lag_at_share(level: float, before: Any, after: Any, first: Any, last: Any) -> np.ndarray:
    """Return the smallest lag of a bin within which the shares, added up from lag 0, reach a level.

    Args:
        level: A share, units 1.
        before: The shares of all earlier bins together, an array of any shape.
        after: The same with this bin.
        first: The first lag of the bin, in tokens.
        last: Its last lag.

    Returns:
        Whole lags in tokens, in the shape of the arrays; the first or the last lag of the bin where the level is not
        between `before` and `after`.
    """
    width = last - first + 1
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.clip((level - before) / (after - before), 0, 1)
    return first + np.clip(np.ceil(fraction * width - SLACK), 1, width) - 1


def share_at_lag(lag: np.ndarray, within: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the share of all lags up to each of some lags: the inverse of `lag_at_share`.

    Args:
        lag: Lags in tokens, any shape; NaN gives NaN.
        within: The share of all lags up to the last one of each bin, units 1, (bin,).
        first: The first lag of each bin, (bin,).
        last: The last lag of each bin, (bin,).

    Returns:
        Units 1, in the shape of `lag`.
    """
    share = np.interp(lag, np.append(first[0] - 1, last), np.append(0.0, within))
    return np.where(np.isnan(lag), np.nan, share)
