"""The figure of the credit by lag, in three views: share per doubling of lag + 1, per lag, and added up."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from posterity.axes import STREAMS
from posterity.palette import ATTENTION, COUNT, OTHER, PAPER, SELF
from posterity.reporting.bins import bin_middles, bin_names, doublings, single_shares
from posterity.reporting.panel_grid import Panel, PanelGrid
from posterity.reporting.result_group import NamedResult, ResultGroup
from posterity.reporting.traces import BEHIND, EDGES, band, counting_line, line, log_axis
from posterity.results.formatting import json_numbers
from posterity.results.stats import attention_profile, profile

VIEWS = {  # the y axis of each
    "doubling": {"title": "share per doubling of lag + 1", "tickformat": ".0%", "type": "linear"},
    "lag": {"title": "share per lag", "tickformat": ".3~p", "type": "log", "dtick": 1},
    "sum": {"title": "share up to this lag", "tickformat": ".0%", "type": "linear", "range": [0, 1.05]},
}


def draw_lags(group: ResultGroup) -> PanelGrid:
    """Draw the share of the credit by lag; every view has the same traces, with other numbers."""
    profiles = [_LagProfile(group, member) for member in group.members]
    counted = [json_numbers(lag_profile.profile.counted, 6) for lag_profile in profiles]
    same = all(numbers == counted[0] for numbers in counted)
    last = max(int(member.result.lag_end[-1]) for member in group.members)
    x = log_axis(last, "self", "lag (tokens; log scale of lag + 1)")
    grids = {}
    for view, axis in VIEWS.items():
        panels = []
        for stream in STREAMS:
            traces = [
                trace
                for lag_profile in profiles
                for trace in lag_profile.traces(stream, view, same, counting=lag_profile is profiles[0] or not same)
            ]
            panels.append(Panel(stream, traces, x, {"rangemode": "tozero", **axis}))
        grids[view] = PanelGrid("How far the credit reaches: share of the gradient by lag", panels, height=300)
    first, *others = VIEWS
    return replace(grids[first], views={view: grids[view] for view in others})


@dataclass(frozen=True)
class _LagProfile:
    """The credit of one result by lag, beside attention and counting."""

    group: ResultGroup
    member: NamedResult

    @cached_property
    def profile(self) -> xr.Dataset:
        return profile(self.member.result)

    @cached_property
    def attention(self) -> np.ndarray:
        return attention_profile(self.member.result).values

    @property
    def bins(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last lag of each bin."""
        return self.member.result.lag.values, self.member.result.lag_end.values

    def traces(self, stream: str, view: str, same: bool, counting: bool) -> list[go.Scatter]:
        """Draw the panel of one stream; `same` if counting gives the same for all results of the page."""
        group, member, bins = self.group, self.member, self.bins
        label, colour = group.label(member, "credit"), group.colour(member, OTHER)
        share, error = (self.profile[name].sel(stream=stream).values for name in ("share", "error"))
        densities, errors = (lag_view(values, bins, "doubling") for values in (share, error))
        traces = band(label, bin_middles(*bins), densities, errors, colour, visible=view == "doubling")
        if group.single:
            traces.append(
                line("attention", colour=ATTENTION, dash="dot", **BEHIND, **self._by_lag(self.attention, view))
            )
        if counting:
            name, shade = (EDGES, COUNT) if same else (f"counting, {label}", colour)
            traces.append(counting_line(name, colour=shade, **self._by_lag(self.profile.counted.values, view)))
        credit = self._by_lag(share, view)
        traces.append(line(label, colour=colour, **credit))
        error_bar = errors[0] if view == "doubling" else np.nan
        return [*traces, self._self_edge(label, credit["x"][0], credit["y"][0], error_bar)]

    def _self_edge(self, label: str, x: float, y: float, error: float) -> go.Scatter:
        """Mark the credit of the self edge on the line of a result."""
        colour, single = self.group.colour(self.member, SELF), self.group.single
        bar = {"error_y": {"array": [error], "thickness": 1.5, "color": colour}} if np.isfinite(error) else {}
        return go.Scatter(
            mode="markers", name="credit of the self edge", legendgroup="self" if single else label, showlegend=single,
            x=[float(x)], y=json_numbers([y]), hoverinfo="skip", **bar,
            marker={"size": 9, "color": colour, "line": {"width": 1.5, "color": PAPER}},
        )  # fmt: skip

    def _by_lag(self, share: np.ndarray, view: str) -> dict:
        """Return the numbers of a line; a sum stands at the last lag of its bin."""
        first, last = self.bins
        return {
            "x": bin_middles(last if view == "sum" else first, last), "y": lag_view(share, self.bins, view),
            "customdata": bin_names(first, last), "hover": "lag %{customdata}: %{y:.3~p}",
        }  # fmt: skip


def lag_view(share: np.ndarray, bins: tuple[np.ndarray, np.ndarray], view: str) -> np.ndarray:
    """Return the shares of bins of lags as a view shows them."""
    if view == "sum":
        return share.cumsum()
    return single_shares(share, *bins) if view == "lag" else share / doublings(*bins)
