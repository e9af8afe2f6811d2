"""Shares in the gradients of weights and of adapters, and how well windows agree; public in `posterity.stats`."""

import math
from collections.abc import Sequence

import xarray as xr

from posterity.axes import TERMS
from posterity.errors import InputError
from posterity.results.ratios import check_result, describe, ratio, required_variable, sum_over_heads


@check_result
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


@check_result
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


def _self_part(norms: xr.DataArray) -> xr.DataArray:
    """Return the inner product of the self part with the whole."""
    return norms.sel(term=["self", "inner"]).sum("term", skipna=False)


def _weight_parts(norms: xr.DataArray) -> xr.DataArray:
    """Return the squared norms of the self part, the other part and the whole, along `part`."""
    own, other, inner = (norms.sel(term=term, drop=True) for term in TERMS)
    return xr.concat([own, other, own + other + 2 * inner], xr.Variable("part", ["self", "other", "whole"]))
