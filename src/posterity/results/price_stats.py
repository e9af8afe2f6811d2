"""Prices of cached keys and values, and of windows, per token of text; public in `posterity.stats`."""

from collections.abc import Sequence

import xarray as xr

from posterity.errors import InputError
from posterity.results.ratios import check_result, describe, ratio, required_variable

PER_TOKEN = "nats per token"


@check_result
def prices(result: xr.Dataset, by: Sequence[str] = ()) -> xr.Dataset:
    """Return what cached keys and values are worth to later tokens: their prices by the number of predicted tokens.

    A price is half of the squared first-order change of the losses when one later query does without the pair
    (docs/method.md, Prices), summed over all later queries.

    Args:
        result: A result of `posterity.measure` with `prices`.
        by: (), ("layer",) or ("layer", "kv_head").

    Returns:
        `price` and `error`, units nats per token, dims `by`.

    Raises:
        InputError: The result has no prices.
    """
    values = required_variable(result, "price_by_document").rename(group="kv_head")
    if isinstance(by, str) or tuple(by) not in ((), ("layer",), ("layer", "kv_head")):
        raise InputError(f"by expects (), ('layer',) or ('layer', 'kv_head'); got {by!r}")
    # A layer without a key/value head that others have: NaN there, and nothing in a sum.
    total = [dim for dim in ("layer", "kv_head") if dim not in by]
    values = values.sum(total) if total else values
    return _per_token(result, values)


@check_result
def window_prices(result: xr.Dataset, by: Sequence[str] = ("layer",)) -> xr.Dataset:
    """Return what it costs to let a layer, or a head, look back no further than a window and the first positions.

    A window of w tokens holds a query's own position and the w - 1 before it, as `sliding_window` does in transformers.

    Args:
        result: A result of `posterity.measure` with `prices`.
        by: ("layer",), for all heads of a layer together; or ("layer", "head"), for one head that has the window
            while the others look back without limit: prices by window of text are not kept for heads, so that the
            error is NaN.

    Returns:
        `price` and `error`, units nats per token, dims (*by, window).

    Raises:
        InputError: The result has no prices.
    """
    if isinstance(by, str) or tuple(by) not in (("layer",), ("layer", "head")):
        raise InputError(f"by expects ('layer',) or ('layer', 'head'); got {by!r}")
    if "head" not in by:
        return _per_token(result, required_variable(result, "window_price_by_document"))
    price = required_variable(result, "window_price") / result.tokens.sum()
    return xr.Dataset(
        {
            "price": describe(price, "price", PER_TOKEN),
            "error": describe(xr.full_like(price, float("nan")), "unknown error", PER_TOKEN),
        }
    )


def _per_token(result: xr.Dataset, by_document: xr.DataArray) -> xr.Dataset:
    """Return sums over windows of text by their tokens, with standard errors."""
    per_token = ratio(by_document, result.tokens)
    return xr.Dataset(
        {
            "price": describe(per_token.share, "price", PER_TOKEN),
            "error": describe(per_token.error, "standard error over documents", PER_TOKEN),
        }
    )
