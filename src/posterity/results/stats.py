"""Shares of a result with their standard errors, as labelled arrays: public as `posterity.stats`.

    result = posterity.load("run.nc")
    posterity.stats.shares(result, by=["layer"]).share.sel(side="other", stream="value")

A result holds sums and counts only. Every ratio is formed here, once, after all sums; its standard error is taken over
the windows of text (dimension `document`). Shares have units "1" and sum to one over the labels that they compare.
`by` names the dimensions that are kept, "layer" and "head" (or "kv_head", which adds up the query heads of each
key/value head); all others are summed over, so that () gives one number for the model. A `by` that the sums do not have
raises InputError. `reader_of` selects edges by their key: "all", "first" (the first keys of a document, attention
sinks) or "rest". NaN marks a head that a layer does not have, and what was
not measured.
"""

import math
from collections.abc import Sequence

import numpy as np
import xarray as xr

from posterity.axes import TERMS
from posterity.errors import InputError
from posterity.results.loss_stats import (
    angles,
    effective_horizon,
    hidden_shares,
    horizon_curve,
    loss_matrix,
    loss_parts,
    loss_shares,
    loss_shares_by_position,
    parameter_shares,
)
from posterity.results.price_stats import prices, window_prices
from posterity.results.ratios import (
    confidence,
    describe,
    existing_heads,
    has_reader_axis,
    layer_and_head_dims,
    mean_and_error,
    ratio,
    required_variable,
    sum_over_heads,
    sum_readers,
    uncertainty,
)
from posterity.results.reach import reach

__all__ = [
    "adapter_shares",
    "angles",
    "attention_first",
    "attention_mean",
    "attention_profile",
    "balance",
    "confidence",
    "counts",
    "cumulative_profile",
    "effective_horizon",
    "existing_heads",
    "first_attention",
    "first_position",
    "first_share",
    "group_shares",
    "has_reader_axis",
    "heavy_windows",
    "hidden_shares",
    "horizon_curve",
    "loss_matrix",
    "loss_parts",
    "loss_shares",
    "loss_shares_by_position",
    "mean_and_error",
    "median_lag",
    "parameter_shares",
    "prices",
    "profile",
    "ratio",
    "reach",
    "reader_lags",
    "shares",
    "uncertainty",
    "weak_heads",
    "weight_shares",
    "window_norms",
    "window_prices",
]

MIN_CREDIT = 0.1  # of an equal part of the layer's credit, below which a head's share is not reported
MAX_ERROR = 0.25  # standard error of a self share, above which a head's share is not reported
HEAVY = 10.0  # times the median of the windows' squared gradient norms
ROUNDING = 1e-14  # square of single precision's rounding


def __dir__() -> list[str]:
    """List the public functions, for tab completion."""
    return __all__


# ---- credit by side, by lag and by position


def shares(result: xr.Dataset, by: Sequence[str] = (), reader_of: str = "all") -> xr.Dataset:
    """Return the share of the credit that the self edge and all other edges have.

    Args:
        result: A result of `posterity.measure`.
        by: Any of "layer" and "head" (or "kv_head").
        reader_of: Which edges are compared, by their key.

    Returns:
        `share` and `error`, units 1, dims (*by, stream, side).
    """
    credit = sum_over_heads(result, sum_readers(result.credit_by_document, reader_of), by)
    return ratio(credit, credit.sum("side", skipna=False))


def profile(result: xr.Dataset, by: Sequence[str] = (), reader_of: str = "all") -> xr.Dataset:
    """Return the share of the credit by lag, beside what counting edges predicts.

    Args:
        result: A result of `posterity.measure`.
        by: Any of "layer" and "head" (or "kv_head"). Credit by window and lag is kept for all heads together: by head
            the error is NaN.
        reader_of: Which edges are compared, by their key.

    Returns:
        `share`, `error`: units 1, dims (*by, stream, lag).
        `counted`: the share of the edges, units 1, dims (lag), with "layer" where `by` has it; see `counts`.
        `premium`: share / counted, units 1, dims (*by, stream, lag).
        `width`: lags in the bin, units tokens, dims (lag); share / width is the density per lag.
    """
    if {"head", "kv_head"} & set(by):
        credit = sum_over_heads(result, sum_readers(result.credit, reader_of), by)
        share = describe(credit / credit.sum("lag", skipna=False), "share")
        lag_shares = xr.Dataset({"share": share, "error": describe(xr.full_like(share, math.nan), "unknown error")})
    else:
        credit = sum_over_heads(result, sum_readers(result.profile_by_document, reader_of), by)
        lag_shares = ratio(credit, credit.sum("lag", skipna=False))
    counted = counts(result, [dim for dim in by if dim == "layer"], reader_of)
    premium = describe(lag_shares.share / counted, "share over the share of the edges")
    width = describe(result.lag_end - result.lag + 1, "lags in the bin", "tokens")
    return lag_shares.assign(counted=counted, premium=premium, width=width)


