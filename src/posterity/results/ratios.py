"""Sums over documents, their ratios and standard errors: what every statistic of a result is made of."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from posterity.errors import InputError

_LOSSES = "losses=True (--losses)"
OPTIONS = {  # of `posterity.measure`, by the variable that needs it
    "weight_by_document": "weights=True (--weights)",
    "weight_mean": "weights=True (--weights)",
    "adapter_by_document": "weights=True (--weights) a model with adapters",
    "adapter_mean": "weights=True (--weights) a model with adapters",
    "loss_credit": _LOSSES,
    "loss_gram": _LOSSES,
    "loss_credit_by_document": _LOSSES,
    "hidden_by_document": _LOSSES,
    "parameter_by_document": "parameters=True (--parameters)",
    "inspect_credit": "posterity.inspect (posterity inspect --text ...)",
    "horizon_by_document": "horizons=(1, 2, 4, 8) (--horizons 1,2,4,8)",
}


def ratio(part: xr.DataArray, total: xr.DataArray) -> xr.Dataset:
    """Return the ratio of two sums over documents and its standard error.

    share = sum_d x_d / sum_d T_d. With the residuals e_d = x_d - share T_d, the error is
    sqrt(n/(n-1) sum_d e_d^2) / |sum_d T_d| (Cochran, Sampling Techniques, 1977, section 2.11).

    Args:
        part: x_d, with a dimension `document`.
        total: T_d, with a dimension `document`.

    Returns:
        `share` and `error`, units 1; dims of both arrays without `document`. The error is NaN for one document.
    """
    documents = total.sizes["document"]
    denominator = total.sum("document", skipna=False)
    share = part.sum("document", skipna=False) / denominator
    residual = part - share * total
    spread = documents / (documents - 1) if documents > 1 else math.nan
    error = (spread * (residual**2).sum("document", skipna=False)) ** 0.5 / abs(denominator)
    return xr.Dataset({"share": describe(share, "share"), "error": describe(error, "standard error over documents")})


def mean_and_error(values: Any, axis: int = 0) -> tuple[Any, Any]:
    """Return the mean over documents and its standard error, as numpy arrays in float64.

    Args:
        values: What numpy makes an array of, in any units.
        axis: The axis of the documents.

    Returns:
        Mean, and the square root of the sample variance over the number of documents; both without that axis. The error
        is NaN for one document.
    """
    values = np.asarray(values, dtype=float)
    number = values.shape[axis]
    error = values.std(axis, ddof=1) / math.sqrt(number) if number > 1 else np.full_like(values.mean(axis), math.nan)
    return values.mean(axis), error


def existing_heads(result: xr.Dataset) -> xr.DataArray:
    """Return the heads that each layer has, as layers may differ in their number of heads.

    Returns:
        bool, dims (layer, head).
    """
    return result.credit.notnull().any(("stream", "lag"))


def required_variable(result: xr.Dataset, name: str) -> xr.DataArray:
    """Return a variable that only some results have.

    Raises:
        InputError: This one was measured without it.
    """
    if name not in result:
        raise InputError(f"expected a result with {name!r}, which was not measured: measure with {OPTIONS[name]}")
    return result[name]


def sum_over_heads(result: xr.Dataset, values: xr.DataArray, by: Sequence[str]) -> xr.DataArray:
    """Sum over layers and heads except `by`. A head that the layer has not counts nothing; any other NaN stays NaN."""
    dims = [dim for dim in layer_and_head_dims(values, by) if dim not in by]
    if dims and "head" in values.dims:
        values = values.where(existing_heads(result), 0.0)
    return values.sum(dims, skipna=False)


def layer_and_head_dims(values: xr.DataArray, by: Sequence[str]) -> list[str]:
    """Return those of "layer" and "head" that the values have; raise InputError if `by` names anything else."""
    dims = [dim for dim in ("layer", "head") if dim in values.dims]
    if isinstance(by, str) or not set(by) <= set(dims):
        raise InputError(f"by expects a sequence of {' and '.join(map(repr, dims))} or of fewer of them; got {by!r}")
    return dims


def describe(values: xr.DataArray, long_name: str, units: str = "1") -> xr.DataArray:
    """Return the values with this name and these units alone in their attributes."""
    return values.drop_attrs(deep=False).assign_attrs(units=units, long_name=long_name)
