"""Shares of a result with their standard errors, as labelled arrays: public as `posterity.stats`.

    result = posterity.load("run.nc")
    posterity.stats.shares(result, by=["layer"]).share.sel(side="other", stream="value")

A result holds sums and counts only. Every ratio is formed here, once, after all sums; its standard error is taken over
the windows of text (dimension `document`). Shares have units "1" and sum to one over the labels that they compare.
`by` names the dimensions that are kept, "layer" and "head"; all others are summed over, so that () gives one number for
the model. A `by` that the sums do not have raises InputError. NaN marks a head that a layer does not have, and what was
not measured.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from posterity.axes import LOSS_TERMS, PAIRS, PARTS, TERMS
from posterity.errors import InputError

__all__ = [
    "angles",
    "attention_first",
    "attention_profile",
    "balance",
    "counts",
    "effective_horizon",
    "existing_heads",
    "first_position",
    "hidden_shares",
    "horizon_curve",
    "loss_parts",
    "loss_shares",
    "loss_shares_by_position",
    "mean_and_error",
    "median_lag",
    "parameter_shares",
    "profile",
    "ratio",
    "shares",
    "weak_heads",
    "weight_shares",
]

MIN_CREDIT = 0.1  # of an equal part of the layer's credit, below which a head's share is not reported
MAX_ERROR = 0.25  # standard error of a self share, above which a head's share is not reported
ROUNDING = 1e-14  # square of single precision's rounding
_LOSSES = "losses=True (--losses)"
OPTIONS = {  # of `posterity.measure`, by the variable that needs it
    "weight_by_document": "weights=True (--weights)",
    "weight_mean": "weights=True (--weights)",
    "loss_credit": _LOSSES,
    "loss_gram": _LOSSES,
    "loss_credit_by_document": _LOSSES,
    "hidden_by_document": _LOSSES,
    "parameter_by_document": "parameters=True (--parameters)",
    "horizon_by_document": "horizons=(1, 2, 4, 8) (--horizons 1,2,4,8)",
}


def __dir__() -> list[str]:
    """List the public functions, for tab completion."""
    return __all__


# ---- ratios and means, with errors over documents


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
    return xr.Dataset({"share": _describe(share, "share"), "error": _describe(error, "standard error over documents")})


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


# ---- credit by side, by lag and by position


def shares(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Return the share of the credit that the self edge and all other edges have.

    Args:
        result: A result of `posterity.measure`.
        by: Any of "layer" and "head".

    Returns:
        `share` and `error`, units 1, dims (*by, stream, side).
    """
    credit = _sum(result, result.credit_by_document, by)
    return ratio(credit, credit.sum("side", skipna=False))


