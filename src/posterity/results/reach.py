"""How far back a layer or head reaches: the lags that hold most of the attention, mass and credit, and windows."""

import math
from collections.abc import Sequence

import numpy as np
import xarray as xr

from posterity.axes import QUANTITIES, STREAMS
from posterity.errors import InputError
from posterity.results.lag_bins import lag_at_share
from posterity.results.ratios import check_result, describe, ratio, require_lags, required_variable, sum_over_heads

LEVELS = (0.5, 0.9, 0.95, 0.99)
_BY = ((), ("layer",), ("layer", "kv_head"))


@check_result
def reach(
    result: xr.Dataset,
    by: Sequence[str] = ("layer", "kv_head"),
    levels: Sequence[float] | float = LEVELS,
    reader_of: str = "rest",
) -> xr.Dataset:
    """Return the lag within which a share of attention, mass and credit lies, and what a window would cover.

    Attention says what the forward pass reads, mass how much gradient passes over the edges, whatever its sign, credit
    how much of the gradient they make in the end. Edges into the first keys of a document (attention sinks, attribute
    `sinks`) are left aside: a window that keeps those keys covers them.

    The lag of a level is the smallest from which on the share within it stays at the level or above (credit can be
    negative in a bin). Within a bin everything is taken as evenly spread. Its error is half the width of the interval
    between the lags at which the share plus and minus its standard error reach the level (Woodruff 1952, JASA 47).

    Args:
        result: A result of `posterity.measure`, with lags="octaves" or "all".
        by: (), ("layer",) or ("layer", "kv_head").
        levels: Shares between 0 and 1.
        reader_of: Which edges count for `lag`: "rest" (without the first keys) or "all".

    Returns:
        `lag` and `error`: units tokens, dims (*by, quantity, level). NaN for a head that the layer does not have, or
        whose credit is not positive.
        `covered` and `covered_error`: the share of all edges that the first keys and the lags below a window hold;
        units 1, dims (*by, quantity, window), windows of powers of two below the context.
        The quantities: attention; query, key and value mass; query, key and value credit.

    Raises:
        InputError: An argument is none of these; the lags were not measured, or by an earlier version.
    """
    if tuple(by) not in _BY or isinstance(by, str):
        raise InputError(f"by expects one of {', '.join(map(repr, _BY))}; got {by!r}")
    levels = (levels,) if isinstance(levels, int | float) else tuple(levels)
    if not levels or not all(0 < level < 1 for level in levels):
        got = ", ".join(map(str, levels)) or "none"
        raise InputError(f"levels expects shares between 0 and 1, such as 0.95; got {got}")
    if reader_of not in ("rest", "all"):
        raise InputError(f"reader_of expects 'rest' or 'all'; got {reader_of!r}")
    moments = required_variable(result, "tail_moment")
    require_lags(result)
    tails = _tails_of_groups(result, moments) if "kv_head" in by else _tails_of_documents(result, by)
    share, error = (_append_zero(tails[f"{reader_of}_{kind}"]) for kind in ("share", "error"))
    middle, early, late = (_reach_levels(result, x, levels) for x in (share, share - error, share + error))
    windows = [2**n for n in range(int(result.lag_end.max()).bit_length()) if 2**n in result.lag.values]
    beyond = tails.sel(lag=windows).rename(lag="window").drop_vars("lag_end", errors="ignore")
    return xr.Dataset(
        {
            "lag": describe(middle, "lag within which a share lies", "tokens"),
            "error": describe((late - early) / 2, "half of the interval of its standard error", "tokens"),
            "covered": describe(1 - beyond.whole_share, "share at the first keys and below a window"),
            "covered_error": describe(beyond.whole_error, "standard error over documents"),
        },
        attrs={"sinks": result.attrs.get("sinks", "")},
    )


def _quantities(result: xr.Dataset, attention: str, mass: str, credit: str) -> xr.DataArray:
    """Return three variables as one along `quantity`."""
    parts = [required_variable(result, attention).expand_dims("quantity")]
    for name in (mass, credit):
        values = required_variable(result, name)
        parts += [values.sel(stream=stream, drop=True).expand_dims("quantity") for stream in STREAMS]
    joined = xr.concat(parts, "quantity", coords="minimal", compat="override", join="override")
    return joined.assign_coords(quantity=list(QUANTITIES))