def cumulative_profile(result: xr.Dataset, by: Sequence[str] = (), reader_of: str = "all") -> xr.Dataset:
    """Return the share of the credit within each lag, beside the shares of the edges and of the attention weights.

    Args:
        result: A result of `posterity.measure`.
        by: () or ("layer",).
        reader_of: Which edges are compared, by their key.

    Returns:
        `share`, `error`: credit of lag 0 to `lag_end`, units 1, dims (*by, stream, lag).
        `counted`, `attention`: the same of the edges and of the attention weights, units 1, dims (*by, lag).
    """
    credit = sum_over_heads(result, sum_readers(result.profile_by_document, reader_of), by)
    within = ratio(credit.cumsum("lag", skipna=False), credit.sum("lag", skipna=False))
    beside = {"counted": counts(result, by, reader_of), "attention": attention_profile(result, by, reader_of)}
    return within.assign(
        {name: describe(share.cumsum("lag", skipna=False), share.long_name) for name, share in beside.items()}
    )


def counts(result: xr.Dataset, by: Sequence[str] = (), reader_of: str = "all") -> xr.DataArray:
    """Return the share of the edges by lag, which is what counting alone predicts for the credit.

    Args:
        result: A result of `posterity.measure`.
        by: () or ("layer",). Over layers, each measured head counts its layer's edges once.
        reader_of: Which edges are counted, by their key.

    Returns:
        Units 1, dims (*by, lag).
    """
    layer_and_head_dims(result.edges, by)
    edges = sum_readers(result.edges, reader_of)
    if "layer" not in by:
        edges = (edges * existing_heads(result).sum("head")).sum("layer")
    return describe(edges / edges.sum("lag"), "share of the edges")


def attention_profile(result: xr.Dataset, by: Sequence[str] = (), reader_of: str = "all") -> xr.DataArray:
    """Return the share of the attention weights by lag.

    Args:
        result: A result of `posterity.measure`.
        by: Any of "layer" and "head" (or "kv_head").
        reader_of: Which edges are compared, by their key.

    Returns:
        Units 1, dims (*by, lag); NaN where the weights were not measured (lags="self").
    """
    attention = sum_over_heads(result, sum_readers(result.attention, reader_of), by)
    return describe(attention / attention.sum("lag", skipna=False), "share of the attention weights")


def attention_mean(result: xr.Dataset, by: Sequence[str] = (), reader_of: str = "all") -> xr.DataArray:
    """Return the mean attention weight of one edge by lag: a result keeps their sums.

    Args:
        result: A result of `posterity.measure`.
        by: Any of "layer" and "head" (or "kv_head").
        reader_of: Which edges are meant, by their key.

    Returns:
        Units 1, dims (*by, lag); NaN where the weights were not measured (lags="self") or no edge has the lag.
    """
    edges = sum_readers(result.edges, reader_of) * existing_heads(result)
    weight = sum_over_heads(result, sum_readers(result.attention, reader_of), by)
    return describe(weight / sum_over_heads(result, edges, by), "mean attention weight of an edge")


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
    return describe(share.isel(lag=0, drop=True).copy(data=median), "median lag", "tokens")


