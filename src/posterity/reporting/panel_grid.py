"""A figure of several panels: what is drawn, and how its panels stand at a width.

The columns follow the width; so do tick labels, legend lines and the length of a colour bar. Everything else does not,
so a page carries the traces once and a layout for each of a few widths.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import plotly.graph_objects as go
from plotly.basedatatypes import BaseTraceType
from plotly.subplots import make_subplots

from posterity.reporting.html import figure_text
from posterity.reporting.theme import TEMPLATE

# Attributes of a plotly axis, but that `title` is a plain text; `hover` of x is the first line of what a panel shows of
# a point, "TITLE %{x}" by default; `percent` of y says that traces and range are shares, which are drawn in percent.
Axis = dict[str, Any]

FULL_WIDTH = 1100  # pixels of a figure that stands alone
ONE_COLUMN = 620  # pixels below which panels stand one below the other
LETTER = 7.2  # pixels of a letter of a panel's title, at most
ROW_GAP, COLUMN_GAP, WIDE_COLUMN_GAP = 88, 34, 62  # pixels between panels; wide where each has its own y axis
LONGEST_BAR, BAR_MARGIN = 700, 32  # pixels of a colour bar, and, where it is narrow, at its ends
LEFT, RIGHT, TOP, TITLE, BOTTOM, LEGEND_LINE, COLOUR_BAR = 62, 12, 36, 40, 58, 28, 52  # pixels around the panels
PANEL_TITLE = 20  # pixels


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a title, traces, and the axes' attributes; those of x may depend on the panel's width."""

    title: str
    traces: Sequence[BaseTraceType]
    x: Axis | Callable[[float], Axis]
    y: Axis


