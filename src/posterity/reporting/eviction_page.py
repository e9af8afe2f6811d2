"""An eviction as a page: the table of scores for each budget, and the divergence by the share that is kept."""

import numpy as np
import xarray as xr

from posterity.palette import OTHER, SELF, SERIES
from posterity.reporting.eviction_table import budget_words, eviction_heading, kept_text, scorer_cells
from posterity.reporting.html import list_origin, render_page
from posterity.reporting.page_figures import page_figures
from posterity.reporting.panel_grid import Panel, PanelGrid
from posterity.reporting.traces import line
from posterity.results.formatting import error_words, value_with_error
from posterity.results.ratios import mean_and_error

FIRST_COLOURS = {"predicted price": SELF, "oracle: measured price": OTHER}  # of what the eye should find first


def render_eviction(eviction: xr.Dataset) -> str:
    """Return the page as one string of HTML; `eviction` as `posterity.evict` returns it."""
    title, *details = eviction_heading(eviction)
    tables = [
        {
            "title": budget_words(str(budget)),
            "rows": [scorer_cells(eviction.sel(scorer=scorer, budget=budget)) for scorer in eviction.scorer.values],
        }
        for budget in eviction.budget.values
    ]
    return render_page(
        "eviction.html.j2", page_figures({"divergence": _divergence_figure(eviction)}), title=title, details=details,
        tables=tables, shares=[kept_text(float(share)) for share in eviction.kept.values],
        error=error_words(eviction.sizes["document"]), origin=list_origin(eviction),
    )  # fmt: skip


def _divergence_figure(eviction: xr.Dataset) -> PanelGrid:
    """Draw the divergence of every scorer by the share that is kept, a panel for each budget."""
    shares, windows = 100 * eviction.kept.values, eviction.sizes["document"]
    panels = []
    for budget in eviction.budget.values:
        traces = []
        for number, scorer in enumerate(eviction.scorer.values):
            values = eviction.divergence.sel(scorer=scorer, budget=budget).transpose("document", "kept").values
            mean, error = mean_and_error(values)
            labels = [value_with_error(float(x), float(y), windows=windows) for x, y in zip(mean, error, strict=True)]
            style = {
                "mode": "lines+markers", "marker": {"size": 5}, "customdata": labels,
                "line": {"color": _colour(str(scorer), number), "width": 2.4 if str(scorer) in FIRST_COLOURS else 1.4,
                         "dash": ("solid", "dot", "dash")[number // len(SERIES) % 3]},
            }  # fmt: skip
            visible = np.where(mean > 0, mean, np.nan)  # on a log scale
            traces.append(line(str(scorer), shares, visible, SELF, hover="%{customdata}", **style))
        x = {"title": "pairs kept (%)", "type": "log", "tickvals": shares.tolist(),
             "ticktext": [kept_text(float(share)) for share in eviction.kept.values]}  # fmt: skip
        y = {"title": "divergence (nats per token)", "type": "log", "tickformat": ".1~r", "dtick": 1}
        panels.append(Panel(budget_words(str(budget)), traces, x, y))
    return PanelGrid("Divergence by the share of the pairs kept", panels, height=380, columns=2)


def _colour(scorer: str, number: int) -> str:
    return FIRST_COLOURS.get(scorer, SERIES[number % len(SERIES)])
