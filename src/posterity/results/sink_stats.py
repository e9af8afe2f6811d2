"""What the first keys of a document get of credit and of attention weight; public in `posterity.stats`."""

from collections.abc import Sequence

import xarray as xr

from posterity.results.ratios import check_result, describe, existing_heads, ratio, sum_over_heads, sum_readers


@check_result
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


@check_result
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


@check_result
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


@check_result
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
