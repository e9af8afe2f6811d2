"""Figures of own and later losses: by layer, at the layers' inputs, by position, by module, and by horizon."""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from posterity.axes import STREAMS, WRITTEN
from posterity.palette import COUNT, INK, LATE, MEAN, OTHER, SELF
from posterity.reporting.bins import position_bins, sum_positions
from posterity.reporting.credit_charts import depths
from posterity.reporting.module_kinds import shares_by_kind
from posterity.reporting.panel_grid import Axis, Panel, PanelGrid
from posterity.reporting.result_group import NamedResult, ResultGroup
from posterity.reporting.result_table import LOSS_PARTS
from posterity.reporting.traces import (
    PERCENT,
    ZERO_LINE,
    by_position,
    depth_lines,
    grid_by_result,
    layer_axis,
    line,
    position_axes,
    position_points,
    result_line,
    share_labels,
    spaced,
)
from posterity.results import stats
from posterity.results.formatting import json_numbers

COLOURS = {"own": SELF, "self later": LATE, "future": OTHER}  # of the parts of a loss


def draw_loss_parts(group: ResultGroup, reader_of: str) -> PanelGrid:
    """Draw the three parts of every layer's credit as bars: own loss, later losses at the self edge, future edges."""
    members = group.having("loss_credit")
    shares = [stats.loss_shares(member.result, ("layer",), reader_of) for member in members]
    y = {"title": "share of the credit", **PERCENT, **ZERO_LINE}
    panels = []
    for written in WRITTEN:
        for member, share in zip(members, shares, strict=True):
            bars = [_bars(member, share.sel(written=written, part=part), part) for part in LOSS_PARTS]
            panels.append(Panel(group.panel_title(written, member), bars, layer_axis(member.layers), y))
    title = "Who pays for keys and values: own loss, self edge, future edges"
    return PanelGrid(title, panels, height=300, **grid_by_result(members, columns=2))


def _bars(member: NamedResult, share: xr.Dataset, part: str) -> go.Bar:
    name = LOSS_PARTS[part]
    labels = share_labels(share.share, member.uncertainty(share.error))
    return go.Bar(
        name=name, legendgroup=name, x=list(range(share.sizes["layer"])), y=json_numbers(share.share),
        customdata=labels["customdata"], hovertemplate=labels["hover"],
        marker={"color": COLOURS[part], "line": {"width": 0}},
    )  # fmt: skip


def draw_layer_inputs(group: ResultGroup) -> PanelGrid:
    """Draw own share and cosine of own and later losses in the gradients of the layers' inputs."""
    members = group.having("loss_credit")
    places, axis = depths(members)
    own, cosine = [], []
    for member, x in zip(members, places, strict=True):
        hidden = stats.hidden_shares(member.result)
        own += result_line(group, member, "own share", x, hidden.share, SELF, hidden.error)
        cosine += result_line(group, member, "cosine of own and later", x, hidden.cosine, MEAN, hover="%{y:.3f}")
    panels = [
        Panel("own share", own, axis, {"title": "share of the own loss", **PERCENT, **ZERO_LINE}),
        Panel("cosine of own and later", cosine, axis, {"title": "cosine", "rangemode": "tozero", **ZERO_LINE}),
    ]
    title = "The residual stream: own and later losses in the gradient of each layer's input"
    return PanelGrid(title, panels, height=260, columns=2, shared_y=False)


def draw_loss_positions(group: ResultGroup) -> PanelGrid:
    """Draw the share of own and of later losses in the credit, by position."""
    members = group.having("loss_credit")
    shares = [stats.loss_shares_by_position(member.result) for member in members]
    panels = []
    for written in WRITTEN:
        for member, share in zip(members, shares, strict=True):
            bins = position_bins(member.result)
            own, at_self, future = (
                sum_positions(share.sel(written=written, part=part).values, member.result) for part in LOSS_PARTS
            )
            traces = [
                line(name, colour=colour, **by_position(bins, values), **position_points(bins, colour))
                for name, values, colour in (("later losses", at_self + future, OTHER), ("own loss", own, SELF))
            ]
            panels.append(Panel(group.panel_title(written, member), traces, **position_axes(int(bins[1][-1]))))
    title = "Where in the window own and later losses pay"
    return PanelGrid(title, panels, height=280, **grid_by_result(members, columns=2))


def draw_modules(group: ResultGroup) -> PanelGrid:
    """Draw the own share of the gradients of parameters, one panel for each kind of module, by layer."""
    lines: dict[str, list[go.Scatter]] = {}
    layers: dict[str, int] = {}  # the last one
    for member in group.having("parameter_by_document"):
        places, shares = shares_by_kind(member.result)
        by_kind: dict[str, dict[int, int]] = {}  # indices by layer
        for index, (kind, layer) in enumerate(places):
            if layer is not None:
                by_kind.setdefault(kind, {})[layer] = index
        for kind, indices in by_kind.items():
            x = sorted(indices)
            share = shares.isel(parameter=[indices[layer] for layer in x])
            traces = result_line(group, member, "own share", x, share.share, SELF, share.error)
            lines.setdefault(kind, []).extend(traces)
            layers[kind] = max(layers.get(kind, 0), x[-1])
    y = {"title": "own share", **PERCENT, **ZERO_LINE}
    panels = [Panel(kind, traces, layer_axis(layers[kind] + 1), y) for kind, traces in lines.items()]
    title = "What the parameters learn from: own share by kind of module and layer"
    return PanelGrid(title, panels, height=170)


def draw_horizons(group: ResultGroup, reader_of: str) -> PanelGrid:
    """Draw the credit that remains under each horizon, of the model and of its layers."""
    members = group.having("horizon_by_document")
    curves = [stats.horizon_curve(member.result, (), reader_of) for member in members]
    horizons = sorted({int(horizon) for member in members for horizon in member.result.horizon.values})
    ends = [horizons[0] / 1.2, horizons[-1] * 1.2]

    def x(room: float) -> Axis:
        ticks = spaced(horizons, room)
        return {
            "type": "log", "title": "horizon h (tokens; log scale)", "hover": "h = %{x}",
            "range": np.log10(ends).tolist(), "tickvals": ticks, "ticktext": [str(tick) for tick in ticks],
        }  # fmt: skip

    half = line("one half", ends, [0.5, 0.5], COUNT, legendrank=1003).update(
        hovertemplate=None, hoverinfo="skip", line={"width": 1.4, "dash": "dash"}
    )
    panels = []
    for stream in STREAMS:
        traces = _layer_curves(group, members, stream, reader_of)
        traces.append(half)
        for member, curve in zip(members, curves, strict=True):
            curve = curve.sel(stream=stream)
            traces += result_line(group, member, "all layers", curve.horizon, curve.share, INK, curve.error)
        y = {"title": "share of the credit that remains", **PERCENT, **ZERO_LINE}
        panels.append(Panel(stream, traces, x, y))
    return PanelGrid("How far off the losses are: credit that remains under a discount", panels, height=320)


def _layer_curves(group: ResultGroup, members: list[NamedResult], stream: str, reader_of: str) -> list[go.Scatter]:
    traces = []
    for member in members:
        layers = (
            stats.horizon_curve(member.result, ("layer",), reader_of).sel(stream=stream).transpose("layer", "horizon")
        )
        traces += depth_lines(group, layers.horizon.values, layers.share.values)
    return traces
