"""Which windows decide every number, and how well the sums agree; public in `posterity.stats`."""

import numpy as np
import xarray as xr

from posterity.results.ratios import check_result, describe, sum_over_heads, sum_readers

HEAVY = 10.0  # times the median of the windows' squared gradient norms
ROUNDING = 1e-14  # square of single precision's rounding


@check_result
def window_norms(result: xr.Dataset) -> xr.DataArray:
    """Return the squared norm of each window's gradient, of queries, keys and values over all layers and heads.

    Shares pool windows by it: a window with ten times the norm counts ten times.

    Returns:
        Units nats^2, dims (document, stream).
    """
    credit = sum_over_heads(result, sum_readers(result.credit_by_document, "all"), ()).sum("side", skipna=False)
    return describe(credit, "squared norm of the gradient of one window", "nats^2")


@check_result
def heavy_windows(result: xr.Dataset) -> xr.DataArray:
    """Return the windows whose squared gradient norm, of any stream, is above ten times the median of all windows.

    Returns:
        bool, dims (document).
    """
    norms = window_norms(result)
    return (norms > HEAVY * norms.median("document")).any("stream")


@check_result
def balance(result: xr.Dataset) -> xr.DataArray:
    """Return the largest disagreement between the accounts of the same credit, relative to the layer's credit.

    Compares credit added up by lag with credit by position and with credit by document, head by head. A stream with
    less than `ROUNDING` of its layer's credit has a gradient of 0 to single precision; its disagreement is relative to
    that much of the layer's credit.

    Returns:
        Units 1, dims (layer, stream).
    """
    by_lag = result.credit.sum(("reader_of", "lag"), skipna=False)
    accounts = (
        result.credit_by_position.sum(("side", "position"), skipna=False),
        result.credit_by_document.sum(("document", "reader_of", "side"), skipna=False),
    )
    differences = [sum_over_heads(result, abs(by_lag - account), ("layer",)) for account in accounts]
    largest = xr.where(differences[0] > differences[1], differences[0], differences[1])
    credit = abs(sum_over_heads(result, by_lag, ("layer",)))
    relative = xr.where(largest == 0, 0.0, largest / np.maximum(credit, ROUNDING * credit.sum("stream")))
    return describe(relative, "relative disagreement of the accounts")
