"""The figure of the credit by lag, in three views: added up, per doubling of lag + 1, and per lag."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from posterity.axes import STREAMS
from posterity.palette import ATTENTION, AXIS, COUNT, OTHER, PAPER, SELF
from posterity.reporting.bins import bin_middles, bin_names, doublings, single_shares
from posterity.reporting.panel_grid import Panel, PanelGrid
from posterity.reporting.reach_chart import has_lags
from posterity.reporting.result_group import NamedResult, ResultGroup
from posterity.reporting.traces import (
    BEHIND,
    EDGES,
    LOG_PERCENT,
    PERCENT,
    band,
    counting_line,
    fine_percent,
    line,
    log_axis,
)
from posterity.results.formatting import json_numbers, percent
from posterity.results.lag_bins import share_at_lag
from posterity.results.ratios import has_fine_lags
from posterity.results.stats import attention_profile, cumulative_profile, profile, reach

TITLE = "How far the credit reaches: share of the gradient by lag"
VIEWS = {  # the y axis of each
    "sum": {"title": "share up to this lag", **PERCENT, "type": "linear", "range": [0, 1.05]},
    "doubling": {"title": "share per doubling of lag + 1", **PERCENT, "type": "linear"},
    "lag": {"title": "share per lag", **LOG_PERCENT},
}
LEVELS = (0.5, 0.9)  # marked where shares are added up


def draw_lags(group: ResultGroup, reader_of: str) -> PanelGrid:
    """Draw the share of the credit by lag where it is known; every view has the same traces, with other numbers."""
    members = [member for member in group.members if has_fine_lags(member.result)]
    if not members:
        return PanelGrid(TITLE, [], height=0)
    profiles = [_LagProfile(group, member, reader_of) for member in members]
    counted = [json_numbers(lag_profile.profile.counted, 6) for lag_profile in profiles]
    same = all(numbers == counted[0] for numbers in counted)
    last = max(int(member.result.lag_end[-1]) for member in members)
    x = log_axis(last, "self", "lag (tokens; log scale of lag + 1)")
    grids = {}
    for view, axis in VIEWS.items():
        panels = []
        for stream in STREAMS:
            traces = [_level(level, last, visible=view == "sum") for level in LEVELS]
            traces += [
                trace
                for lag_profile in profiles
                for trace in lag_profile.traces(stream, view, same, counting=lag_profile is profiles[0] or not same)
            ]
            panels.append(Panel(stream, traces, x, axis))
        grids[view] = PanelGrid(TITLE, panels, height=300)
    first, *others = VIEWS
    return replace(grids[first], views={view: grids[view] for view in others})


def _level(level: float, last: int, visible: bool) -> go.Scatter:
    """Draw a thin line across the panel, with its number at its left end."""
    return go.Scatter(
        x=[1, last + 2], y=[level, level], mode="lines+text", text=[f"{100 * level:.0f} %", ""],
        textposition="top right", textfont={"size": 11, "color": COUNT},
        line={"width": 1, "color": AXIS, "dash": "dot"}, hoverinfo="skip",
        visible=visible, showlegend=False, cliponaxis=False,
    )  # fmt: skip


@dataclass(frozen=True)
class _LagProfile:
    """The credit of one result by lag, beside attention and counting."""

    group: ResultGroup
    member: NamedResult
    reader_of: str

    @cached_property
    def profile(self) -> xr.Dataset:
        return profile(self.member.result, (), self.reader_of)

    @cached_property
    def sums(self) -> xr.Dataset:
        """The share of all lags up to each, with the error of that sum."""
        return cumulative_profile(self.member.result, (), self.reader_of)

    @cached_property
    def attention(self) -> np.ndarray:
        return attention_profile(self.member.result, (), self.reader_of).values

    @cached_property
    def reach(self) -> xr.DataArray | None:
        """The lag of each level, by quantity; None if the lags were not measured."""
        result = self.member.result
        return reach(result, (), LEVELS, self.reader_of).lag if has_lags(result) else None

    @property
    def bins(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last lag of each bin."""
        return self.member.result.lag.values, self.member.result.lag_end.values

    def traces(self, stream: str, view: str, same: bool, counting: bool) -> list[go.Scatter]:
        """Draw the panel of one stream; `same` if counting gives the same for all results of the page."""
        group, member = self.group, self.member
        label, colour = group.label(member, "credit"), group.colour(member, OTHER)
        share, error = self._credit(stream, view)
        credit = self._by_lag(share, view, error)
        traces = band(label, credit["x"], share, error, colour, visible=view != "lag")
        if group.single:
            attention = self._by_lag(lag_view(self.attention, self.bins, view), view)
            traces.append(line("attention", colour=ATTENTION, dash="dot", **BEHIND, **attention))
        if counting:
            name, shade = (EDGES, COUNT) if same else (f"counting, {label}", colour)
            counted = lag_view(self.profile.counted.values, self.bins, view)
            traces.append(counting_line(name, colour=shade, **self._by_lag(counted, view)))
        traces.append(line(label, colour=colour, **credit))
        traces.append(self._crossings(stream, visible=view == "sum"))
        return [*traces, self._self_edge(label, credit["x"][0], share[0], math.nan if view == "lag" else error[0])]

    def _crossings(self, stream: str, visible: bool) -> go.Scatter:
        """Mark the lags from which on the share within them stays at each level or above, on the line, with numbers."""
        within = self.reach
        lags = np.full(len(LEVELS), np.nan) if within is None else within.sel(quantity=f"{stream} credit").values
        share = share_at_lag(lags, self.sums.share.sel(stream=stream).values, *self.bins)
        colour = self.group.colour(self.member, OTHER)
        return go.Scatter(
            x=json_numbers(bin_middles(lags, lags)), y=json_numbers(share),
            mode="markers+text" if self.group.single else "markers",
            text=["" if math.isnan(lag) else f"{lag:.0f}" for lag in lags],
            textposition="bottom right", textfont={"size": 11, "color": colour},
            marker={"symbol": "diamond", "size": 8, "color": colour}, hoverinfo="skip",
            visible=visible, showlegend=False,
        )  # fmt: skip

    def _credit(self, stream: str, view: str) -> tuple[np.ndarray, np.ndarray]:
        """Return what a view shows of the credit, with its standard error."""
        shares = (self.sums if view == "sum" else self.profile).sel(stream=stream)
        share, error = shares.share.values, self.member.uncertainty(shares.error.values)
        if view == "sum":
            return share, error
        single = lag_view(share, self.bins, view)
        return single, error / (self.bins[1] - self.bins[0] + 1 if view == "lag" else doublings(*self.bins))

    def _self_edge(self, label: str, x: float, y: float, error: float) -> go.Scatter:
        """Mark the credit of the self edge on the line of a result."""
        colour, single = self.group.colour(self.member, SELF), self.group.single
        bar = {"error_y": {"array": [error], "thickness": 1.5, "color": colour}} if np.isfinite(error) else {}
        return go.Scatter(
            mode="markers", name="credit of the self edge", legendgroup="self" if single else label, showlegend=single,
            x=[float(x)], y=json_numbers([y]), hoverinfo="skip", **bar,
            marker={"size": 9, "color": colour, "line": {"width": 1.5, "color": PAPER}},
        )  # fmt: skip

    def _by_lag(self, numbers: np.ndarray, view: str, errors: np.ndarray | None = None) -> dict:
        """Return the numbers of a line, with labels; a sum stands at the last lag of its bin."""
        first, last = self.bins
        names = bin_names(np.zeros_like(first) if view == "sum" else first, last)
        errors = np.full(len(numbers), np.nan) if errors is None else errors
        digits = fine_percent if view == "lag" else percent
        labels = [[name, digits(*pair)] for name, *pair in zip(names, numbers, errors, strict=True)]
        return {
            "x": bin_middles(last if view == "sum" else first, last), "y": numbers,
            "customdata": labels, "hover": "lag %{customdata[0]}: %{customdata[1]}",
        }  # fmt: skip


def lag_view(share: np.ndarray, bins: tuple[np.ndarray, np.ndarray], view: str) -> np.ndarray:
    """Return the shares of bins of lags as a view shows them."""
    if view == "sum":
        return share.cumsum()
    return single_shares(share, *bins) if view == "lag" else share / doublings(*bins)
