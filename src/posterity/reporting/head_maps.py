"""Maps of heads, across, and layers, down: the self share and the effective horizon of every head."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from posterity.axes import STREAMS
from posterity.palette import DIVERGING, EMPTY, MEAN, PAPER, SEQUENTIAL
from posterity.reporting.html import figure_text
from posterity.reporting.panel_grid import Panel, PanelGrid
from posterity.reporting.result_group import NamedResult, ResultGroup
from posterity.reporting.result_table import credit_portions
from posterity.reporting.tables import format_cells
from posterity.reporting.traces import grid_by_result, spaced
from posterity.results.formatting import UNKNOWN, horizon_text, json_numbers, percent
from posterity.results.stats import effective_horizon, existing_heads, shares, weak_heads

CELLS = {"xgap": 1, "ygap": 1, "hoverongaps": False}


def draw_heads(group: ResultGroup) -> PanelGrid:
    """Draw the self share of every head."""
    panels = []
    for stream in STREAMS:
        for member in group.members:
            share = shares(member.result, ("layer", "head")).sel(side="self", stream=stream)
            portion = credit_portions(member.result).sel(stream=stream)
            texts = np.stack([_format(percent, share.share, share.error), _format(_format_portion, portion)], -1)
            weak = _weak(member.result).sel(stream=stream)
            hover = "self share %{customdata[0]}<br>credit %{customdata[1]} of an equal part"
            panels.append(_panel(group.panel_title(stream, member), share.share.values, weak.values, texts, hover))
    return PanelGrid(
        "Self share of every head: what it writes for its own position and for others", panels,
        height=_height(group.members), shared_y=False, **grid_by_result(group.members),
        colours=lambda length: {
            "colorscale": DIVERGING, "cmin": 0, "cmax": 1,
            "colorbar": {"tickvals": [0, 0.25, 0.5, 0.75, 1],
                         "ticktext": ["0 % self", "25 %", "50 %", "75 %", "100 % self"]},
        },
    )  # fmt: skip


def draw_head_horizons(group: ResultGroup) -> PanelGrid:
    """Draw the effective horizon of every head, on a log scale; with a sign where it is beyond the largest horizon."""
    members, panels = group.having("horizon_by_document"), []
    for stream in STREAMS:
        for member in members:
            reach = effective_horizon(member.result, ("layer", "head")).sel(stream=stream)
            ends = int(member.result.horizon[0]), int(member.result.horizon[-1])
            weak = _weak(member.result).sel(stream=stream).values
            weak = np.where(reach.isnull().values & (weak == 0), 1, weak)
            texts = _format(lambda length, ends=ends: figure_text(horizon_text(length, *ends)), reach)[..., None]
            hover = "effective horizon %{customdata[0]}"
            beyond = np.isposinf(reach.values) & (weak == 0)
            covers = [_beyond(beyond, texts, hover)] if beyond.any() else []
            panels.append(_panel(group.panel_title(stream, member), np.log2(reach.values), weak, texts, hover, *covers))
    return PanelGrid(
        "The effective horizon of every head", panels, height=_height(members), shared_y=False,
        colours=_horizon_colours(members), **grid_by_result(members),
    )  # fmt: skip


def _panel(
    title: str, values: np.ndarray, weak: np.ndarray, texts: np.ndarray, hover: str, *covers: go.Heatmap
) -> Panel:
    """Draw one map: grey where the credit is weak, blank where a layer has no such head.

    Args:
        title: The title of the panel.
        values: What the colour axis shows, (layer, head).
        weak: 1 where a head's credit is too small or too uncertain, 0 elsewhere, NaN where there is no such head.
        texts: What the hover template shows, (layer, head, text).
        hover: The hover template, after layer and head.
        covers: Heat maps above the map.
    """
    template = f"layer %{{y}}, head %{{x}}<br>{hover}"
    grey = go.Heatmap(
        z=json_numbers(np.where(weak == 1, 1, np.nan)),
        customdata=_select(texts, weak == 1),
        colorscale=[[0, EMPTY], [1, EMPTY]],
        showscale=False,
        hovertemplate=f"{template}<br>credit too small or too uncertain<extra></extra>",
        **CELLS,
    )
    coloured = go.Heatmap(
        z=json_numbers(np.where(weak == 0, values, np.nan)),
        customdata=_select(texts, weak == 0),
        coloraxis="coloraxis",
        hovertemplate=f"{template}<extra></extra>",
        **CELLS,
    )
    layers, heads = values.shape
    ticks = {"dtick": math.ceil(heads / 10)} if heads > 1 else {"tickvals": [0]}
    return Panel(
        title, [grey, coloured, *covers],
        x={"title": "head", "showgrid": False, **ticks},
        y={"title": "layer", "showgrid": False, "dtick": max(1, math.ceil(layers / 12))},
    )  # fmt: skip


def _beyond(mask: np.ndarray, texts: np.ndarray, hover: str) -> go.Heatmap:
    """Draw the heads whose effective horizon is beyond the largest one that was measured."""
    return go.Heatmap(
        z=json_numbers(np.where(mask, 1, np.nan)), showscale=False, colorscale=[[0, MEAN], [1, MEAN]],
        text=[["&gt;" if cell else "" for cell in row] for row in mask], texttemplate="%{text}",
        textfont={"color": PAPER, "size": 11}, customdata=_select(texts, mask), **CELLS,
        hovertemplate=f"layer %{{y}}, head %{{x}}<br>{hover}<extra></extra>",
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


def _weak(result: xr.Dataset) -> xr.DataArray:
    """Return 1 where a head's credit is weak, 0 where it is not, NaN where a layer has no such head."""
    return weak_heads(result).where(existing_heads(result))


def _format(format_number: Callable[..., str], *values: xr.DataArray) -> np.ndarray:
    """Format the numbers of every head; words where they are not known."""

    def format_or_say(*numbers: float) -> str:
        text = format_number(*numbers)
        return "not known" if text == UNKNOWN else text

    return format_cells(format_or_say, *(value.values for value in values))


def _format_portion(portion: float) -> str:
    return UNKNOWN if math.isnan(portion) else f"{portion:.2f}"


def _select(texts: np.ndarray, mask: np.ndarray) -> list[list[list[str] | None]]:
    """Return the texts of the cells under a mask, nothing elsewhere."""
    rows = zip(texts.tolist(), mask.tolist(), strict=True)
    return [[text if selected else None for text, selected in zip(*row, strict=True)] for row in rows]