@dataclass(frozen=True)
class PanelGrid:
    """Panels of one figure, row by row, and how they share axes and colours."""

    title: str
    panels: list[Panel]
    height: int  # pixels of one panel
    columns: int = 3  # where there is room
    narrowest: int = 0  # pixels that a column needs; 0: all columns from ONE_COLUMN on, one below it
    shared_y: bool = True
    colours: Callable[[float], dict[str, Any]] | None = None  # of heat maps, for the length of the colour bar in pixels
    note: str = ""  # what a saved figure says after its title
    views: Mapping[str, "PanelGrid"] = field(default_factory=dict)  # the same traces with other numbers, by name

    def figure(self, width: int = FULL_WIDTH) -> go.Figure:
        """Return the complete figure at a width in pixels, with its title."""
        return go.Figure(self.traces, self.layout(width, titled=True) | {"template": TEMPLATE})

    @cached_property
    def traces(self) -> list[dict[str, Any]]:
        """The traces with their axes, as plotly's JSON; each name is in the legend once."""
        names, traces = set(), []
        for number, panel in enumerate(self.panels):
            axes = {axis: axis[0] + _suffix(number) for axis in ("xaxis", "yaxis")}
            for trace in panel.traces:
                attributes = trace.to_plotly_json()
                if panel.y.get("percent"):
                    attributes = _in_percent(attributes)
                group = attributes.get("legendgroup")
                in_legend = bool(group) and attributes.get("showlegend", True) and group not in names
                names |= {group} if in_legend else set()
                traces.append(attributes | axes | {"showlegend": in_legend})
        return traces

    def layout(self, width: int, titled: bool = False) -> dict[str, Any]:
        """Return the layout at a width in pixels, but for the template; a page shows the title as a heading."""
        columns = self.columns if width >= ONE_COLUMN else 1
        if self.narrowest:
            columns = max(1, min(self.columns, width // self.narrowest))
        rows = math.ceil(len(self.panels) / columns)
        top = TOP + (PANEL_TITLE if any(panel.title for panel in self.panels) else 0) + (TITLE if titled else 0)
        bottom = BOTTOM + LEGEND_LINE * self._legend_lines(width) + (COLOUR_BAR if self.colours else 0)
        inner_width, inner_height = width - LEFT - RIGHT, rows * self.height + (rows - 1) * ROW_GAP
        gap = COLUMN_GAP if self.shared_y else WIDE_COLUMN_GAP
        room = (inner_width - (columns - 1) * gap) / columns
        axes = deepcopy(
            _subplot_axes(len(self.panels), columns, gap / inner_width, ROW_GAP / inner_height, self.shared_y)
        )
        for number, panel in enumerate(self.panels):
            x = panel.x(room) if callable(panel.x) else panel.x
            y = panel.y if number % columns == 0 or not self.shared_y else panel.y | {"title": ""}
            hover = x.get("hover", f"{x.get('title', '')} %{{x}}")
            axes[f"xaxis{_suffix(number)}"] |= _axis(x) | {"unifiedhovertitle": {"text": figure_text(hover)}}
            axes[f"yaxis{_suffix(number)}"] |= _axis(y)
        longest = max(12, int(room / LETTER))
        layout = axes | {
            "width": width, "height": inner_height + top + bottom,
            "margin": {"l": LEFT, "r": RIGHT, "t": top, "b": bottom},
            "hovermode": "closest" if self.colours else "x unified",
        }  # fmt: skip
        if any(panel.title for panel in self.panels):
            layout["annotations"] = [
                _panel_title(panel.title, number, longest) for number, panel in enumerate(self.panels) if panel.title
            ]
        if titled:
            layout["title"] = {"text": figure_text(self.title + (f" ({self.note})" if self.note else ""))}
        if self.colours:
            margin = LEFT if width >= ONE_COLUMN else BAR_MARGIN
            length = min(LONGEST_BAR, width)  # with its margins
            colours = self.colours(length - 2 * margin)
            layout["coloraxis"] = colours | {"colorbar": {"len": length, "xpad": margin, **colours.get("colorbar", {})}}
        return layout

    def _legend_lines(self, width: int) -> int:
        """Return how many lines the legend takes: plotly sets one that is too long for a line in equal columns."""
        widths = [58 + 6.8 * len(trace["name"]) for trace in self.traces if trace["showlegend"]]
        if sum(widths) <= width:
            return min(1, len(widths))
        return math.ceil(len(widths) / max(1, int(width / max(widths))))


def shorten(text: str, length: int) -> str:
    """Cut a text to a number of letters, the last of them an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


@cache
def _subplot_axes(panels: int, columns: int, gap_x: float, gap_y: float, shared_y: bool) -> dict[str, dict[str, Any]]:
    """Return domains, anchors and shared axes of panels in a grid; gaps are fractions of the plot."""
    rows = math.ceil(panels / columns)
    figure = make_subplots(
        rows, columns,
        shared_yaxes="all" if shared_y else False,  # pyright: ignore[reportArgumentType]
        horizontal_spacing=gap_x if columns > 1 else 0, vertical_spacing=gap_y if rows > 1 else 0,
        specs=[[{} if row * columns + column < panels else None for column in range(columns)] for row in range(rows)],
    )  # fmt: skip
    axes = figure.layout.to_plotly_json()
    return {name: axis for name, axis in axes.items() if name.startswith(("xaxis", "yaxis"))}


def _axis(axis: Axis) -> Axis:
    attributes = {name: value for name, value in axis.items() if name not in ("hover", "percent")}
    if axis.get("percent"):
        attributes["ticksuffix"] = " %"
        if "range" in axis:
            attributes["range"] = _percents(axis["range"])
    return attributes | {"title": {"text": figure_text(axis.get("title", ""))}}


def _in_percent(trace: dict[str, Any]) -> dict[str, Any]:
    """Return a trace of shares in percent."""
    error = trace.get("error_y")
    scaled = {"error_y": error | {"array": _percents(error["array"])}} if error else {}
    return trace | {"y": _percents(trace["y"])} | scaled


def _percents(shares: Sequence[float | None]) -> list[float | None]:
    return [None if share is None else 100 * share for share in shares]


def _panel_title(title: str, number: int, longest: int) -> dict[str, str]:
    text = f"<b>{figure_text(shorten(title, longest))}</b>"
    return {"text": text, "xref": f"x{_suffix(number)} domain", "yref": f"y{_suffix(number)} domain"}


def _suffix(number: int) -> str:
    """Return what plotly adds to the names of a panel's axes."""
    return str(number + 1) if number else ""