def _tail(by_lag: xr.DataArray) -> xr.DataArray:
    """Add up each bin and all later ones."""
    return (
        by_lag.isel(lag=slice(None, None, -1))
        .cumsum("lag", skipna=False)
        .isel(lag=slice(None, None, -1))
        .assign_coords(by_lag.coords)
    )


def _tails_of_documents(result: xr.Dataset, by: Sequence[str]) -> xr.Dataset:
    """Return the shares of each bin and all later ones, with errors, from a row for each document."""
    values = _quantities(result, "attention_by_document", "mass_by_document", "profile_by_document")
    values = sum_over_heads(result, values, by)
    rest, everything = _tail(values.sel(reader_of="rest", drop=True)), _tail(values.sum("reader_of", skipna=False))
    total, whole = (x.isel(lag=0, drop=True) for x in (rest, everything))
    pairs = {"rest": (rest, total), "whole": (rest, whole), "all": (everything, whole)}
    shares = {name: ratio(*pair) for name, pair in pairs.items()}
    return xr.Dataset({f"{name}_{kind}": x[kind] for name, x in shares.items() for kind in ("share", "error")})


def _tails_of_groups(result: xr.Dataset, moments: xr.DataArray) -> xr.Dataset:
    """Return the same for each key/value head, from second moments over documents."""
    values = sum_over_heads(result, _quantities(result, "attention", "mass", "credit"), ("layer", "kv_head"))
    rest, everything = _tail(values.sel(reader_of="rest", drop=True)), _tail(values.sum("reader_of", skipna=False))
    moments = moments.rename(group="kv_head")
    documents = result.sizes["document"]
    spread = documents / (documents - 1) if documents > 1 else math.nan
    pairs = {
        "rest": (rest, rest, "rest . rest", "rest . rest total", "rest . rest total"),
        "whole": (rest, everything, "rest . rest", "rest . total", "all . total"),
        "all": (everything, everything, "all . all", "all . total", "all . total"),
    }
    tails = {}
    for name, (tail, of_total, square, product, total_square) in pairs.items():
        total = of_total.isel(lag=0, drop=True)
        share = tail / total
        squared = moments.sel(moment=total_square, drop=True).isel(lag=0, drop=True)
        residual = (
            moments.sel(moment=square, drop=True)
            - 2 * share * moments.sel(moment=product, drop=True)
            + share**2 * squared
        )
        tails[f"{name}_share"] = share
        tails[f"{name}_error"] = (spread * residual.clip(min=0)) ** 0.5 / abs(total)
    return xr.Dataset(tails).transpose("layer", "kv_head", "quantity", "lag")


def _append_zero(tails: xr.DataArray) -> xr.DataArray:
    """Append the tail beyond the last bin, which is 0; NaN where the others are."""
    last = tails.isel(lag=-1)
    return xr.concat([tails, last.where(last.isnull(), 0.0)], "lag", coords="minimal", compat="override")


def _reach_levels(result: xr.Dataset, tail_share: xr.DataArray, levels: Sequence[float]) -> xr.DataArray:
    """Return the lag of each level from the shares of each bin and all later ones, and of nothing behind the last."""
    first, last = result.lag.values, result.lag_end.values
    within = 1 - tail_share.transpose(..., "lag").values  # before each bin, and at the end
    lags = []
    for level in levels:
        below = within < level
        below[..., 0] = True
        bin_number = np.minimum(below.shape[-1] - 1 - below[..., ::-1].argmax(-1), len(first) - 1)
        before, after = (np.take_along_axis(within, x[..., None], -1)[..., 0] for x in (bin_number, bin_number + 1))
        lag = lag_at_share(level, before, after, first[bin_number], last[bin_number])
        lags.append(np.where(np.isnan(within).any(-1), math.nan, lag))
    labels = tail_share.isel(lag=0, drop=True).drop_vars("lag_end", errors="ignore")
    reached = xr.DataArray(np.stack(lags, -1), dims=(*labels.dims, "level"), coords=labels.coords)
    return reached.assign_coords(level=list(levels))
