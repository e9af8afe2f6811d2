"""Sums over documents, their ratios and standard errors: what every statistic of a result is made of."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import xarray as xr

from posterity.axes import READER_OF
from posterity.errors import InputError
from posterity.results.netcdf import portable_value

P = ParamSpec("P")
T = TypeVar("T")
MIN_WINDOWS = 3  # below it no error is worth printing
ENOUGH_WINDOWS = 8  # from here on the standard error stands for itself
_LOSSES = "losses=True (--losses)"
_PRICES = 'prices="text" (--prices text)'
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
    "reader_lag": "posterity.inspect (posterity inspect)",
    "reader_lag_all": "posterity.inspect (posterity inspect)",
    "inspect_credit": "posterity.inspect (posterity inspect --text ...)",
    "tail_moment": "this version of posterity",
    "price_by_document": _PRICES,
    "window_price": _PRICES,
    "window_price_by_document": _PRICES,
    "horizon_by_document": "horizons=(1, 2, 4, 8) (--horizons 1,2,4,8)",
}


def check_result(function: Callable[P, T]) -> Callable[P, T]:
    """Let a statistic refuse in one line what is no result: InputError where its first argument is none."""

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        result = args[0] if args else kwargs.get("result")
        kind = portable_value(getattr(result, "attrs", {}).get("kind"))
        if kind or not isinstance(result, xr.Dataset):
            came = f"one of the kind {kind!r}" if kind else type(result).__name__
            raise InputError(
                f"stats.{function.__name__} expects a result of posterity.measure; got {came}: open its file with "
                "posterity.load"
            )
        return function(*args, **kwargs)

    return checked


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


def confidence(error: Any, windows: int) -> Any:
    """Return the half width of the 95 % confidence interval by Student's t, with windows - 1 degrees of freedom.

    Args:
        error: Standard errors over windows (or other independent parts), a number or an array.
        windows: How many windows they are taken over.

    Returns:
        error * t, in the units and with the labels of the errors: t is 12.7 for two windows, 3.2 for four, 2.4 for
        eight and 1.96 for very many. NaN for one window.

    Raises:
        InputError: Fewer than one window.
    """
    if windows < 1:
        raise InputError(f"expected at least one window; got {windows}: pass the size of the dimension 'document'")
    return error * (_t_quantile(int(windows) - 1) if windows > 1 else math.nan)


def uncertainty(error: Any, windows: int) -> Any:
    """Return what tables and pages print behind the ±.

    The standard error from 8 windows on. From 3 to 7 windows, whose standard errors look more precise than they are,
    the half width of the 95 % interval (`confidence`). For fewer NaN: no error is worth printing.

    Args:
        error: Standard errors over windows (or other independent parts), a number or an array.
        windows: How many windows they are taken over.

    Returns:
        The same units and labels as the errors.
    """
    if windows >= ENOUGH_WINDOWS:
        return error
    return confidence(error, windows) if windows >= MIN_WINDOWS else error * math.nan


@lru_cache
def _t_quantile(freedom: int) -> float:
    """Return the number within which Student's t lies, in absolute value, with a probability of 0.95.

    By bisection of the probability in closed form for whole degrees of freedom (Abramowitz and Stegun, Handbook of
    Mathematical Functions, 26.7.3 and 26.7.4).
    """

    odd = freedom % 2

    def probability(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        term = math.cos(angle) if odd else 1.0
        total = term if freedom > 1 else 0.0
        for power in range(2 + odd, freedom - 1, 2):
            term *= (power - 1) / power * math.cos(angle) ** 2
            total += term
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 1.0, 13.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if probability(middle) < 0.95 else (low, middle)
    return high


@check_result
def existing_heads(result: xr.Dataset) -> xr.DataArray:
    """Return the heads that each layer has, as layers may differ in their number of heads.

    Returns:
        bool, dims (layer, head).
    """
    return result.credit.notnull().any(("stream", "reader_of", "lag"))


@check_result
def has_reader_axis(result: xr.Dataset) -> bool:
    """Tell whether a result keeps the edges into the first keys of a document apart from all others.

    Returns:
        False for a file of an earlier version.
    """
    return set(READER_OF) <= set(result.reader_of.values)


def has_fine_lags(result: xr.Dataset) -> bool:
    """Return whether the bins of lags are fine enough to say where in them something lies."""
    return not bool((result.lag_end - result.lag > np.maximum(result.lag, 1)).any())


def require_lags(result: xr.Dataset) -> None:
    """Raise InputError unless the bins of lags are fine enough (`has_fine_lags`)."""
    if not has_fine_lags(result):
        raise InputError(
            'expected a result by lag, which was not measured: measure with lags="octaves" (--lags octaves)'
        )


def sum_readers(values: xr.DataArray, reader_of: str) -> xr.DataArray:
    """Sum over edges by their key: all, those into the first keys of a document, or the rest.

    Raises:
        InputError: `reader_of` is none of these, or the result does not tell them apart.
    """
    if reader_of not in ("all", *READER_OF):
        raise InputError(f"reader_of expects 'all', {' or '.join(map(repr, READER_OF))}; got {reader_of!r}")
    if reader_of == "all":
        return values.sum("reader_of", skipna=False)
    if reader_of not in values.reader_of.values:
        raise InputError(
            f"expected a result that tells first keys apart, for reader_of={reader_of!r}; this file of an earlier "
            "version does not: measure again"
        )
    return values.sel(reader_of=reader_of, drop=True)


def required_variable(result: xr.Dataset, name: str) -> xr.DataArray:
    """Return a variable that only some results have.

    Raises:
        InputError: This one was measured without it.
    """
    if name not in result:
        raise InputError(f"expected a result with {name!r}, which was not measured: measure with {OPTIONS[name]}")
    return result[name]


def sum_over_heads(result: xr.Dataset, values: xr.DataArray, by: Sequence[str]) -> xr.DataArray:
    """Sum over layers and heads except `by`. A head that the layer has not counts nothing; any other NaN stays NaN.

    By "kv_head" the query heads of each key/value head are added up.
    """
    dims = [dim for dim in layer_and_head_dims(values, by) if dim not in by]
    if dims and "head" in values.dims:
        values = values.where(existing_heads(result), 0.0)
    if "kv_head" in by:
        groups, order = _group_members(result), ["kv_head" if dim == "head" else dim for dim in values.dims]
        values = (values * groups).sum("head", skipna=False).transpose(*order)
        dims.remove("head")
        if "layer" in by:
            values = values.where(groups.any("head"))
    return values.sum(dims, skipna=False)


def _group_members(result: xr.Dataset) -> xr.DataArray:
    """Return which query heads belong to each key/value head: bool, dims (layer, head, kv_head)."""
    if "kv_head" not in result:
        raise InputError(
            "expected a result with the key/value head of each head; an earlier version left it out: measure again"
        )
    numbers = np.arange(int(result.kv_head.max()) + 1)
    return result.kv_head.drop_vars("kv_head") == xr.DataArray(numbers, {"kv_head": numbers}, "kv_head")


def layer_and_head_dims(values: xr.DataArray, by: Sequence[str]) -> list[str]:
    """Return those of "layer" and "head" that the values have; raise InputError if `by` names anything else."""
    dims = [dim for dim in ("layer", "head") if dim in values.dims]
    names = [*dims, *["kv_head"] * ("head" in dims)]
    if isinstance(by, str) or not set(by) <= set(names) or {"head", "kv_head"} <= set(by):
        raise InputError(f"by expects a sequence of {' and '.join(map(repr, names))} or of fewer of them; got {by!r}")
    return dims


def describe(values: xr.DataArray, long_name: str, units: str = "1") -> xr.DataArray:
    """Return the values with this name and these units alone in their attributes."""
    return values.drop_attrs(deep=False).assign_attrs(units=units, long_name=long_name)
