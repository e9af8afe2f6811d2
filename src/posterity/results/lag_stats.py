"""Shares by lag: of the credit, of the edges and of the attention weights; public in `posterity.stats`."""

import math
from collections.abc import Sequence

import numpy as np
import xarray as xr

from posterity.errors import InputError
from posterity.results.lag_bins import lag_at_share
from posterity.results.ratios import (
    check_result,
    describe,
    existing_heads,
    layer_and_head_dims,
    ratio,
    required_variable,
    sum_over_heads,
    sum_readers,
)


@check_result
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


@check_result
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


@check_result
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


@check_result
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


@check_result
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
    first, last, values = share.lag.values, share.lag_end.values, share.values
    within = np.cumsum(values, axis=-1)
    crossed = within >= 0.5
    index = crossed.argmax(axis=-1)
    after, credit = (np.take_along_axis(x, index[..., None], axis=-1)[..., 0] for x in (within, values))
    is_fine = last[index] - first[index] < np.maximum(first[index], 1)
    valid = crossed.any(axis=-1) & ~np.isnan(values).any(axis=-1) & is_fine
    median = lag_at_share(0.5, after - credit, after, first[index], last[index])
    median = np.where(valid, median, math.nan)
    return describe(share.isel(lag=0, drop=True).copy(data=median), "median lag", "tokens")


@check_result
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
