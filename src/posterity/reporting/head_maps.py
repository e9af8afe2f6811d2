"""Maps of heads, across, and layers, down: the self share and the effective horizon of every head.

What a label says of a head is in `head_details`, once for all figures; `heads.js` writes it into the maps.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from posterity.axes import STREAMS
from posterity.palette import DIVERGING, EMPTY, MEAN, PAPER, SEQUENTIAL, SHARE_TICKS, share_place
from posterity.reporting.panel_grid import Panel, PanelGrid
from posterity.reporting.result_group import NamedResult, ResultGroup
from posterity.reporting.traces import TICK, grid_by_result, spaced
from posterity.results.formatting import json_numbers, percent
from posterity.results.stats import counts, effective_horizon, existing_heads, shares, weak_heads

MANY = 32  # heads of a layer above which cells have neither gaps nor signs


def draw_heads(group: ResultGroup, reader_of: str) -> PanelGrid:
    """Draw the self share of every head."""
    panels = []
    for stream in STREAMS:
        for member in group.members:
            share = shares(member.result, ("layer", "head"), reader_of).share.sel(side="self", stream=stream)
            weak = _weak(member.result, reader_of).sel(stream=stream).values
            hover = "self share %{customdata[0]}<br>credit %{customdata[1]} of an equal part"
            panels.append(_panel(group, member, stream, share_place(share.values), weak, hover))
    return PanelGrid(
        "Self share of every head", panels, height=_height(group.members), shared_y=False,
        colours=_share_colours(group.members, reader_of), **grid_by_result(group.members),
    )  # fmt: skip


def share_by_counting(members: list[NamedResult], reader_of: str) -> float:
    """Return the self share that counting edges alone would give; NaN where results differ in it."""
    counted = [float(counts(member.result, (), reader_of).isel(lag=0)) for member in members]
    return counted[0] if len(set(map(percent, counted))) == 1 else math.nan


def _share_colours(members: list[NamedResult], reader_of: str) -> Callable[[float], dict[str, Any]]:
    """Return the colours of self shares, with the share by counting edges where all results have the same."""
    baseline = share_by_counting(members, reader_of)

    def colours(length: float) -> dict[str, Any]:
        chosen = {} if math.isnan(baseline) else {float(share_place(baseline)): f"{percent(baseline)}<br>counting"}
        for share in SHARE_TICKS:
            place = float(share_place(share))
            if all(length * abs(place - other) > TICK for other in chosen):
                chosen[place] = f"{100 * share:.0f} %"
        places = sorted(chosen)
        bar = {"tickvals": places, "ticktext": [chosen[place] for place in places]}
        return {"colorscale": DIVERGING, "cmin": 0, "cmax": 1, "colorbar": bar}

    return colours


def draw_head_horizons(group: ResultGroup, reader_of: str) -> PanelGrid:
    """Draw the effective horizon of every head, on a log scale; with a sign where it is beyond the largest horizon."""
    members, panels = group.having("horizon_by_document"), []
    for stream in STREAMS:
        for member in members:
            reach = effective_horizon(member.result, ("layer", "head"), reader_of).sel(stream=stream)
            weak = _weak(member.result, reader_of).sel(stream=stream).values
            weak = np.where(reach.isnull().values & (weak == 0), 1, weak)
            hover = "effective horizon %{customdata[0]}"
            beyond = np.isposinf(reach.values) & (weak == 0)
            covers = [_beyond(beyond)] if beyond.any() else []
            panels.append(_panel(group, member, stream, np.log2(reach.values), weak, hover, *covers))
    return PanelGrid(
        "The effective horizon of every head", panels, height=_height(members), shared_y=False,
        colours=_horizon_colours(members), **grid_by_result(members),
    )  # fmt: skip


def _panel(
    group: ResultGroup, member: NamedResult, stream: str, values: np.ndarray, weak: np.ndarray, hover: str,
    *covers: go.Heatmap,
) -> Panel:  # fmt: skip
    """Draw one map: grey where the credit is weak, blank where a layer has no such head.

    The coloured map has the labels of all cells; what lies under or over it has none.

    Args:
        group: The results of the page.
        member: The one that the map is of.
        stream: "query", "key" or "value".
        values: What the colour axis shows, (layer, head).
        weak: 1 where a head's credit is too small or too uncertain, 0 elsewhere, NaN where there is no such head.
        hover: The template of the label, between layer and head and, as the last text of `customdata`, a note.
        covers: Heat maps above the map.
    """
    layers, heads = values.shape
    look = {"xgap": 0, "ygap": 0} if heads > MANY else {"xgap": 1, "ygap": 1}
    grey = go.Heatmap(
        z=json_numbers(np.where(weak == 1, 1, np.nan)), colorscale=[[0, EMPTY], [1, EMPTY]], showscale=False,
        hoverinfo="skip", **look,
    )  # fmt: skip
    note = hover.count("customdata")
    coloured = go.Heatmap(
        z=json_numbers(np.where(weak == 0, values, np.nan)),
        meta={"member": member.number, "stream": STREAMS.index(stream)},
        coloraxis="coloraxis", hoverongaps=True,
        hovertemplate=f"layer %{{y}}, head %{{x}}<br>{hover}%{{customdata[{note}]}}<extra></extra>", **look,
    )  # fmt: skip
    ticks = {"dtick": math.ceil(heads / 10)} if heads > 1 else {"tickvals": [0]}
    return Panel(
        group.panel_title(stream, member), [grey, coloured, *covers],
        x={"title": "head", "showgrid": False, "range": [-0.5, heads - 0.5], **ticks},
        y={"title": "layer", "showgrid": False, "range": [-0.5, layers - 0.5], "dtick": max(1, math.ceil(layers / 12))},
    )  # fmt: skip


def _beyond(mask: np.ndarray) -> go.Heatmap:
    """Draw the heads whose effective horizon is beyond the largest measured one, signed where there is room."""
    sign = {
        "text": [["&gt;" if cell else "" for cell in row] for row in mask], "texttemplate": "%{text}",
        "textfont": {"color": PAPER, "size": 11}, "xgap": 1, "ygap": 1,
    }  # fmt: skip
    return go.Heatmap(
        z=json_numbers(np.where(mask, 1, np.nan)), showscale=False, colorscale=[[0, MEAN], [1, MEAN]],
        hoverinfo="skip", **(sign if mask.shape[1] <= MANY else {}),
    )  # fmt: skip


def _horizon_colours(members: list[NamedResult]) -> Callable[[float], dict[str, Any]]:
    horizons = sorted({int(horizon) for member in members for horizon in member.result.horizon.values})
    lowest = math.log2(horizons[0])
    highest = max(math.log2(horizons[-1]), lowest + 1)

    def colours(length: float) -> dict[str, Any]:
        ticks = spaced(horizons, length)
        texts = [f"h = {ticks[0]}", *map(str, ticks[1:])]
        bar = {"tickvals": [math.log2(tick) for tick in ticks], "ticktext": texts}
        return {"colorscale": SEQUENTIAL, "cmin": lowest, "cmax": highest, "colorbar": bar}

    return colours


def _height(members: list[NamedResult]) -> int:
    """Return the height of a map in pixels."""
    return min(560, max(200, 15 * max(member.layers for member in members) + 20))


def _weak(result: xr.Dataset, reader_of: str) -> xr.DataArray:
    """Return 1 where a head's credit is weak, 0 where it is not, NaN where a layer has no such head."""
    return weak_heads(result, reader_of).where(existing_heads(result))
