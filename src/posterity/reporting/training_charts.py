"""Figures over training: shares and angles by step, of the model with its band and of single layers."""

import xarray as xr

from posterity.axes import STREAMS, WRITTEN
from posterity.palette import INK
from posterity.reporting.panel_grid import Axis, Panel, PanelGrid
from posterity.reporting.result_group import NamedResult, ResultGroup
from posterity.reporting.traces import PERCENT, SHARE, ZERO_LINE, depth_lines, result_line
from posterity.results.stats import angles, loss_shares, shares

GRADIENTS = {"hidden": "hidden states, at the layers' inputs", "parameters": "all parameters"}


def draw_self_shares(group: ResultGroup) -> PanelGrid:
    """Draw the self share over training."""
    members = group.over_training("credit")
    model, layers = ([shares(member.over_steps, by).sel(side="self") for member in members] for by in ((), ("layer",)))
    panels = [
        _panel(group, members, stream, [share.sel(stream=stream) for share in model],
               [share.share.sel(stream=stream) for share in layers], {"title": "self share", **PERCENT})
        for stream in STREAMS
    ]  # fmt: skip
    return PanelGrid("Self share over training", panels, height=260)


def draw_own_shares(group: ResultGroup) -> PanelGrid:
    """Draw the share of the own loss over training."""
    members = group.over_training("loss_credit")
    model, layers = (
        [loss_shares(member.over_steps, by).sel(part="own") for member in members] for by in ((), ("layer",))
    )
    panels = [
        _panel(group, members, written, [share.sel(written=written) for share in model],
               [share.share.sel(written=written) for share in layers], {"title": "share of the own loss", **PERCENT})
        for written in WRITTEN
    ]  # fmt: skip
    return PanelGrid("Who pays over training: share of the own loss", panels, height=260, columns=2)


def draw_loss_angles(group: ResultGroup) -> PanelGrid:
    """Draw the angle between own and later losses over training: at the layers' inputs, and of all parameters."""
    members = [(member, angles(member.over_steps)) for member in group.over_training("loss_credit")]
    panels = []
    for name, title in GRADIENTS.items():
        having = [(member, angle) for member, angle in members if name in angle]
        if having:
            model = [xr.Dataset({"share": angle[name]}) for _, angle in having]
            layers = [angle.layer_hidden if name == "hidden" else None for _, angle in having]
            axis = {"title": "angle (degrees)"}
            panels.append(_panel(group, [member for member, _ in having], title, model, layers, axis))
    title = "Angle between what own losses and later losses ask for"
    return PanelGrid(title, panels, height=260, columns=2)


def _panel(
    group: ResultGroup, members: list[NamedResult], title: str, model: list[xr.Dataset],
    layers: list[xr.DataArray | None], y: Axis,
) -> Panel:  # fmt: skip
    """Draw shares along steps: of every result's model with their errors, and of the layers of a single result."""
    steps = [share.step.values for share in model]
    ends = [int(step) for values in steps for step in (values[0], values[-1])]
    traces = []
    for x, values in zip(steps, layers, strict=True):
        if values is not None:
            traces += depth_lines(group, x, values.transpose("layer", "step").values)
    for member, x, share in zip(members, steps, model, strict=True):
        hover, error = (SHARE, share.error) if "error" in share else ("%{y:.3f}", None)
        traces += result_line(group, member, "all layers", x, share.share, INK, error, hover)
    axis = {"title": "training step", "range": [min(ends), max(*ends, 1)]}
    return Panel(title, traces, axis, {"rangemode": "tozero", **y, **ZERO_LINE})
