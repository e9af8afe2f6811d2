"""Shares of the self edge and of other edges, and which heads to report; public in `posterity.stats`."""

from collections.abc import Sequence

import xarray as xr

from posterity.results.ratios import check_result, existing_heads, ratio, sum_over_heads, sum_readers

MIN_CREDIT = 0.1  # of an equal part of the layer's credit, below which a head's share is not reported
MAX_ERROR = 0.25  # standard error of a self share, above which a head's share is not reported


@check_result
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


@check_result
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


@check_result
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
