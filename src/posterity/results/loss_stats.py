"""Shares of own and later losses, and of losses under a discount; public in `posterity.stats`."""

import math
from collections.abc import Sequence

import numpy as np
import xarray as xr

from posterity.axes import LOSS_TERMS, PAIRS, PARTS
from posterity.results.ratios import check_result, describe, ratio, required_variable, sum_over_heads, sum_readers

CANCELLED = 1e-3  # of the sizes of the parts, below which their sum is about nothing


@check_result
def loss_shares(result: xr.Dataset, by: Sequence[str] = (), reader_of: str = "all") -> xr.Dataset:
    """Return the share of the credit of keys and values that comes from the own loss and from later losses.

    Args:
        result: A result of `posterity.measure` with `losses=True`.
        by: Any of "layer" and "head" (or "kv_head").
        reader_of: Which keys and values: "all", "first" (those of the first positions) or "rest".

    Returns:
        `share` and `error`, units 1, dims (*by, written, part). The parts: own loss; later losses through the self
        edge; later losses through the edges of later queries.

    Raises:
        InputError: The result has no split by losses.
    """
    credit = sum_readers(required_variable(result, "loss_credit_by_document"), reader_of)
    credit = sum_over_heads(result, credit, by)
    return ratio(credit, credit.sum("part", skipna=False))


@check_result
def loss_shares_by_position(result: xr.Dataset) -> xr.DataArray:
    """Return the share of the whole credit of keys (values) by part and position, over all layers and heads.

    Returns:
        Units 1, dims (written, part, position); the parts of `loss_shares`.

    Raises:
        InputError: The result has no split by losses.
    """
    credit = sum_over_heads(result, required_variable(result, "loss_credit"), ())
    return describe(credit / credit.sum(("part", "position"), skipna=False), "share of the credit")


@check_result
def loss_matrix(result: xr.Dataset, by: Sequence[str] = ()) -> xr.DataArray:
    """Return the share of each loss in the credit of every key and value of one text.

    Args:
        result: A result of `posterity.inspect`.
        by: () for all layers together, or ("layer",).

    Returns:
        Units 1, dims (*by, written, loss_position, position); over the losses they sum to 1. Without the last token,
        which has no loss. NaN for a loss before the position, and where the parts cancel to less than `CANCELLED` of
        their sizes.

    Raises:
        InputError: The result is of no single text.
    """
    credit = sum_over_heads(result, required_variable(result, "inspect_credit"), by)
    credit = credit.isel(loss_position=slice(-1), position=slice(-1))
    total = credit.sum("loss_position", skipna=False)
    share = credit / total.where(total > CANCELLED * abs(credit).sum("loss_position", skipna=False))
    return describe(share.where(credit.loss_position >= credit.position), "share of the loss in the credit")


@check_result
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
    gram = sum_over_heads(result, required_variable(result, "loss_gram"), by).sum("position", skipna=False)
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
            "norm": describe(norm.transpose(..., "part"), "norm of a part", "nats"),
            "cosine": describe(cosine.transpose(..., "pair"), "cosine between two parts"),
        }
    )


@check_result
def hidden_shares(result: xr.Dataset) -> xr.Dataset:
    """Return the share of the own loss in the gradient of the hidden state at each layer's input.

    Returns:
        `share`, `error`: inner product of the own part with the whole over the squared norm, units 1, dims (layer).
        `cosine`: between the parts of the own and of the later losses, units 1, dims (layer).
        NaN where a layer's input was not observed.

    Raises:
        InputError: The result has no split by losses.
    """
    return _own_shares(required_variable(result, "hidden_by_document"))


@check_result
def parameter_shares(result: xr.Dataset) -> xr.Dataset:
    """Return the share of the own loss in the gradient of each module's parameters.

    Returns:
        `share`, `error` and `cosine` as in `hidden_shares`, dims (parameter).

    Raises:
        InputError: The result has no split of the parameters' gradients.
    """
    return _own_shares(required_variable(result, "parameter_by_document"))


@check_result
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
    cosines["hidden"] = _own_shares(required_variable(result, "hidden_by_document").sum("layer", skipna=False)).cosine
    if "parameter_by_document" in result:
        cosines["parameters"] = _own_shares(result.parameter_by_document.sum("parameter", skipna=False)).cosine
    return xr.Dataset(
        {
            name: describe(np.degrees(np.arccos(cosine.clip(-1, 1))), "angle", "degrees")
            for name, cosine in cosines.items()
        }
    )


@check_result
def horizon_curve(result: xr.Dataset, by: Sequence[str] = (), reader_of: str = "all") -> xr.Dataset:
    """Return the share of the credit that remains when later losses are discounted at the rate 1 - 1/h a token.

    Args:
        result: A result of `posterity.measure` with `horizons`.
        by: Any of "layer" and "head" (or "kv_head").
        reader_of: Which edges, by their key: "all", "first" (the first keys of a document) or "rest".

    Returns:
        `share` and `error`, units 1, dims (*by, stream, horizon).

    Raises:
        InputError: The result has no horizons.
    """
    discounted, credit = (
        required_variable(result, "horizon_by_document"),
        result.credit_by_document.sum("side", skipna=False),
    )
    parts = (sum_over_heads(result, sum_readers(values, reader_of), by) for values in (discounted, credit))
    return ratio(*parts)


@check_result
def effective_horizon(result: xr.Dataset, by: Sequence[str] = (), reader_of: str = "all") -> xr.DataArray:
    """Return the horizon h at which the horizon curve first reaches one half.

    Between two measured horizons the curve is taken as linear in log h.

    Args:
        result: A result of `posterity.measure` with `horizons`.
        by: Any of "layer" and "head" (or "kv_head").
        reader_of: As in `horizon_curve`.

    Returns:
        Units tokens, dims (*by, stream). Where the smallest horizon gives one half or more, that horizon (an upper
        bound); where the largest gives less, infinity; NaN where the curve is not known.

    Raises:
        InputError: The result has no horizons.
    """
    share = horizon_curve(result, by, reader_of).share.transpose(..., "horizon")
    log_horizons, values = np.log(share.horizon.values.astype(float)), share.values
    crossed = values >= 0.5
    after = crossed.argmax(-1)
    before = np.maximum(after - 1, 0)
    high, low = (np.take_along_axis(values, index[..., None], -1)[..., 0] for index in (after, before))
    fraction = np.where(after > 0, (0.5 - low) / np.where(after > 0, high - low, 1.0), 1.0)
    horizon = np.exp(log_horizons[before] + fraction * (log_horizons[after] - log_horizons[before]))
    horizon = np.where(crossed.any(-1), horizon, math.inf)
    horizon = np.where(np.isnan(values).any(-1), math.nan, horizon)
    return describe(share.isel(horizon=0, drop=True).copy(data=horizon), "effective horizon", "tokens")


def _own_shares(terms: xr.DataArray) -> xr.Dataset:
    """Return the share of the own loss in a squared norm, its error, and the cosine between own and later part."""
    part = terms.sel(loss_term=["own", "inner"]).sum("loss_term", skipna=False)
    total = terms.sel(loss_term=["own", "later", "inner", "inner"]).sum("loss_term", skipna=False)
    sums = terms.sum("document", skipna=False)
    own, later, inner = (sums.sel(loss_term=term, drop=True) for term in LOSS_TERMS)
    return ratio(part, total).assign(cosine=describe(inner / (own * later) ** 0.5, "cosine between own and later"))
