"""Compared runs as a page: the table of arms, and the gap by position."""

import numpy as np
import xarray as xr

from posterity.palette import OTHER, SELF, SERIES
from posterity.reporting.comparison_table import arm_cells, gap_error_words
from posterity.reporting.html import render_page
from posterity.reporting.page_figures import page_figures
from posterity.reporting.panel_grid import Panel, PanelGrid
from posterity.reporting.traces import ZERO_LINE, band, line
from posterity.results.comparison_schema import myopia_gaps
from posterity.results.formatting import fixed_with_error

COLOURS = (SELF, OTHER, *SERIES)  # of the arms


def render_comparison(compared: xr.Dataset) -> str:
    """Return the page as one string of HTML; `compared` as `posterity.compare` returns it."""
    gaps, units = myopia_gaps(compared), str(compared.loss.attrs["units"])
    arms = [
        dict(zip(("name", "seeds", "loss", "gap"), arm_cells(gaps.sel(arm=arm)), strict=True))
        for arm in gaps.arm.values
    ]
    others = gaps.isel(arm=slice(1, None))  # all but the plain runs
    numbers = zip(others.gap_by_position.values.T, others.gap_by_position_error.values.T, strict=True)
    rows = [
        (int(position), [fixed_with_error(*pair, "+") for pair in zip(gap, error, strict=True)])
        for position, (gap, error) in zip(gaps.position.values, numbers, strict=True)
    ]
    return render_page(
        "comparison.html.j2", page_figures({"gap": _gap_figure(others, units)}), text=compared.attrs["data"],
        steps=compared.attrs["steps"], documents=compared.sizes["document"], positions=compared.sizes["position"],
        units=units, arms=arms, rows=rows, error=gap_error_words(gaps, compared.sizes["document"]),
        runs=list(zip(*(compared[name].values.tolist() for name in ("folder", "arm", "seed")), strict=True)),
    )  # fmt: skip


def _gap_figure(gaps: xr.Dataset, units: str) -> PanelGrid:
    """Draw the gap of every arm by position, with its band."""
    traces = []
    x = np.arange(gaps.sizes["position"])
    for number, arm in enumerate(gaps.arm.values):
        gap = gaps.sel(arm=arm)
        name, colour = str(arm), COLOURS[number % len(COLOURS)]
        traces += band(name, x, gap.gap_by_position, gap.gap_by_position_error, colour)
        mode = "markers" if len(x) < 2 else "lines"
        traces.append(line(name, x, gap.gap_by_position, colour, hover="%{y:.4f}", mode=mode))
    panel = Panel("", traces, {"title": "position"}, {"title": f"gap ({units})", "rangemode": "tozero", **ZERO_LINE})
    return PanelGrid("Myopia gap by position", [panel], height=320, columns=1)
