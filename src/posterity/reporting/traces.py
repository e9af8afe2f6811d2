"""Traces and axes that several charts share: lines with bands, layers, log scales of lags and positions."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go

from posterity.palette import AXIS, COUNT, depth_colour
from posterity.reporting.bins import bin_middles, bin_names, single_shares
from posterity.reporting.html import figure_text
from posterity.reporting.panel_grid import Axis
from posterity.reporting.result_group import NamedResult, ResultGroup
from posterity.results.formatting import UNKNOWN, json_numbers, percent

PERCENT = {"percent": True, "rangemode": "tozero"}
LOG_PERCENT = {"percent": True, "type": "log", "dtick": 1, "tickformat": ".3~r"}
ZERO_LINE = {"zeroline": True, "zerolinecolor": AXIS}
SHARE = "%{y:.1f} %"  # the label of a point of a share
EDGES = "counting edges alone"
BEHIND: dict[str, Any] = {"legendrank": 1001}  # what a line is compared with stands behind it in the legend
LONG_TITLE = 300  # pixels that the title of an axis with a log scale needs
TICK, LAYER_TICK = 34, 24  # pixels that a label on a log scale needs, and the number of a layer
NARROWEST = 270  # pixels of a column that shows one of several results


# ---- lines


def line(name: str, x: Any, y: Any, colour: str, dash: str = "solid", hover: str = SHARE, **style: Any) -> go.Scatter:
    """Draw a line with its place in the legend; numbers that are not known leave a gap."""
    trace = {
        "mode": "lines", "name": figure_text(name), "legendgroup": name, "x": json_numbers(x), "y": json_numbers(y),
        "hovertemplate": hover, "line": {"color": colour, "width": 2.2, "dash": dash},
    }  # fmt: skip
    return go.Scatter(trace | style)


def counting_line(name: str, x: Any, y: Any, colour: str = COUNT, hover: str = SHARE, **style: Any) -> go.Scatter:
    """Draw what counting edges alone would give."""
    dashed = {"line": {"color": colour, "width": 1.4, "dash": "dash"}}
    return line(name, x, y, colour, hover=hover, **dashed, **BEHIND, **style)


def band(name: str, x: Any, y: Any, error: Any, colour: str, **style: Any) -> list[go.Scatter]:
    """Draw an error on both sides of a line; nothing if none is known."""
    y, error = np.asarray(y, dtype=float), np.asarray(error, dtype=float)
    if not np.isfinite(error).any():
        return []
    edge = {
        "mode": "lines", "x": json_numbers(x), "legendgroup": name, "line": {"width": 0, "color": colour},
        "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip
    filled = {"fill": "tonexty", "fillcolor": colour + "33"}
    return [
        go.Scatter(edge | style, y=json_numbers(y - error)),
        go.Scatter(edge | style | filled, y=json_numbers(y + error)),
    ]


def result_line(
    group: ResultGroup, member: NamedResult, name: str, x: Any, y: Any, colour: str, error: Any = None,
    hover: str = SHARE,
) -> list[go.Scatter]:  # fmt: skip
    """Draw the line of one result with its band and a marker at every point."""
    label, colour = group.label(member, name), group.colour(member, colour)
    if error is None:
        return [line(label, x, y, colour, hover=hover, **points(x))]
    error = member.uncertainty(error)
    return [*band(label, x, y, error, colour), line(label, x, y, colour, **share_labels(y, error), **points(x))]


def share_labels(share: Any, error: Any) -> dict[str, Any]:
    """Return the labels of the points of a line: each share with its error where it is known."""
    pairs = zip(np.asarray(share, dtype=float), np.asarray(error, dtype=float), strict=True)
    return {"customdata": [percent(float(share), float(error)) for share, error in pairs], "hover": "%{customdata}"}


def points(x: Any) -> dict[str, Any]:
    """Return the style of a line through few points, such as layers: a marker at each; one or two are markers only."""
    return {"mode": "markers"} if len(x) < 3 else {"mode": "lines+markers", "marker": {"size": 4.5}}


def depth_lines(group: ResultGroup, x: Any, layers: Any) -> list[go.Scatter]:
    """Draw the layers of a single result as thin lines in the colours of their depth; none of several results.

    Args:
        group: The results of the page.
        x: The axis that every layer has.
        layers: Numbers by layer and x.
    """
    if not group.single or len(layers) < 2:
        return []
    return [_depth_line(x, y, layer, len(layers)) for layer, y in enumerate(layers)]


def _depth_line(x: Any, y: Any, layer: int, layers: int) -> go.Scatter:
    name = {0: "first layer", layers - 1: "last layer"}.get(layer)
    colour = depth_colour(layer / (layers - 1))
    legend = {"name": name, "legendgroup": name, "legendrank": 1002} if name else {}
    single = {"mode": "markers", "marker": {"color": colour, "size": 4}}
    curve = {"mode": "lines", "line": {"color": colour, "width": 1.6 if name else 1}}
    return go.Scatter(
        x=json_numbers(x), y=json_numbers(y), hoverinfo="skip", showlegend=name is not None,
        opacity=1 if name else 0.7, **legend, **(single if len(x) < 2 else curve),
    )  # fmt: skip


def by_position(bins: tuple[np.ndarray, np.ndarray], share: Any) -> dict[str, Any]:
    """Return the numbers of a line by position: the share of one position of each bin (first positions, last ones)."""
    single = single_shares(share, *bins)
    labels = [[name, fine_percent(value)] for name, value in zip(bin_names(*bins), single, strict=True)]
    hover = "position %{customdata[0]}: %{customdata[1]}"
    return {"x": bin_middles(*bins), "y": single, "customdata": labels, "hover": hover}


def fine_percent(share: float, error: float = math.nan) -> str:
    """Format a share of one position or lag in percent, with three digits: "0.0123 ± 0.0004 %"."""
    if math.isnan(share):
        return UNKNOWN
    digits = max(0, 2 - math.floor(math.log10(abs(100 * share)))) if share else 0
    more = "" if math.isnan(error) else f" ± {100 * error:.{digits}f}"
    return f"{100 * share:.{digits}f}{more} %"


def position_points(bins: tuple[np.ndarray, np.ndarray], colour: str) -> dict[str, Any]:
    """Return the style of a line by position: a large marker at the first, small ones behind it."""
    size = [9, *[3] * (len(bins[0]) - 1)]
    return {"mode": "lines+markers", "marker": {"size": size, "color": colour, "opacity": 1, "line": {"width": 0}}}


# ---- axes


def log_axis(last: int, zero: str, title: str) -> Callable[[float], Axis]:
    """Return the axis of lags or positions: number + 1 on a log scale, with a word for number 0."""

    def axis(room: float) -> Axis:
        step = 2 ** max(1, math.ceil(TICK * math.log2(last + 2) / room))
        numbers, number = [0], 1
        while number <= last:
            numbers.append(number)
            number *= step
        return {
            "type": "log", "title": title if room > LONG_TITLE else title.partition(";")[0] + ")",
            "hover": f"by {title.split()[0]}", "range": [0, math.log10(last + 2)],
            "tickvals": [math.sqrt((number + 1) * (number + 2)) for number in numbers],
            "ticktext": [zero, *map(str, numbers[1:])],
        }  # fmt: skip

    return axis


def position_axes(last: int) -> dict[str, Any]:
    """Return the two log scales of shares by position."""
    return {
        "x": log_axis(last, "first", "position (tokens; log scale of position + 1)"),
        "y": {"title": "share of one position", **LOG_PERCENT},
    }


def layer_axis(layers: int) -> Callable[[float], Axis]:
    """Return the axis of layers."""
    return lambda room: {
        "title": "layer", "range": [-0.5, layers - 0.5], "tick0": 0, "dtick": math.ceil(LAYER_TICK * layers / room),
    }  # fmt: skip


def spaced(numbers: list[int], room: float) -> list[int]:
    """Return as many numbers, from the last one back, as have their place on a log scale that is `room` pixels wide."""
    step = math.ceil(len(numbers) / max(1, int(room / TICK)))
    return numbers[::-1][::step][::-1]


def grid_by_result(members: list[NamedResult], columns: int = 3) -> dict[str, Any]:
    """Return the columns of a grid in which every result has panels of its own: one for each of several results."""
    return {"columns": columns} if len(members) == 1 else {"columns": len(members), "narrowest": NARROWEST}
