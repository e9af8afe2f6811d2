"""Pictures of a clause: the audit of one model as its charts read it, and the plotly traces that they are made of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.basedatatypes import BaseTraceType

from posterity.palette import COUNT, DIVERGING, EMPTY, OTHER, SELF, SEQUENTIAL
from posterity.results.formatting import json_numbers

CELL = "layer %{y}, head %{x}: "  # begins the hover text of a map
CATEGORIES = (EMPTY, SELF, OTHER)  # colours of elsewhere, self, and another position


@dataclass(frozen=True)
class Chart:
    """A picture: traces on one pair of axes, with a title and a sentence; the page gives it size and look."""

    title: str
    text: str
    traces: Sequence[BaseTraceType]
    x: str = ""  # titles of the axes
    y: str = ""
    log: str = ""  # axes with a log scale: "x", "y" or "xy"
    y_range: tuple[float, float] | None = None
    colours: Mapping[str, Any] | None = None  # plotly's colour axis, of a map


class View(Mapping[str, xr.DataArray]):
    """The audit of one model as its charts read it: `audit["look_back_share"]` or `audit.look_back_share`.

    Coordinates that only other clauses or models have (a layer, a lag) are left out.
    """

    def __init__(self, audit: xr.Dataset, model: str):
        """Select one model of an audit."""
        self._audit = audit.sel(model=model, drop=True)

    def __getitem__(self, name: str) -> xr.DataArray:
        variable = self._audit[name]
        for dim in variable.dims:
            if variable.dtype.kind == "f":
                variable = variable.dropna(dim, how="all")
        return variable.transpose(*self._audit[name].dims)

    def __getattr__(self, name: str) -> xr.DataArray:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of variables that hold a number for this model."""
        variables = self._audit.data_vars.items()
        return (str(name) for name, variable in variables if variable.dtype.kind != "f" or variable.notnull().any())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in set(self)


def measured_line(name: str, x: Any, y: Any, error: Any = None, **style: Any) -> go.Scatter:
    """Draw points joined by a line, with error bars where errors are known; `style` is of plotly's Scatter."""
    trace: dict[str, Any] = {"mode": "lines+markers", "name": name, "x": np.asarray(x).tolist(), "y": json_numbers(y)}
    if error is not None:
        trace["error_y"] = {"type": "data", "array": json_numbers(error), "thickness": 1}
    return go.Scatter(trace | style)


def expected_line(name: str, x: Any, y: Any, **style: Any) -> go.Scatter:
    """Draw what counting or chance predicts."""
    dotted = {"line": {"dash": "dot", "color": COUNT}, "marker": {"color": COUNT}}
    return measured_line(name, x, y, **dotted, **style)


def bars(x: Sequence[str], y: Any, error: Any = None) -> go.Bar:
    """Draw a bar for each name, with error bars where errors are known."""
    error_bars = {} if error is None else {"error_y": {"type": "data", "array": json_numbers(error)}}
    return go.Bar(x=list(x), y=json_numbers(y), **error_bars)


def head_map(values: Any, **style: Any) -> go.Heatmap:
    """Draw a map of heads, across, and layers, down; labelled values have their own numbers of layers and heads."""
    if isinstance(values, xr.DataArray):
        values = values.transpose("layer", "head")
        style = {"x": values["head"].values.tolist(), "y": values["layer"].values.tolist()} | style
    trace = {"z": json_numbers(values), "coloraxis": "coloraxis", "hoverongaps": False}
    return go.Heatmap(trace | {"hovertemplate": CELL + "%{z:.4~g}<extra></extra>"} | style)


def category_map(values: xr.DataArray, names: Mapping[int, str]) -> go.Heatmap:
    """Draw a map of heads and layers whose values stand for names."""
    cells = json_numbers(values.transpose("layer", "head"))
    text = [["" if cell is None else names[int(cell)] for cell in row] for row in cells]
    return head_map(values, text=text, hovertemplate=CELL + "%{text}<extra></extra>")


def centred_colours(limit: float | None = None) -> dict[str, Any]:
    """Return colours for numbers on both sides of zero, up to a limit or the largest."""
    return {"colorscale": DIVERGING, **({"cmid": 0} if limit is None else {"cmin": -limit, "cmax": limit})}


def growing_colours(**ends: float) -> dict[str, Any]:
    """Return colours for numbers that grow from zero; `ends` are plotly's cmin and cmax."""
    return {"colorscale": SEQUENTIAL, **ends}


def category_colours(names: Mapping[int, str]) -> dict[str, Any]:
    """Return colours with sharp edges for three values that stand for names."""
    number = len(CATEGORIES)
    edges = [((index + end) / number, colour) for index, colour in enumerate(CATEGORIES) for end in (0, 1)]
    bar = {"tickvals": list(names), "ticktext": list(names.values())}
    return {"colorscale": edges, "cmin": -0.5, "cmax": number - 0.5, "colorbar": bar}