def first_position(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Return the share of the credit that lies at position 0.

    Args:
        result: A result of `posterity.measure`.
        by: Any of "layer" and "head".

    Returns:
        `share` and `error`, units 1, dims (*by, stream).
    """
    credit = sum_over_heads(result, sum_readers(result.credit_by_document, "all"), by).sum("side", skipna=False)
    return ratio(sum_over_heads(result, result.first_by_document, by), credit)


def first_share(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Return the share of the credit that the edges into the first keys of each document have.

    How many keys are meant says the result's attribute `sinks`.

    Args:
        result: A result of `posterity.measure`.
        by: Any of "layer" and "head" (or "kv_head").

    Returns:
        `share` and `error`, units 1, dims (*by, stream).

    Raises:
        InputError: The result does not tell them apart.
    """
    credit = result.credit_by_document.sum("side", skipna=False)
    parts = (sum_over_heads(result, sum_readers(credit, reader_of), by) for reader_of in ("first", "all"))
    return ratio(*parts)


def attention_first(result: xr.Dataset, by: Sequence[str] = ()) -> xr.DataArray:
    """Return the mean attention weight on the first key, over heads and queries (as many as edges of lag 0).

    Args:
        result: A result of `posterity.measure`.
        by: Any of "layer" and "head".

    Returns:
        Units 1, dims (*by).
    """
    queries = sum_readers(result.edges, "all").isel(lag=0, drop=True) * existing_heads(result)
    weight = sum_over_heads(result, result.attention_first, by) / sum_over_heads(result, queries, by)
    return describe(weight, "mean attention weight on the first key")


def reader_lags(result: xr.Dataset, by: Sequence[str] = ()) -> xr.DataArray:
    """Return how far away the readers of each token of an inspected text are.

    The lag within which a part of what they take lies, nearest readers first, over all heads: of the attention on the
    token's key, of its key credit and of its value credit. Credit can be negative: the first crossing counts.

    Args:
        result: A result of `posterity.inspect`.
        by: () for all layers together, or ("layer",).

    Returns:
        Units tokens, dims (*by, reader_quantity, level, position); NaN where a token's edges cancel or carry nothing.

    Raises:
        InputError: The result is of no inspected text.
    """
    if tuple(by) not in ((), ("layer",)):
        raise InputError(f"by expects () or ('layer',); got {by!r}")
    return required_variable(result, "reader_lag" if by else "reader_lag_all")


def first_attention(result: xr.Dataset, by: Sequence[str] = ()) -> xr.DataArray:
    """Return the share of the attention weights on the first keys of each document.

    Args:
        result: A result of `posterity.measure`.
        by: Any of "layer" and "head" (or "kv_head").

    Returns:
        Units 1, dims (*by); NaN where the weights were not measured (lags="self").

    Raises:
        InputError: The result does not tell the first keys apart.
    """
    sums = (sum_readers(result.attention, reader_of).sum("lag", skipna=False) for reader_of in ("first", "all"))
    first, whole = (sum_over_heads(result, values, by) for values in sums)
    return describe(first / whole, "share of the attention weights on the first keys")


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

        A layer without weights of its own for a stream, as one that borrows keys, is NaN, and counts nothing when
        layers are pooled.

    Raises:
        InputError: The result has no gradients of the weights.
    """
    arrays = [required_variable(result, name) for name in ("weight_by_document", "weight_mean")]
    if "layer" not in by:
        missing = arrays[1].isnull().all("term")
        arrays = [array.where(~missing | missing.all("layer"), 0.0) for array in arrays]
    single, mean = (sum_over_heads(result, array, by) for array in arrays)
    return _gradient_shares(single, mean)


def adapter_shares(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Return the share of the self part in the gradients of the adapters' own parameters, and how well windows agree.

    Args:
        result: A result of `posterity.measure` for a model with adapters at its queries, keys or values.
        by: () for all adapters together, or ("adapter",) for each parameter.

    Returns:
        `share`, `error`, `share_mean`, `agreement` as in `weight_shares`; dims (*by) and (*by, part). NaN for a
        parameter whose gradient is zero.

    Raises:
        InputError: The result has no gradients of adapters.
    """
    arrays = [required_variable(result, name) for name in ("adapter_by_document", "adapter_mean")]
    if tuple(by) not in ((), ("adapter",)):
        raise InputError(f"by expects () or ('adapter',); got {by!r}")
    return _gradient_shares(*(array if by else array.sum("adapter", skipna=False) for array in arrays))


def _gradient_shares(single: xr.DataArray, mean: xr.DataArray) -> xr.Dataset:
    """Return shares and agreement from the terms of each window's gradient and of their mean."""
    documents = single.sizes["document"]
    single_parts, mean_parts = _weight_parts(single), _weight_parts(mean)
    norms = single_parts.sum("document", skipna=False)
    agreement = (documents**2 * mean_parts - norms) / ((documents - 1 if documents > 1 else math.nan) * norms)
    self_shares = ratio(_self_part(single), single_parts.sel(part="whole", drop=True))
    share_mean = _self_part(mean) / mean_parts.sel(part="whole", drop=True)
    return self_shares.assign(
        share_mean=describe(share_mean, "share in the mean gradient"),
        agreement=describe(agreement.transpose(..., "part"), "agreement of the windows"),
    )


# ---- which heads to report, and how well the sums agree


def weak_heads(result: xr.Dataset, reader_of: str = "all") -> xr.DataArray:
    """Return the heads whose share is too small or too uncertain to report, and those that a layer does not have.

    Such a head has less than a tenth of an equal part of its layer's credit, so that a share divides by almost nothing
    (with shared keys a head's own part can even be negative), or a self share with a standard error above 0.25.

    Args:
        result: A result of `posterity.measure`.
        reader_of: Which edges are meant, by their key.

    Returns:
        bool, dims (layer, head, stream).
    """
    credit = sum_readers(result.credit_by_document, reader_of).sum(("document", "side"), skipna=False)
    equal_part = sum_over_heads(result, credit, ("layer",)) / existing_heads(result).sum("head")
    uncertain = shares(result, ("layer", "head"), reader_of).error.sel(side="self", drop=True) > MAX_ERROR
    return ~(credit >= MIN_CREDIT * equal_part) | ~(credit > 0) | uncertain


def group_shares(result: xr.Dataset, reader_of: str = "all") -> xr.Dataset:
    """Return what each head's self edge and other edges bring, as shares of the credit of the head's group.

    A group is the heads that read one key and value, which make its gradient together. A head's own credit can be
    close to zero or negative there, and a share of it without bounds; the shares of a group add up to one. Queries
    belong to one head, so that their shares are those of `shares`.

    Args:
        result: A result of `posterity.measure`.
        reader_of: Which edges are compared, by their key.

    Returns:
        `share` and `error`, units 1, dims (layer, head, stream, side).

    Raises:
        InputError: An earlier version left the key/value heads out.
    """
    credit = sum_readers(result.credit_by_document, reader_of)
    total = credit.sum("side", skipna=False)
    by_group = sum_over_heads(result, total, ("layer", "kv_head"))
    group = by_group.sel(layer=result.layer, kv_head=result.kv_head.clip(min=0).drop_vars("kv_head"))
    group = group.drop_vars("kv_head").transpose(*total.dims)
    return ratio(credit, xr.where(total.stream == "query", total, group).where(total.notnull()))


# ---- windows that decide every number


def window_norms(result: xr.Dataset) -> xr.DataArray:
    """Return the squared norm of each window's gradient, of queries, keys and values over all layers and heads.

    Shares pool windows by it: a window with ten times the norm counts ten times.

    Returns:
        Units nats^2, dims (document, stream).
    """
    credit = sum_over_heads(result, sum_readers(result.credit_by_document, "all"), ()).sum("side", skipna=False)
    return describe(credit, "squared norm of the gradient of one window", "nats^2")


def heavy_windows(result: xr.Dataset) -> xr.DataArray:
    """Return the windows whose squared gradient norm, of any stream, is above ten times the median of all windows.

    Returns:
        bool, dims (document).
    """
    norms = window_norms(result)
    return (norms > HEAVY * norms.median("document")).any("stream")


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


def _self_part(norms: xr.DataArray) -> xr.DataArray:
    """Return the inner product of the self part with the whole."""
    return norms.sel(term=["self", "inner"]).sum("term", skipna=False)


def _weight_parts(norms: xr.DataArray) -> xr.DataArray:
    """Return the squared norms of the self part, the other part and the whole, along `part`."""
    own, other, inner = (norms.sel(term=term, drop=True) for term in TERMS)
    return xr.concat([own, other, own + other + 2 * inner], xr.Variable("part", ["self", "other", "whole"]))