def profile(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Return the share of the credit by lag, beside what counting edges predicts.

    Args:
        result: A result of `posterity.measure`.
        by: () or ("layer",): credit by window and lag is kept for all heads together.

    Returns:
        `share`, `error`: units 1, dims (*by, stream, lag).
        `counted`: the share of the edges, units 1, dims (*by, lag); see `counts`.
        `premium`: share / counted, units 1, dims (*by, stream, lag).
        `width`: lags in the bin, units tokens, dims (lag); share / width is the density per lag.
    """
    credit = _sum(result, result.profile_by_document, by)
    lag_shares = ratio(credit, credit.sum("lag", skipna=False))
    counted = counts(result, by)
    premium = _describe(lag_shares.share / counted, "share over the share of the edges")
    width = _describe(result.lag_end - result.lag + 1, "lags in the bin", "tokens")
    return lag_shares.assign(counted=counted, premium=premium, width=width)


def counts(result: xr.Dataset, by: Sequence[str] = ()) -> xr.DataArray:
    """Return the share of the edges by lag, which is what counting alone predicts for the credit.

    Args:
        result: A result of `posterity.measure`.
        by: () or ("layer",). Over layers, each measured head counts its layer's edges once.

    Returns:
        Units 1, dims (*by, lag).
    """
    _dims_of_heads(result.edges, by)
    edges = result.edges if "layer" in by else (result.edges * existing_heads(result).sum("head")).sum("layer")
    return _describe(edges / edges.sum("lag"), "share of the edges")


def attention_profile(result: xr.Dataset, by: Sequence[str] = ()) -> xr.DataArray:
    """Return the share of the attention weights by lag.

    Args:
        result: A result of `posterity.measure`.
        by: Any of "layer" and "head".

    Returns:
        Units 1, dims (*by, lag); NaN where the weights were not measured (lags="self").
    """
    attention = _sum(result, result.attention, by)
    return _describe(attention / attention.sum("lag", skipna=False), "share of the attention weights")


def median_lag(share: xr.DataArray) -> xr.DataArray:
    """Return the smallest lag at which shares, added up from lag 0, first reach one half.

    Credit can be negative in a bin, so that the sum can fall again later: the first crossing counts. Within a bin the
    credit is taken as evenly spread over its lags.

    Args:
        share: Shares with a dimension `lag` and its coordinates `lag` and `lag_end`: `profile(...).share` or `counts`.

    Returns:
        Units tokens, dims without `lag`. NaN where a share is NaN, or where the bin of the crossing is wider than its
        own first lag (as with lags="self"), so that the place of the crossing in it is not known.
    """
    share = share.transpose(..., "lag")
    lag, width = share.lag.values, share.lag_end.values - share.lag.values + 1
    values = share.values
    total = np.cumsum(values, axis=-1)
    crossed = total >= 0.5
    index = crossed.argmax(axis=-1)
    total_at, share_at = (np.take_along_axis(x, index[..., None], axis=-1)[..., 0] for x in (total, values))
    valid = crossed.any(axis=-1) & ~np.isnan(values).any(axis=-1) & (width[index] <= np.maximum(lag[index], 1))
    fraction = (0.5 - (total_at - share_at)) / np.where(valid, share_at, 1.0)
    median = lag[index] + np.clip(np.ceil(np.where(valid, fraction, 1.0) * width[index] - 1e-9), 1, width[index]) - 1
    median = np.where(valid, median, math.nan)
    return _describe(share.isel(lag=0, drop=True).copy(data=median), "median lag", "tokens")


def first_position(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Return the share of the credit that lies at position 0.

    Args:
        result: A result of `posterity.measure`.
        by: Any of "layer" and "head".

    Returns:
        `share` and `error`, units 1, dims (*by, stream).
    """
    credit = _sum(result, result.credit_by_document, by).sum("side", skipna=False)
    return ratio(_sum(result, result.first_by_document, by), credit)


def attention_first(result: xr.Dataset, by: Sequence[str] = ()) -> xr.DataArray:
    """Return the mean attention weight on the first key, over heads and queries (as many as edges of lag 0).

    Args:
        result: A result of `posterity.measure`.
        by: Any of "layer" and "head".

    Returns:
        Units 1, dims (*by).
    """
    queries = result.edges.isel(lag=0, drop=True) * existing_heads(result)
    weight = _sum(result, result.attention_first, by) / _sum(result, queries, by)
    return _describe(weight, "mean attention weight on the first key")


# ---- gradients of the weights


def weight_shares(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Return the share of the self part in the gradients of W_Q, W_K and W_V, and how well the windows agree.

    Args:
        result: A result of `posterity.measure`.
        by: () or ("layer",).

    Returns:
        `share`, `error`: inner product of the self part with the whole over the squared norm of one window's gradient,
        all windows pooled; units 1, dims (*by, stream).
        `share_mean`: the same for the gradient averaged over the windows; units 1, dims (*by, stream).
        `agreement`: mean inner product of the gradients of two different windows over the mean squared norm, for the
        self part, the other part and the whole; unbiased, 1 if all windows agree, about 0 if none do, NaN for one
        window; units 1, dims (*by, stream, part).

    Raises:
        InputError: The result has no gradients of the weights.
    """
    single, mean = (_sum(result, _measured(result, name), by) for name in ("weight_by_document", "weight_mean"))
    documents = result.sizes["document"]
    single_parts, mean_parts = _weight_parts(single), _weight_parts(mean)
    norms = single_parts.sum("document", skipna=False)
    agreement = (documents**2 * mean_parts - norms) / ((documents - 1 if documents > 1 else math.nan) * norms)
    self_shares = ratio(_self_part(single), single_parts.sel(part="whole", drop=True))
    share_mean = _self_part(mean) / mean_parts.sel(part="whole", drop=True)
    return self_shares.assign(
        share_mean=_describe(share_mean, "share in the mean gradient"),
        agreement=_describe(agreement.transpose(..., "part"), "agreement of the windows"),
    )


# ---- own and later losses


def loss_shares(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Return the share of the credit of keys and values that comes from the own loss and from later losses.

    Args:
        result: A result of `posterity.measure` with `losses=True`.
        by: Any of "layer" and "head".

    Returns:
        `share` and `error`, units 1, dims (*by, written, part). The parts: own loss; later losses through the self
        edge; later losses through the edges of later queries.

    Raises:
        InputError: The result has no split by losses.
    """
    credit = _sum(result, _measured(result, "loss_credit_by_document"), by)
    return ratio(credit, credit.sum("part", skipna=False))


def loss_shares_by_position(result: xr.Dataset) -> xr.DataArray:
    """Return the share of the whole credit of keys (values) by part and position, over all layers and heads.

    Returns:
        Units 1, dims (written, part, position); the parts of `loss_shares`.

    Raises:
        InputError: The result has no split by losses.
    """
    credit = _sum(result, _measured(result, "loss_credit"), ())
    return _describe(credit / credit.sum(("part", "position"), skipna=False), "share of the credit")


def loss_parts(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Return the norms of the three parts of `loss_shares`, and the cosines between them, over positions and windows.

    Args:
        result: A result of `posterity.measure` with `losses=True`.
        by: Any of "layer" and "head".

    Returns:
        `norm`: root of the summed squared norms, units nats, dims (*by, written, part).
        `cosine`: 1 where two parts point the same way, units 1, dims (*by, written, pair).

    Raises:
        InputError: The result has no split by losses.
    """
    gram = _sum(result, _measured(result, "loss_gram"), by).sum("position", skipna=False)
    squared = {part: gram.sel(pair=part, drop=True) for part in PARTS}
    norm = xr.concat([squared[part] ** 0.5 for part in PARTS], xr.Variable("part", list(PARTS)))
    pairs = [pair for pair in PAIRS if " . " in pair]
    cosines = []
    for pair in pairs:
        first, second = pair.split(" . ")
        cosines.append(gram.sel(pair=pair, drop=True) / (squared[first] * squared[second]) ** 0.5)
    cosine = xr.concat(cosines, xr.Variable("pair", pairs))
    return xr.Dataset(
        {
            "norm": _describe(norm.transpose(..., "part"), "norm of a part", "nats"),
            "cosine": _describe(cosine.transpose(..., "pair"), "cosine between two parts"),
        }
    )


def hidden_shares(result: xr.Dataset) -> xr.Dataset:
    """Return the share of the own loss in the gradient of the hidden state at each layer's input.

    Returns:
        `share`, `error`: inner product of the own part with the whole over the squared norm, units 1, dims (layer).
        `cosine`: between the parts of the own and of the later losses, units 1, dims (layer).
        NaN where a layer's input was not observed.

    Raises:
        InputError: The result has no split by losses.
    """
    return _own_shares(_measured(result, "hidden_by_document"))


def parameter_shares(result: xr.Dataset) -> xr.Dataset:
    """Return the share of the own loss in the gradient of each module's parameters.

    Returns:
        `share`, `error` and `cosine` as in `hidden_shares`, dims (parameter).

    Raises:
        InputError: The result has no split of the parameters' gradients.
    """
    return _own_shares(_measured(result, "parameter_by_document"))


def angles(result: xr.Dataset) -> xr.Dataset:
    """Return the angle between the gradients of the own and of the later losses, over all windows.

    Returns:
        `layer_hidden`: at each layer's input, units degrees, dims (layer).
        `hidden`: at all layers' inputs together, units degrees, no dims.
        `parameters`: of all parameters, units degrees, no dims; only if they were measured.

    Raises:
        InputError: The result has no split by losses.
    """
    cosines = {"layer_hidden": hidden_shares(result).cosine}
    cosines["hidden"] = _own_shares(_measured(result, "hidden_by_document").sum("layer", skipna=False)).cosine
    if "parameter_by_document" in result:
        cosines["parameters"] = _own_shares(result.parameter_by_document.sum("parameter", skipna=False)).cosine
    return xr.Dataset(
        {
            name: _describe(np.degrees(np.arccos(cosine.clip(-1, 1))), "angle", "degrees")
            for name, cosine in cosines.items()
        }
    )


def horizon_curve(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Return the share of the credit that remains when later losses are discounted at the rate 1 - 1/h a token.

    Args:
        result: A result of `posterity.measure` with `horizons`.
        by: Any of "layer" and "head".

    Returns:
        `share` and `error`, units 1, dims (*by, stream, horizon).

    Raises:
        InputError: The result has no horizons.
    """
    credit = _sum(result, result.credit_by_document, by).sum("side", skipna=False)
    return ratio(_sum(result, _measured(result, "horizon_by_document"), by), credit)


def effective_horizon(result: xr.Dataset, by: Sequence[str] = ()) -> xr.DataArray:
    """Return the horizon h at which the horizon curve first reaches one half.

    Between two measured horizons the curve is taken as linear in log h.

    Args:
        result: A result of `posterity.measure` with `horizons`.
        by: Any of "layer" and "head".

    Returns:
        Units tokens, dims (*by, stream). Where the smallest horizon gives one half or more, that horizon (an upper
        bound); where the largest gives less, infinity; NaN where the curve is not known.

    Raises:
        InputError: The result has no horizons.
    """
    share = horizon_curve(result, by).share.transpose(..., "horizon")
    log_horizons, values = np.log(share.horizon.values.astype(float)), share.values
    crossed = values >= 0.5
    after = crossed.argmax(-1)
    before = np.maximum(after - 1, 0)
    high, low = (np.take_along_axis(values, index[..., None], -1)[..., 0] for index in (after, before))
    fraction = np.where(after > 0, (0.5 - low) / np.where(after > 0, high - low, 1.0), 1.0)
    horizon = np.exp(log_horizons[before] + fraction * (log_horizons[after] - log_horizons[before]))
    horizon = np.where(crossed.any(-1), horizon, math.inf)
    horizon = np.where(np.isnan(values).any(-1), math.nan, horizon)
    return _describe(share.isel(horizon=0, drop=True).copy(data=horizon), "effective horizon", "tokens")


# ---- which heads to report, and how well the sums agree


def weak_heads(result: xr.Dataset) -> xr.DataArray:
    """Return the heads whose share is too small or too uncertain to report, and those that a layer does not have.

    Such a head has less than a tenth of an equal part of its layer's credit, so that a share divides by almost nothing
    (with shared keys a head's own part can even be negative), or a self share with a standard error above 0.25.

    Returns:
        bool, dims (layer, head, stream).
    """
    credit = result.credit_by_document.sum(("document", "side"), skipna=False)
    equal_part = _sum(result, credit, ("layer",)) / existing_heads(result).sum("head")
    uncertain = shares(result, ("layer", "head")).error.sel(side="self", drop=True) > MAX_ERROR
    return ~(credit >= MIN_CREDIT * equal_part) | ~(credit > 0) | uncertain


def balance(result: xr.Dataset) -> xr.DataArray:
    """Return the largest disagreement between the accounts of the same credit, relative to the layer's credit.

    Compares credit added up by lag with credit by position and with credit by document, head by head. A stream with
    less than `ROUNDING` of its layer's credit has a gradient of 0 to single precision; its disagreement is relative to
    that much of the layer's credit.

    Returns:
        Units 1, dims (layer, stream).
    """
    by_lag = result.credit.sum("lag", skipna=False)
    accounts = (
        result.credit_by_position.sum(("side", "position"), skipna=False),
        result.credit_by_document.sum(("document", "side"), skipna=False),
    )
    differences = [_sum(result, abs(by_lag - account), ("layer",)) for account in accounts]
    largest = xr.where(differences[0] > differences[1], differences[0], differences[1])
    credit = abs(_sum(result, by_lag, ("layer",)))
    relative = xr.where(largest == 0, 0.0, largest / np.maximum(credit, ROUNDING * credit.sum("stream")))
    return _describe(relative, "relative disagreement of the accounts")


def existing_heads(result: xr.Dataset) -> xr.DataArray:
    """Return the heads that each layer has, as layers may differ in their number of heads.

    Returns:
        bool, dims (layer, head).
    """
    return result.credit.notnull().any(("stream", "lag"))


def _measured(result: xr.Dataset, name: str) -> xr.DataArray:
    """Return a variable that only some results have.

    Raises:
        InputError: This one was measured without it.
    """
    if name not in result:
        raise InputError(f"expected a result with {name!r}, which was not measured: measure with {OPTIONS[name]}")
    return result[name]


def _sum(result: xr.Dataset, values: xr.DataArray, by: Sequence[str]) -> xr.DataArray:
    """Sum over layers and heads except `by`. A head that the layer has not counts nothing; any other NaN stays NaN."""
    dims = [dim for dim in _dims_of_heads(values, by) if dim not in by]
    if dims and "head" in values.dims:
        values = values.where(existing_heads(result), 0.0)
    return values.sum(dims, skipna=False)


def _dims_of_heads(values: xr.DataArray, by: Sequence[str]) -> list[str]:
    """Return those of "layer" and "head" that the values have; raise InputError if `by` names anything else."""
    dims = [dim for dim in ("layer", "head") if dim in values.dims]
    if isinstance(by, str) or not set(by) <= set(dims):
        raise InputError(f"by expects a sequence of {' and '.join(map(repr, dims))} or of fewer of them; got {by!r}")
    return dims


def _describe(values: xr.DataArray, long_name: str, units: str = "1") -> xr.DataArray:
    return values.drop_attrs(deep=False).assign_attrs(units=units, long_name=long_name)


def _self_part(norms: xr.DataArray) -> xr.DataArray:
    """Return the inner product of the self part with the whole."""
    return norms.sel(term=["self", "inner"]).sum("term", skipna=False)


def _weight_parts(norms: xr.DataArray) -> xr.DataArray:
    """Return the squared norms of the self part, the other part and the whole, along `part`."""
    own, other, inner = (norms.sel(term=term, drop=True) for term in TERMS)
    return xr.concat([own, other, own + other + 2 * inner], xr.Variable("part", ["self", "other", "whole"]))


def _own_shares(terms: xr.DataArray) -> xr.Dataset:
    """Return the share of the own loss in a squared norm, its error, and the cosine between own and later part."""
    part = terms.sel(loss_term=["own", "inner"]).sum("loss_term", skipna=False)
    total = terms.sel(loss_term=["own", "later", "inner", "inner"]).sum("loss_term", skipna=False)
    sums = terms.sum("document", skipna=False)
    own, later, inner = (sums.sel(loss_term=term, drop=True) for term in LOSS_TERMS)
    return ratio(part, total).assign(cosine=_describe(inner / (own * later) ** 0.5, "cosine between own and later"))
