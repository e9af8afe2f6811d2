"""Figures of prices: what windows cost each layer, what cached keys and values of each head are worth, and where."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from posterity.palette import INK, SEQUENTIAL
from posterity.reporting.bins import position_bins, sum_positions
from posterity.reporting.panel_grid import Axis, Panel, PanelGrid
from posterity.reporting.result_group import NamedResult, ResultGroup
from posterity.reporting.traces import by_position, grid_by_result, line, position_axes, position_points
from posterity.results import stats
from posterity.results.formatting import json_numbers, value_with_error
from posterity.results.window_plan import reaches_beyond

DECADES = 6  # of the colours, below the largest price
LABEL = 56  # pixels of "0.00001"


def draw_window_prices(group: ResultGroup) -> PanelGrid:
    """Draw the price of every window for every layer, on a log scale of nats per token."""
    members = group.having("window_price_by_document")
    prices = [known_window_prices(member.result) for member in members]
    panels = []
    for member, price in zip(members, prices, strict=True):
        sizes = [f"{size:,}" for size in price.window.values]
        x = {"title": "window (tokens)", "showgrid": False, "tickvals": list(range(len(sizes))), "ticktext": sizes,
             "range": [-0.5, len(sizes) - 0.5]}  # fmt: skip
        panels.append(_map(group.panel_title("", member), member, price, x, "layer %{y}, window %{text}"))
    return _maps("What a window costs each layer", panels, members, prices)


def known_window_prices(result: xr.Dataset) -> xr.Dataset:
    """Return the prices of windows by layer, where the layer looks back further than the window."""
    prices = stats.window_prices(result)
    return prices.where(reaches_beyond(result, prices.window.values))


def draw_pair_prices(group: ResultGroup) -> PanelGrid:
    """Draw what the cached pairs of every key/value head are worth, on a log scale of nats per token."""
    members = group.having("price_by_document")
    prices = [stats.prices(member.result, ("layer", "kv_head")) for member in members]
    panels = []
    for member, price in zip(members, prices, strict=True):
        heads = price.sizes["kv_head"]
        x = {"title": "key/value head", "showgrid": False, "dtick": math.ceil(heads / 16), "tick0": 0,
             "range": [-0.5, heads - 0.5]}  # fmt: skip
        panels.append(_map(group.panel_title("", member), member, price, x, "layer %{y}, key/value head %{x}"))
    return _maps("What cached keys and values are worth, by head", panels, members, prices)


def draw_price_positions(group: ResultGroup) -> PanelGrid:
    """Draw which share of all prices one position has."""
    members = group.having("price")
    panels = []
    for member in members:
        share, bins = price_by_position(member.result), position_bins(member.result)
        traces = [line("price", colour=INK, **by_position(bins, share), **position_points(bins, INK))]
        panels.append(Panel(group.panel_title("", member), traces, **position_axes(int(bins[1][-1]))))
    title = "Prices of cached keys and values by position"
    return PanelGrid(title, panels, height=280, **grid_by_result(members, columns=1))


def price_by_position(result: xr.Dataset) -> np.ndarray:
    """Return the share of all prices that each bin of positions has."""
    price = result.price.sum(("layer", "group"))
    return sum_positions((price / price.sum()).values, result)


def _map(title: str, member: NamedResult, price: xr.Dataset, x: Axis, hover: str) -> Panel:
    """Draw one map of prices, layers down; blank where there is none."""
    windows, values = member.result.sizes["document"], price.price.values
    labels = [
        [value_with_error(float(value), float(error), windows=windows) for value, error in zip(*row, strict=True)]
        for row in zip(values, price.error.values, strict=True)
    ]
    columns = [f"{int(column):,}" for column in price[price.price.dims[1]].values]
    heatmap = go.Heatmap(
        z=json_numbers(np.log10(np.where(values > 0, values, np.nan))), customdata=labels,
        text=[columns] * len(values), coloraxis="coloraxis", xgap=1, ygap=1, hoverongaps=False,
        hovertemplate=f"{hover}<br>%{{customdata}} nats per token<extra></extra>",
    )  # fmt: skip
    step = max(1, math.ceil(len(values) / 12))
    y = {"title": "layer", "showgrid": False, "range": [-0.5, len(values) - 0.5], "dtick": step}
    return Panel(title, [heatmap], x, y)


def _maps(title: str, panels: list[Panel], members: list[NamedResult], prices: list[xr.Dataset]) -> PanelGrid:
    height = min(560, max(200, 15 * max(member.layers for member in members) + 20))
    return PanelGrid(
        title, panels, height=height, shared_y=False, colours=_colours(prices), **grid_by_result(members, columns=1)
    )


def _colours(prices: list[xr.Dataset]) -> Callable[[float], dict[str, Any]]:
    known = np.concatenate([price.price.values.ravel() for price in prices])
    known = np.log10(known[known > 0])
    highest = math.ceil(known.max()) if len(known) else 0
    lowest = max(highest - DECADES, math.floor(known.min())) if len(known) else -1

    def colours(length: float) -> dict[str, Any]:
        every = max(1, math.ceil((highest - lowest + 1) * LABEL / length))
        places = list(range(highest, lowest - 1, -every))[::-1]
        bar = {"tickvals": places, "ticktext": [f"{10.0**place:.{max(0, -place)}f}" for place in places]}
        return {"colorscale": SEQUENTIAL, "cmin": lowest, "cmax": max(highest, lowest + 1), "colorbar": bar}

    return colours
