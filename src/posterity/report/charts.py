"""The numbers behind the charts of the page: a result as plain lists, with None where a number is not known."""

import math
from typing import Any

import numpy as np
import xarray as xr

from posterity import derived
from posterity import result as results
from posterity.summary import portions

EXACT = 16  # positions that have a bin of their own; the rest is binned by quarter octaves, as lags are


def charts(result: xr.Dataset) -> dict:
    """Everything the script draws for one result, as JSON holds it."""
    by_layer, first = derived.shares(result, ("layer",)).sel(side="self"), derived.first_position(result, ("layer",))
    return {
        "layers": result.sizes["layer"],
        "heads": result.sizes["head"],
        "modules": [str(module) for module in result.module.values],
        "map": _map(result),
        "lags": _lags(result),
        "layer": {
            "share": _streams(by_layer.share),
            "error": _streams(by_layer.error),
            "counted": _numbers(derived.counts(result, ("layer",)).isel(lag=0)),
        },
        "first": {
            "share": _streams(first.share),
            "error": _streams(first.error),
            "attention": _numbers(derived.attention_first(result, ("layer",))),
        },
        "position": _positions(result),
        "weights": _weights(result) if "weight_mean" in result else None,
    }


def _map(result: xr.Dataset) -> dict:
    found = derived.shares(result, ("layer", "head")).sel(side="self")
    return {
        "share": _streams(found.share),
        "error": _streams(found.error),
        "portion": _streams(portions(result)),
        "weak": _streams(derived.weak(result).where(derived.present(result))),
    }


def _lags(result: xr.Dataset) -> dict:
    found = derived.profile(result)
    return {
        "start": result.lag.values.tolist(),
        "end": result.lag_end.values.tolist(),
        "share": _streams(found.share),
        "error": _streams(found.error),
        "counted": _numbers(found.counted),
        "attention": _numbers(derived.attention_profile(result)),
    }


def _positions(result: xr.Dataset) -> dict:
    """Share of the whole credit by side and by bins of positions, and what counting alone gives where that is known."""
    length = result.sizes["position"]
    start = _bins(length)
    credit = result.credit_by_position.where(derived.present(result), 0.0).sum(("layer", "head"), skipna=False)
    share = credit / credit.sum(("side", "position"), skipna=False)
    binned = {side: _binned(share.sel(side=side), start) for side in results.SIDES}
    edges = result.edges / result.edges.sum("lag")
    readers = np.arange(length, 0, -1)
    full = np.add.reduceat(readers, result.lag.values) / readers.sum()
    counted = None
    if np.allclose(edges, full, rtol=1e-9, atol=0):  # plain causal masks without padding: every pair is an edge
        key = _numbers(np.add.reduceat(readers / readers.sum(), start))
        counted = {"query": _numbers(np.add.reduceat(readers[::-1] / readers.sum(), start)), "key": key, "value": key}
    return {"start": start.tolist(), "end": [*(start[1:] - 1).tolist(), length - 1], **binned, "counted": counted}


def _weights(result: xr.Dataset) -> dict:
    found = derived.weights(result, ("layer",))
    return {
        "share": _streams(found.share),
        "error": _streams(found.error),
        "mean": _streams(found.share_mean),
        "agreement": {str(part): _streams(found.agreement.sel(part=part)) for part in found.part.values},
    }


def _bins(length: int) -> np.ndarray:
    octaves = (round(EXACT * 2 ** (step / 4)) for step in range(4 * max(length.bit_length(), 1)))
    return np.array([*range(min(EXACT, length)), *(edge for edge in octaves if edge < length)])


def _binned(share: xr.DataArray, start: np.ndarray) -> dict:
    values = share.transpose("stream", "position").values
    return dict(zip(results.STREAMS, map(_numbers, np.add.reduceat(values, start, axis=-1)), strict=True))


def _streams(values: xr.DataArray) -> dict:
    return {stream: _numbers(values.sel(stream=stream)) for stream in results.STREAMS}


def _numbers(values: xr.DataArray | np.ndarray) -> list:
    """Nested lists of numbers to six digits; None for what is not known."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(one) for one in value]
        return None if math.isnan(value) else float(f"{value:.6g}")

    return plain(np.asarray(values, dtype=float).tolist())
