"""How far back each layer reaches: the lags within which shares of attention and credit lie, as a figure and tables."""

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from posterity.palette import ATTENTION, OTHER, SELF
from posterity.reporting.credit_charts import depths
from posterity.reporting.panel_grid import Panel, PanelGrid
from posterity.reporting.result_group import NamedResult, ResultGroup
from posterity.reporting.result_words import sink_number
from posterity.reporting.tables import NumberTable, format_cells
from posterity.reporting.traces import line, points
from posterity.results.formatting import percent, tokens_text
from posterity.results.ratios import has_fine_lags
from posterity.results.stats import reach, uncertainty

LEVELS = (0.5, 0.9, 0.99)
QUANTITIES = {"attention": ATTENTION, "key credit": OTHER, "value credit": SELF}


def has_lags(result: xr.Dataset) -> bool:
    """Return whether a result has what `reach` needs: documents by lag, in bins that are not wider than their lags."""
    measured = "attention_by_document" in result and "tail_moment" in result and result.sizes["lag"] > 1
    return measured and has_fine_lags(result)


def draw_reach(group: ResultGroup) -> PanelGrid:
    """Draw, by layer, the lag within which shares of attention, key credit and value credit lie; first keys apart."""
    title = "How far back each layer reaches"
    members = [member for member in group.members if has_lags(member.result)]
    if not members:
        return PanelGrid(title, [], height=0)
    reaches = [reach(member.result, ("layer",), LEVELS) for member in members]
    places, axis = depths(members)
    last = max(int(member.result.lag_end[-1]) for member in members)
    numbers = [0, *(4**power for power in range(math.ceil(math.log(last + 1, 4)) + 1))]
    y = {
        "title": "lag (tokens; log scale of lag + 1)", "type": "log", "range": [0, math.log10(last + 2)],
        "tickvals": [number + 1 for number in numbers], "ticktext": list(map(str, numbers)),
    }  # fmt: skip
    panels = []
    for level in LEVELS:
        traces: list[go.Scatter] = []
        for member, x, lags in zip(members, places, reaches, strict=True):
            for quantity, colour in QUANTITIES.items():
                if group.single or quantity == "value credit":
                    traces.append(_line(group, member, x, lags.sel(quantity=quantity, level=level), quantity, colour))
        what = "" if group.single else "value credit: "
        panels.append(Panel(f"{what}{100 * level:.0f} % within", traces, axis, y))
    return PanelGrid(title, panels, height=260, note=f"without {group.first_positions}")


def _line(
    group: ResultGroup, member: NamedResult, x: np.ndarray, lags: xr.Dataset, quantity: str, colour: str
) -> go.Scatter:
    """Draw one quantity; its errors are in the labels, as bands of several would hide each other."""
    name, colour = group.label(member, quantity), group.colour(member, colour)
    lag, error = lags.lag.values, member.uncertainty(lags.error.values)
    labels = format_cells(_lag_text, lag, error).tolist()
    return line(name, x, lag + 1, colour, hover="%{customdata}", customdata=labels, **points(x))


def _lag_text(lag: float, error: float) -> str:
    if math.isnan(lag) or math.isnan(error):
        return tokens_text(lag)
    return f"{lag:.0f} ± {error:.0f} tokens" if error >= 0.5 else tokens_text(lag)


def reach_tables(result: xr.Dataset) -> dict[str, list[NumberTable]]:
    """Return the tables of the figure: lags by layer, and what windows cover in the whole model."""
    if not has_lags(result):
        return {}
    windows = result.sizes["document"]
    names = list(QUANTITIES)
    layers = reach(result, ("layer",), LEVELS).sel(quantity=names)
    cells = format_cells(_lag_text, *_stacked(layers.lag, uncertainty(layers.error, windows), "layer"))
    head = ("layer", *(f"{name}, {100 * level:.0f} %" for name in names for level in LEVELS))
    modules = result.module.values.tolist()
    rows = [(str(layer), module, row) for layer, (module, row) in enumerate(zip(modules, cells.tolist(), strict=True))]
    model = reach(result, ()).sel(quantity=names)
    covered = format_cells(percent, *_stacked(model.covered, uncertainty(model.covered_error, windows), "window"))
    sinks = sink_number(result)
    labels = [f"first {sinks} + last {window}" if sinks else f"last {window}" for window in model.window.values]
    table = [(label, "", row) for label, row in zip(labels, covered.tolist(), strict=True)]
    return {
        "reach": [
            NumberTable("Covered by a window, all layers", ("kept positions", *names), table),
            NumberTable("Lag within which a share lies, in tokens", head, rows),
        ]
    }


def _stacked(values: xr.DataArray, errors: xr.DataArray, rows: str) -> list[np.ndarray]:
    """Return two arrays with one row for each label of `rows`, all else in columns."""
    arrays: list[Any] = [array.transpose(rows, "quantity", ...) for array in (values, errors)]
    return [array.values.reshape(array.sizes[rows], -1) for array in arrays]
