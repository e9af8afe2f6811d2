"""Figures of the credit by layer and by position, of the first position, and of the gradients of the weights."""

from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from posterity.axes import SIDES, STREAMS, WRITTEN
from posterity.palette import ATTENTION, COUNT, INK, MEAN, OTHER, SELF
from posterity.reporting.bins import position_bins, sum_positions
from posterity.reporting.panel_grid import Axis, Panel, PanelGrid
from posterity.reporting.result_group import NamedResult, ResultGroup
from posterity.reporting.traces import (
    BEHIND,
    EDGES,
    PERCENT,
    band,
    by_position,
    counting_line,
    grid_by_result,
    layer_axis,
    line,
    points,
    position_axes,
    position_points,
    result_line,
    share_labels,
)
from posterity.results import stats
from posterity.results.formatting import json_numbers
from posterity.results.uniform_attention import has_every_pair

UNIFORM = "uniform attention in all layers"
WEIGHTS = {"query": "W_Q", "key": "W_K", "value": "W_V"}
PARTS = {
    "self": ("self part", SELF, "solid"),
    "other": ("other part", OTHER, "dash"),
    "whole": ("whole gradient", INK, "dot"),
}


def depths(members: list[NamedResult]) -> tuple[list[np.ndarray], Axis | Callable[[float], Axis]]:
    """Return where the layers of each result stand, and the axis that they share.

    Results with the same number of layers share an axis of layers; others one of depth, from 0 to 1.
    """
    layers = [np.arange(member.layers) for member in members]
    if len({member.layers for member in members}) == 1:
        return layers, layer_axis(members[0].layers)
    return [x / max(1, len(x) - 1) for x in layers], {
        "title": "depth (first layer 0, last layer 1)",
        "hover": "depth %{x:.2f}",
    }


def draw_layers(group: ResultGroup, reader_of: str) -> PanelGrid:
    """Draw the self share by layer, beside counting."""
    shares = [stats.shares(member.result, ("layer",), reader_of).sel(side="self") for member in group.members]
    counted = [
        json_numbers(stats.counts(member.result, ("layer",), reader_of).isel(lag=0), 6) for member in group.members
    ]
    same = all(numbers == counted[0] for numbers in counted)
    places, axis = depths(group.members)
    panels = []
    for stream in STREAMS:
        traces = []
        for member, x, share, numbers in zip(group.members, places, shares, counted, strict=True):
            share = share.sel(stream=stream)
            *bands, credit = result_line(group, member, "self share", x, share.share, SELF, share.error)
            first = member is group.members[0]
            if first or not same:
                colour = COUNT if same else group.colour(member, SELF)
                bands.append(counting_line(EDGES, x, numbers, colour, showlegend=first))
            traces += [*bands, credit]
        panels.append(Panel(stream, traces, axis, {"title": "self share", **PERCENT}))
    return PanelGrid("Self share from the first layer to the last", panels, height=260)


def draw_positions(group: ResultGroup) -> PanelGrid:
    """Draw the share of the credit by position: through the self edge, through other edges, and by counting."""
    shares = [share_by_position(member.result) for member in group.members]
    uniforms = {member.name: stats.uniform_attention(member.result) for member in group.members}
    panels = []
    for stream in STREAMS:
        for member, share in zip(group.members, shares, strict=True):
            bins = position_bins(member.result)
            own, other = (sum_positions(share.sel(stream=stream, side=side).values, member.result) for side in SIDES)
            counted, uniform = count_by_position(member.result, stream), uniforms[member.name]
            lines = {} if counted is None else {EDGES: counted}
            if uniform is not None:
                lines[UNIFORM] = uniform.sel(stream=stream).values
            traces: list[Any] = [
                counting_line(name, colour=colour, **by_position(bins, sum_positions(values, member.result)))
                for (name, values), colour in zip(lines.items(), (COUNT, MEAN), strict=False)
            ]
            traces += [
                line("other edges", colour=OTHER, **by_position(bins, other), **position_points(bins, OTHER)),
                line("self edge", colour=SELF, **by_position(bins, own), **position_points(bins, SELF)),
            ]
            panels.append(Panel(group.panel_title(stream, member), traces, **position_axes(int(bins[1][-1]))))
    title = "Where in the window the credit lies, and whether the first position is a sink"
    return PanelGrid(title, panels, height=280, **grid_by_result(group.members))


