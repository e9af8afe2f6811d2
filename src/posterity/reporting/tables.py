"""The numbers of each chart as tables of text."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import xarray as xr

from posterity.reporting.charts import bins, modules
from posterity.reporting.summary import PAYERS
from posterity.results import schema as results
from posterity.results import stats as derived
from posterity.results import steps
from posterity.results.formatting import UNKNOWN, horizon_text, percent

ROUNDING = 1e-5  # of the largest part: the direction of a smaller one is rounding


@dataclass(frozen=True)
class Table:
    """A table with its caption; a row is its label, more words on the label ("" for none), and the cells."""

    caption: str
    head: tuple[str, ...]
    rows: list[tuple[str, str, list[str]]]


def tables(result: xr.Dataset) -> dict[str, list[Table]]:
    """Tables by the name of the chart they belong to; none for what was not measured."""
    over_steps, result = result, steps.latest(result)
    found = {"layers": [_self_shares(result)]}
    if "step" in over_steps.dims:
        found["training"] = [_training(over_steps)]
        if "loss_credit" in result:
            found["training_paid"] = [_training_paid(over_steps)]
            found["training_angle"] = [_training_angle(over_steps)]
    if "loss_credit" in result:
        found["payers"] = [_payers(result, written) for written in results.WRITTEN]
        found["inputs"] = [_inputs(result)]
        found["paid"] = [_positions(result)]
    if "parameter_by_document" in result:
        found |= _modules(result)
    if "horizon_by_document" in result:
        found["horizons"] = [_curves(result, stream) for stream in results.STREAMS]
        found["reach"] = [_reach(result, stream) for stream in results.STREAMS]
    return found


def _self_shares(result: xr.Dataset) -> Table:
    found = derived.shares(result, ("layer",)).sel(side="self")
    return Table("Self share by layer", ("layer", *results.STREAMS), _by_layer(result, _percents(found)))


def _training(result: xr.Dataset) -> Table:
    found = derived.shares(result).sel(side="self")
    return Table("Self share by training step", ("step", *results.STREAMS), _by_step(result, _percents(found)))


def _training_paid(result: xr.Dataset) -> Table:
    found = derived.who_pays(result).sel(part="own")
    return Table(
        "Share of the own loss by training step", ("step", *results.WRITTEN), _by_step(result, _percents(found))
    )


def _training_angle(result: xr.Dataset) -> Table:
    found = derived.angles(result)
    named = {"inputs of all layers": found.hidden}
    if "parameters" in found:
        named["all parameters"] = found.parameters
    named |= {f"input of layer {layer}": found.layer_hidden.sel(layer=layer) for layer in result.layer.values}
    cells = np.stack([_each(_degrees, one.values) for one in named.values()], -1)
    return Table("Angle between own and later losses by training step", ("step", *named), _by_step(result, cells))


def _by_step(result: xr.Dataset, cells: np.ndarray) -> list[tuple[str, str, list[str]]]:
    return [(str(step), "", row) for step, row in zip(result.step.values, cells.tolist(), strict=True)]


def _payers(result: xr.Dataset, written: str) -> Table:
    """The three parts and the cosines between them, for the model and by layer."""
    cells = []
    for by in ((), ("layer",)):
        share = derived.who_pays(result, by).sel(written=written)
        parts = derived.parts(result, by).sel(written=written)
        small = parts.norm < ROUNDING * parts.norm.max("part")
        cosines = [
            parts.cosine.sel(pair=pair, drop=True).where(~small.sel(part=list(pair.split(" . "))).any("part"))
            for pair in parts.pair.values
        ]
        cosine = _each(_number, np.stack(cosines, -1))
        cells += np.atleast_2d(np.concatenate([_percents(share), cosine], -1)).tolist()
    head = ("layer", *PAYERS.values(), *(f"cos({pair.replace(' . ', ', ')})" for pair in parts.pair.values))
    return Table(f"Who pays for the {written}s", head, [("all", "", cells[0]), *_by_layer(result, cells[1:])])


def _inputs(result: xr.Dataset) -> Table:
    found = derived.hidden(result)
    cells = zip(_percents(found), map(_number, found.cosine.values), strict=True)
    return Table("The residual stream at the layers' inputs", ("layer", "own loss", "cos(own, later)"),
                 _by_layer(result, map(list, cells)))  # fmt: skip


def _positions(result: xr.Dataset) -> Table:
    """Share of the whole credit in each bin of positions."""
    share = derived.who_pays_by_position(result).transpose("position", "written", "part")
    start = bins(result.sizes["position"])
    binned = np.add.reduceat(share.values, start, axis=0)
    paid = np.stack([binned[..., 0], binned[..., 1] + binned[..., 2]], -1).reshape(len(start), -1)
    end = [*(start[1:] - 1), result.sizes["position"] - 1]
    names = [str(one) if one == last else f"{one}–{last}" for one, last in zip(start, end, strict=True)]
    head = ("position", *(f"{written}, {payer}" for written in results.WRITTEN for payer in ("own", "later")))
    rows = [(name, "", [percent(one) for one in row]) for name, row in zip(names, paid, strict=True)]
    return Table("Share of the whole credit by position", head, rows)


def _modules(result: xr.Dataset) -> dict[str, list[Table]]:
    names, found = modules(result)
    share, cosine = dict(zip(names, _percents(found), strict=True)), dict(zip(names, found.cosine.values, strict=True))
    kinds = list(dict.fromkeys(kind for kind, layer in names if layer is not None))
    layers = sorted({layer for _, layer in names if layer is not None})
    tell = {"Own share": share.get, "Cosine between own and later": lambda name: _number(cosine.get(name, np.nan))}
    shown = [Table(caption, ("layer", *kinds),
                   [(str(layer), "", [cell((kind, layer)) or UNKNOWN for kind in kinds]) for layer in layers])
             for caption, cell in tell.items()]  # fmt: skip
    rest = [(kind, "", [share[kind, layer], _number(cosine[kind, layer])]) for kind, layer in names if layer is None]
    of_rest = [Table("Parameters of modules in no layer", ("module", "own loss", "cos(own, later)"), rest)]
    return ({"modules": shown} if kinds else {}) | ({"rest": of_rest} if rest else {})


def _curves(result: xr.Dataset, stream: str) -> Table:
    """Where the horizon curve reaches one half, and the curve, for the model and by layer."""
    cells = []
    for by in ((), ("layer",)):
        curve = _percents(derived.horizon_curve(result, by).sel(stream=stream))
        reach = _lengths(result, derived.effective_horizon(result, by).sel(stream=stream))
        cells += np.atleast_2d(np.concatenate([reach[..., None], curve], -1)).tolist()
    head = ("layer", "effective horizon", *(f"h = {h}" for h in result.horizon.values))
    return Table(f"Credit that remains, {stream}", head, [("all", "", cells[0]), *_by_layer(result, cells[1:])])


def _reach(result: xr.Dataset, stream: str) -> Table:
    reach = derived.effective_horizon(result, ("layer", "head")).where(~derived.weak(result)).sel(stream=stream)
    head = ("layer", *(f"head {head}" for head in range(result.sizes["head"])))
    return Table(f"Effective horizon, {stream}", head, _by_layer(result, _lengths(result, reach).tolist()))


def _by_layer(result: xr.Dataset, cells: Iterable[list[str]]) -> list[tuple[str, str, list[str]]]:
    return [(str(layer), str(module), row)
            for layer, (module, row) in enumerate(zip(result.module.values, cells, strict=True))]  # fmt: skip


def _percents(found: xr.Dataset) -> np.ndarray:
    return _each(percent, found.share.values, found.error.values)


def _lengths(result: xr.Dataset, reach: xr.DataArray) -> np.ndarray:
    ends = int(result.horizon[0]), int(result.horizon[-1])
    return _each(lambda one: horizon_text(one, *ends), reach.values)


def _each(tell: Callable[..., str], *numbers: np.ndarray) -> np.ndarray:
    cells = [tell(*one) for one in zip(*(x.ravel().tolist() for x in numbers), strict=True)]
    return np.array(cells, dtype=object).reshape(numbers[0].shape)


def _degrees(value: float) -> str:
    return UNKNOWN if np.isnan(value) else f"{value:.1f}°"


def _number(value: float) -> str:
    return UNKNOWN if np.isnan(value) else f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no minus before a zero
