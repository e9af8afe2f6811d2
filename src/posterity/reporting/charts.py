"""The numbers behind the charts of the page: a result as plain lists, with None where a number is not known."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import xarray as xr

from posterity.reporting.inspected_text import glass
from posterity.reporting.summary import portions
from posterity.results import schema as results
from posterity.results import stats as derived
from posterity.results import steps

EXACT = 16  # positions that have a bin of their own; the rest is binned by quarter octaves, as lags are


def charts(result: xr.Dataset) -> dict:
    """Everything the script draws for one result, as JSON holds it; of several steps, the last, and what they show."""
    over_steps, result = result, steps.latest(result)
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
        "payers": _payers(result) if "loss_credit" in result else None,
        "modules_paid": _modules(result) if "parameter_by_document" in result else None,
        "horizons": _horizons(result) if "horizon_by_document" in result else None,
        "glass": glass(result),
        "training": _training(over_steps) if "step" in over_steps.dims else None,
        "training_paid": _training_paid(over_steps) if {"step", "part"} <= set(over_steps.dims) else None,
        "training_angle": _training_angle(over_steps) if {"step", "part"} <= set(over_steps.dims) else None,
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
    start = bins(length)
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


def _training(result: xr.Dataset) -> dict:
    """Self share by step, of the model and of every layer."""
    model, layers = (derived.shares(result, by).sel(side="self") for by in ((), ("layer",)))
    return _over_steps(model, layers, _streams)


def _training_paid(result: xr.Dataset) -> dict:
    """Own share by step, of the model and of every layer."""
    model, layers = (derived.who_pays(result, by).sel(part="own") for by in ((), ("layer",)))

    def written(values: xr.DataArray) -> dict:
        return {one: _numbers(values.sel(written=one)) for one in results.WRITTEN}

    return _over_steps(model, layers, written)


def _over_steps(model: xr.Dataset, layers: xr.Dataset, split: Callable[[xr.DataArray], dict]) -> dict:
    """Shares of the model with their errors, and of every layer, along steps; `split` names what has a panel each."""
    return {
        "step": model.step.values.tolist(),
        "share": split(model.share),
        "error": split(model.error),
        "layers": split(layers.share.transpose("layer", ...)),
    }


def _training_angle(result: xr.Dataset) -> dict:
    """Angle between own and later losses by step: at every layer's input, and of all parameters together."""
    found = derived.angles(result)
    return {
        "step": result.step.values.tolist(),
        "share": {str(name): _numbers(one) for name, one in found.items() if "layer" not in one.dims},
        "layers": {"hidden": _numbers(found.layer_hidden.transpose("layer", "step")), "parameters": []},
    }


def _payers(result: xr.Dataset) -> dict:
    """Own and later losses: by layer, at the layers' inputs, and by bins of positions."""
    found, hidden, start = derived.who_pays(result, ("layer",)), derived.hidden(result), bins(result.sizes["position"])
    share = derived.who_pays_by_position(result).transpose("written", "part", "position")
    binned = xr.DataArray(np.add.reduceat(share.values, start, axis=-1), dims=("written", "part", "bin"))
    return {
        "share": _written(found.share),
        "error": _written(found.error),
        "hidden": {name: _numbers(hidden[name]) for name in ("share", "error", "cosine")},
        "position": _written(binned.assign_coords(written=share.written, part=share.part)),
    }


def _modules(result: xr.Dataset) -> dict:
    """Own share of the gradient of the parameters by kind of module and layer."""
    names, found = modules(result)
    kinds = dict.fromkeys(kind for kind, layer in names if layer is not None)
    order = sorted(range(len(names)), key=lambda at: names[at][1] or 0)
    places = {kind: [at for at in order if names[at][0] == kind and names[at][1] is not None] for kind in kinds}
    return {
        kind: {"layer": [names[at][1] for at in of], **{name: _numbers(found[name][of]) for name in found}}
        for kind, of in places.items()
    }


def modules(result: xr.Dataset) -> tuple[list[tuple[str, int | None]], xr.Dataset]:
    """Kind and layer of the modules that have parameters (None: in no layer), and their `derived.parameters`.

    Modules of one kind in one layer (experts) are added up before the division.
    """
    names = [split(str(name)) for name in result.parameter.values]
    groups = {one: [at for at, other in enumerate(names) if other == one] for one in dict.fromkeys(names)}
    terms = result.parameter_by_document
    sums = [terms.isel(parameter=group).sum("parameter", skipna=False) for group in groups.values()]
    labels = _labels({kind for kind, layer in groups if layer is not None})
    found = derived.parameters(xr.Dataset({"parameter_by_document": xr.concat(sums, "parameter")}))
    return [(kind if layer is None else labels[kind], layer) for kind, layer in groups], found


def split(name: str) -> tuple[str, int | None]:
    """The kind of a module and its layer: the first number in its name; None if it has none."""
    words = name.split(".")
    numbers = [word.isascii() and word.isdecimal() and len(word) < 6 for word in words]
    layer = next((int(word) for word, number in zip(words, numbers, strict=True) if number), None)
    return ".".join("*" if number else word for word, number in zip(words, numbers, strict=True)), layer


def _labels(kinds: Iterable[str]) -> dict[str, str]:
    """What follows the number of the layer in each kind's name, or the whole name where that is not the only one."""
    short = {kind: kind.partition("*.")[2] or kind for kind in kinds}
    count = Counter(short.values())
    return {kind: label if count[label] == 1 else kind for kind, label in short.items()}


def _horizons(result: xr.Dataset) -> dict:
    """Credit that remains under each horizon, for the model and by layer, and the effective horizon of every head."""
    model, layers = derived.horizon_curve(result), derived.horizon_curve(result, ("layer",))
    reach = derived.effective_horizon(result, ("layer", "head"))
    hidden = derived.weak(result) | reach.isnull()
    return {
        "horizon": result.horizon.values.tolist(),
        "share": _streams(model.share),
        "error": _streams(model.error),
        "layers": _streams(layers.share),
        "reach": _streams(reach),
        "beyond": _streams((reach == math.inf).where(derived.present(result))),
        "weak": _streams(hidden.where(derived.present(result))),
    }


def _written(values: xr.DataArray) -> dict:
    """Numbers by what is written, then by part."""
    return {
        written: {part: _numbers(values.sel(written=written, part=part)) for part in results.PARTS}
        for written in results.WRITTEN
    }


def bins(length: int) -> np.ndarray:
    """First position of each bin."""
    octaves = (round(EXACT * 2 ** (step / 4)) for step in range(4 * max(length.bit_length(), 1)))
    return np.array([*range(min(EXACT, length)), *(edge for edge in octaves if edge < length)])


def _binned(share: xr.DataArray, start: np.ndarray) -> dict:
    values = share.transpose("stream", "position").values
    return dict(zip(results.STREAMS, map(_numbers, np.add.reduceat(values, start, axis=-1)), strict=True))


def _streams(values: xr.DataArray) -> dict:
    return {stream: _numbers(values.sel(stream=stream)) for stream in results.STREAMS}


def _numbers(values: xr.DataArray | np.ndarray) -> list:
    """Nested lists of numbers to six digits; None for what is not known or not finite."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(one) for one in value]
        return float(f"{value:.6g}") if math.isfinite(value) else None

    return plain(np.asarray(values, dtype=float).tolist())