def share_by_position(result: xr.Dataset) -> xr.DataArray:
    """Return the share of the whole credit that each position has; dims (stream, side, position)."""
    credit = result.credit_by_position.where(stats.existing_heads(result), 0.0).sum(("layer", "head"), skipna=False)
    return (credit / credit.sum(("side", "position"), skipna=False)).transpose("stream", "side", "position")


def count_by_position(result: xr.Dataset, stream: str) -> np.ndarray | None:
    """Return the share of the edges that each position has; None unless every pair of positions is an edge.

    Every pair is one under a plain causal mask without padding.
    """
    readers = np.arange(int(result.position_end[-1]) + 1, 0, -1)
    if not has_every_pair(result):
        return None
    by_position = readers[::-1] if stream == "query" else readers
    return np.add.reduceat(by_position, result.position.values) / readers.sum()


def draw_first_position(group: ResultGroup) -> PanelGrid:
    """Draw the share of the first position by layer, beside the attention weight on the first key.

    Not of queries: the first one sees one key only, so that its gradient is zero.
    """
    shares = [stats.first_position(member.result, ("layer",)) for member in group.members]
    attention = [stats.attention_first(member.result, ("layer",)) for member in group.members]
    places, axis = depths(group.members)
    panels = []
    for stream in WRITTEN:
        traces = []
        for member, x, share, weight in zip(group.members, places, shares, attention, strict=True):
            share = share.sel(stream=stream)
            *bands, credit = result_line(group, member, "credit", x, share.share, OTHER, share.error)
            name = "attention weight on the first key" if group.single else f"attention, {group.label(member, '')}"
            bands.append(line(name, x, weight, group.colour(member, ATTENTION), "dot", **BEHIND))
            traces += [*bands, credit]
        panels.append(Panel(stream, traces, axis, {"title": "share of the first position", **PERCENT}))
    return PanelGrid("The first position: its share of the credit by layer", panels, height=260, columns=2)


def draw_weights(group: ResultGroup) -> PanelGrid:
    """Draw the self share in the gradients of the projection weights: of single windows, and of their mean."""

    def draw(member: NamedResult, shares: xr.Dataset, x: np.ndarray) -> list[go.Scatter]:
        error, windows = member.uncertainty(shares.error), member.result.sizes["document"]
        name = "single windows" if windows > 1 else "one window"
        single = line(name, x, shares.share, ATTENTION, **share_labels(shares.share, error), **points(x))
        if windows == 1:
            return [single]  # which is the mean
        mean = line("mean gradient", x, shares.share_mean, MEAN, "dash", **points(x))
        return [*band(name, x, shares.share, error, ATTENTION), single, mean]

    title = "What the weights learn from: self share in the gradients of W_Q, W_K and W_V"
    return _weight_grid(group, draw, title, {"title": "self share of the squared norm", **PERCENT})


def draw_agreement(group: ResultGroup) -> PanelGrid:
    """Draw how far the gradients of different windows agree: their self parts, their other parts, and in whole."""

    def draw(member: NamedResult, shares: xr.Dataset, x: np.ndarray) -> list[go.Scatter]:
        return [
            line(name, x, shares.agreement.sel(part=part), colour, dash, hover="%{y:.3f}", **points(x))
            for part, (name, colour, dash) in PARTS.items()
        ]

    y = {"title": "agreement (1 = all equal)", "rangemode": "tozero"}
    return _weight_grid(group, draw, "How far the gradients of different windows agree", y, windows=2)


def _weight_grid(
    group: ResultGroup, draw: Callable[[NamedResult, xr.Dataset, np.ndarray], list[go.Scatter]], title: str, y: Axis,
    windows: int = 1,
) -> PanelGrid:  # fmt: skip
    """Draw a panel for each stream and result of at least so many windows."""
    members = [member for member in group.having("weight_mean") if member.result.sizes["document"] >= windows]
    shares = [stats.weight_shares(member.result, ("layer",)) for member in members]
    panels = [
        Panel(
            group.panel_title(WEIGHTS[stream], member),
            draw(member, share.sel(stream=stream), np.arange(member.layers)), layer_axis(member.layers), y,
        )
        for stream in STREAMS
        for member, share in zip(members, shares, strict=True)
    ]  # fmt: skip
    return PanelGrid(title, panels, height=260, **grid_by_result(members))
