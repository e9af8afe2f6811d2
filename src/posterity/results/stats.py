"""Every number that is derived from a result: sums first, one division at the end, a standard error with it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from posterity.axes import LOSS_TERMS, PAIRS, PARTS, TERMS

FAINT = 0.1  # of an equal part of a layer's credit: a head with less has no share worth showing
UNCERTAIN = 0.25  # standard error of a share above which a head's share is not worth showing

NOTHING = 1e-14  # the square of single precision's rounding


def ratio(part: xr.DataArray, whole: xr.DataArray) -> xr.Dataset:
    """Ratio of two sums over documents, `share`, and its standard error over documents, `error`.

    share = sum_d x_d / sum_d T_d. With the residuals e_d = x_d - share T_d, the error is
    sqrt(n/(n-1) sum_d e_d^2) / |sum_d T_d| (Cochran, Sampling Techniques, 1977, section 2.11); NaN for one document.
    """
    documents = whole.sizes["document"]
    total = whole.sum("document", skipna=False)
    share = part.sum("document", skipna=False) / total
    residual = part - share * whole
    spread = documents / (documents - 1) if documents > 1 else math.nan
    error = (spread * (residual**2).sum("document", skipna=False)) ** 0.5 / abs(total)
    return xr.Dataset({"share": _named(share, "share"), "error": _named(error, "standard error over documents")})


def shares(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Share of the credit that each side has: `share` and `error`, dims (*by, stream, side).

    `by` is any of "layer" and "head"; what is not named is summed over, so () is the whole model.
    """
    credit = _sum(result, result.credit_by_document, by)
    return ratio(credit, credit.sum("side", skipna=False))


def profile(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Share of the credit by lag, dims (*by, stream, lag), `by` () or ("layer",).

    Variables: `share`, `error`; `counted` (*by, lag), the share of the edges, which is what counting alone predicts;
    `premium` = share / counted; `width` (lag), the lags in the bin: share / width is the density per lag.
    """
    credit = _sum(result, result.profile_by_document, by)
    found = ratio(credit, credit.sum("lag", skipna=False))
    counted = counts(result, by)
    premium = _named(found.share / counted, "share over the share of the edges")
    width = _named(result.lag_end - result.lag + 1, "lags in the bin", "tokens")
    return found.assign(counted=counted, premium=premium, width=width)


def counts(result: xr.Dataset, by: Sequence[str] = ()) -> xr.DataArray:
    """Share of the edges by lag, dims (*by, lag): every measured head counts its layer's edges once."""
    edges = result.edges if "layer" in by else (result.edges * present(result).sum("head")).sum("layer")
    return _named(edges / edges.sum("lag"), "share of the edges")


def attention_profile(result: xr.Dataset, by: Sequence[str] = ()) -> xr.DataArray:
    """Share of the attention weights by lag, dims (*by, lag); `by` as in `shares`. NaN where it was not measured."""
    attention = _sum(result, result.attention, by)
    return _named(attention / attention.sum("lag", skipna=False), "share of the attention weights")


def median_lag(share: xr.DataArray) -> xr.DataArray:
    """The smallest lag at which the shares, added up from lag 0, first reach one half; dims without "lag".

    Credit can be negative in a bin, so the sum can fall again later: the first crossing counts. Inside a bin the credit
    is taken as evenly spread over its lags. NaN where a share is NaN, or where the bin of the crossing is wider than
    its own first lag (as with lags="self"): then its place is not known.
    """
    share = share.transpose(..., "lag")
    lag, width = share.lag.values, share.lag_end.values - share.lag.values + 1
    values = share.values
    total = np.cumsum(values, axis=-1)
    reached = total >= 0.5
    index = reached.argmax(axis=-1)
    at, inside = (np.take_along_axis(x, index[..., None], axis=-1)[..., 0] for x in (total, values))
    known = reached.any(axis=-1) & ~np.isnan(values).any(axis=-1) & (width[index] <= np.maximum(lag[index], 1))
    part = (0.5 - (at - inside)) / np.where(known, inside, 1.0)
    median = lag[index] + np.clip(np.ceil(np.where(known, part, 1.0) * width[index] - 1e-9), 1, width[index]) - 1
    return _named(share.isel(lag=0, drop=True).copy(data=np.where(known, median, math.nan)), "median lag", "tokens")


def first_position(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Share of the credit that lies at position 0: `share` and `error`, dims (*by, stream); `by` as in `shares`."""
    whole = _sum(result, result.credit_by_document, by).sum("side", skipna=False)
    return ratio(_sum(result, result.first_by_document, by), whole)


def attention_first(result: xr.Dataset, by: Sequence[str] = ()) -> xr.DataArray:
    """Mean attention weight on the first key, over queries (as many as edges of lag 0) and heads; dims (*by)."""
    queries = result.edges.isel(lag=0, drop=True) * present(result)
    first = _sum(result, result.attention_first, by) / _sum(result, queries, by)
    return _named(first, "mean attention weight on the first key")


def weights(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """The gradients of W_Q, W_K, W_V, dims (*by, stream), `by` () or ("layer",). KeyError if they were not measured.

    `share`, `error`: share of the self part in the squared norm of one window's gradient (its inner product with the
    whole), all windows pooled; `share_mean`: the same for the gradient averaged over the windows; `agreement`
    (*by, stream, part): mean inner product of the gradients of two different windows over the mean squared norm,
    for the self part, the other part and the whole; unbiased, 1 if all windows agree, about 0 if none do.
    """
    single, mean = (_sum(result, result[name], by) for name in ("weight_by_document", "weight_mean"))
    n = result.sizes["document"]
    single_parts, mean_parts = _parts(single), _parts(mean)
    norms = single_parts.sum("document", skipna=False)
    agreement = (n**2 * mean_parts - norms) / ((n - 1 if n > 1 else math.nan) * norms)
    found = ratio(_self_part(single), single_parts.sel(part="whole", drop=True))
    share_mean = _self_part(mean) / mean_parts.sel(part="whole", drop=True)
    return found.assign(
        share_mean=_named(share_mean, "share in the mean gradient"),
        agreement=_named(agreement.transpose(..., "part"), "agreement of the windows"),
    )


def who_pays(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Share of the credit of keys and values that each payer has: `share`, `error`, dims (*by, written, part).

    `part`: own loss; later losses through the self edge; later losses through the edges of later queries. They sum
    to 1. KeyError if it was not measured.
    """
    credit = _sum(result, result.loss_credit_by_document, by)
    return ratio(credit, credit.sum("part", skipna=False))


def who_pays_by_position(result: xr.Dataset) -> xr.DataArray:
    """Share of the whole credit by payer and position, over all layers; dims (written, part, position)."""
    credit = _sum(result, result.loss_credit, ())
    return _named(credit / credit.sum(("part", "position"), skipna=False), "share of the credit")


def parts(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Norms of the three parts, and cosines between them, over all positions and windows; dims (*by, written, pair).

    `norm` (part): root of the summed squared norms, nats; `cosine` (pair of parts): 1 where both pull alike.
    """
    gram = _sum(result, result.loss_gram, by).sum("position", skipna=False)
    squared = {part: gram.sel(pair=part, drop=True) for part in PARTS}
    norm = xr.concat([squared[part] ** 0.5 for part in PARTS], xr.Variable("part", list(PARTS)))
    pairs = [pair for pair in PAIRS if " . " in pair]
    cosines = []
    for pair in pairs:
        one, two = pair.split(" . ")
        cosines.append(gram.sel(pair=pair, drop=True) / (squared[one] * squared[two]) ** 0.5)
    cosine = xr.concat(cosines, xr.Variable("pair", pairs))
    return xr.Dataset(
        {
            "norm": _named(norm.transpose(..., "part"), "norm of a part", "nats"),
            "cosine": _named(cosine.transpose(..., "pair"), "cosine between two parts"),
        }
    )


def hidden(result: xr.Dataset) -> xr.Dataset:
    """The gradient of the hidden state at each layer's input, dims (layer).

    `share`, `error`: share of the own loss in the squared norm (its inner product with the whole), and `cosine`
    between the parts of the own and of the later losses. NaN where a layer's input was not seen.
    """
    return _own_and_later(result.hidden_by_document)


def parameters(result: xr.Dataset) -> xr.Dataset:
    """The gradient of each module's parameters, dims (parameter): `share`, `error`, `cosine` as in `hidden`."""
    return _own_and_later(result.parameter_by_document)


def angles(result: xr.Dataset) -> xr.Dataset:
    """Angle between the gradient that own losses send and that of the later losses, in degrees, over all windows.

    `layer_hidden` (layer): at each layer's input; `hidden` (): at all of them; `parameters` (): of all parameters, if
    measured.
    """
    found = {"layer_hidden": hidden(result).cosine}
    found["hidden"] = _own_and_later(result.hidden_by_document.sum("layer", skipna=False)).cosine
    if "parameter_by_document" in result:
        found["parameters"] = _own_and_later(result.parameter_by_document.sum("parameter", skipna=False)).cosine
    named = {name: _named(np.degrees(np.arccos(one.clip(-1, 1))), "angle", "degrees") for name, one in found.items()}
    return xr.Dataset(named)


def horizon_curve(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Share of the credit that remains under the discount rate 1 - 1/h, dims (*by, stream, horizon), and its error."""
    whole = _sum(result, result.credit_by_document, by).sum("side", skipna=False)
    return ratio(_sum(result, result.horizon_by_document, by), whole)


def effective_horizon(result: xr.Dataset, by: Sequence[str] = ()) -> xr.DataArray:
    """The h at which the horizon curve first reaches one half, dims (*by, stream), in tokens.

    Between two measured horizons the curve is taken as linear in log h. Where already the smallest horizon gives one
    half or more, that horizon is the answer (an upper bound); where the largest gives less, infinity; NaN if not known.
    """
    share = horizon_curve(result, by).share.transpose(..., "horizon")
    grid, values = np.log(share.horizon.values.astype(float)), share.values
    reached = values >= 0.5
    after = reached.argmax(-1)
    before = np.maximum(after - 1, 0)
    high, low = (np.take_along_axis(values, at[..., None], -1)[..., 0] for at in (after, before))
    part = np.where(after > 0, (0.5 - low) / np.where(after > 0, high - low, 1.0), 1.0)
    found = np.exp(grid[before] + part * (grid[after] - grid[before]))
    found = np.where(reached.any(-1), found, math.inf)
    found = np.where(np.isnan(values).any(-1), math.nan, found)
    return _named(share.isel(horizon=0, drop=True).copy(data=found), "effective horizon", "tokens")


def weak(result: xr.Dataset) -> xr.DataArray:
    """Heads whose shares say nothing; bool, dims (layer, head, stream). True also for heads that a layer has not.

    They have less than a tenth of an equal part of their layer's credit, so that a share divides by almost nothing
    (with shared keys a head's own part can even be negative), or a self share with a standard error above 0.25.
    """
    credit = result.credit_by_document.sum(("document", "side"), skipna=False)
    equal = _sum(result, credit, ("layer",)) / present(result).sum("head")
    uncertain = shares(result, ("layer", "head")).error.sel(side="self", drop=True) > UNCERTAIN
    return ~(credit >= FAINT * equal) | ~(credit > 0) | uncertain


def balance(result: xr.Dataset) -> xr.DataArray:
    """How far the accounts of the same credit disagree, relative to the layer's credit; dims (layer, stream).

    Compares credit added up by lag with credit by position and with credit by document, head by head. A stream with
    less than `NOTHING` of its layer's credit has a gradient of 0 to single precision, and is set beside that.
    """
    by_lag = result.credit.sum("lag", skipna=False)
    others = (
        result.credit_by_position.sum(("side", "position"), skipna=False),
        result.credit_by_document.sum(("document", "side"), skipna=False),
    )
    wrong = [_sum(result, abs(by_lag - other), ("layer",)) for other in others]
    off = xr.where(wrong[0] > wrong[1], wrong[0], wrong[1])
    credit = abs(_sum(result, by_lag, ("layer",)))
    off = xr.where(off == 0, 0.0, off / np.maximum(credit, NOTHING * credit.sum("stream")))
    return _named(off, "relative disagreement of the accounts")


def present(result: xr.Dataset) -> xr.DataArray:
    """Heads that the layer has (layers may differ in their number of heads); bool, dims (layer, head)."""
    return result.credit.notnull().any(("stream", "lag"))


def _sum(result: xr.Dataset, values: xr.DataArray, by: Sequence[str]) -> xr.DataArray:
    """Sum over layers and heads except `by`. A head that the layer has not counts nothing; any other NaN stays NaN."""
    assert set(by) <= {"layer", "head"}, by
    dims = [dim for dim in ("layer", "head") if dim in values.dims and dim not in by]
    if dims and "head" in values.dims:
        values = values.where(present(result), 0.0)
    return values.sum(dims, skipna=False)


def _named(values: xr.DataArray, long_name: str, units: str = "1") -> xr.DataArray:
    return values.drop_attrs(deep=False).assign_attrs(units=units, long_name=long_name)


def _self_part(norms: xr.DataArray) -> xr.DataArray:
    """Inner product of the self part with the whole."""
    return norms.sel(term=["self", "inner"]).sum("term", skipna=False)


def _parts(norms: xr.DataArray) -> xr.DataArray:
    """Squared norms of the self part, the other part and the whole, along `part`."""
    one, two, inner = (norms.sel(term=term, drop=True) for term in TERMS)
    return xr.concat([one, two, one + two + 2 * inner], xr.Variable("part", ["self", "other", "whole"]))


def _own_and_later(terms: xr.DataArray) -> xr.Dataset:
    """Share of the own loss in a squared norm, its error, and the cosine between the own and the later part."""
    part = terms.sel(loss_term=["own", "inner"]).sum("loss_term", skipna=False)
    whole = terms.sel(loss_term=["own", "later", "inner", "inner"]).sum("loss_term", skipna=False)
    total = terms.sum("document", skipna=False)
    own, later, inner = (total.sel(loss_term=term, drop=True) for term in LOSS_TERMS)
    return ratio(part, whole).assign(cosine=_named(inner / (own * later) ** 0.5, "cosine between own and later"))


def mean_and_error(values: Any, axis: int = 0) -> tuple[Any, Any]:
    """Mean over documents and its standard error; NaN for one document."""
    values = np.asarray(values, dtype=float)
    number = values.shape[axis]
    error = values.std(axis, ddof=1) / math.sqrt(number) if number > 1 else np.full_like(values.mean(axis), math.nan)
    return values.mean(axis), error
