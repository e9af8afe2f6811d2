"""What trains the residual stream as a page: parts of the parameters' gradient by layer, pulls on directions."""

import xarray as xr

from posterity.axes import FEATURE_PARTS
from posterity.palette import LATE, OTHER, SELF
from posterity.reporting.feature_table import (
    INFLUENCE_COLUMNS,
    LAYER_COLUMNS,
    PULL_COLUMNS,
    direction_rows,
    feature_heading,
    influence_rows,
    layer_rows,
)
from posterity.reporting.html import list_origin, render_page
from posterity.reporting.page_figures import page_figures
from posterity.reporting.panel_grid import Panel, PanelGrid
from posterity.reporting.traces import ZERO_LINE, band, line
from posterity.results.feature_parts import part_shares
from posterity.results.formatting import error_words
from posterity.results.ratios import uncertainty

COLOURS = dict(zip(FEATURE_PARTS, (SELF, OTHER, LATE), strict=True))


def render_features(features: xr.Dataset) -> str:
    """Return the page as one string of HTML; `features` as `posterity.features` returns it."""
    title, *details = feature_heading(features)
    tables = [{"title": "Parts of the parameters' gradient", "columns": LAYER_COLUMNS, "rows": layer_rows(features)}]
    if "pull" in features:
        tables.append({"title": "Pulls on directions", "columns": PULL_COLUMNS, "rows": direction_rows(features)})
    if rows := influence_rows(features) if "influence" in features else []:
        tables.append({"title": "What a step along each part does", "columns": INFLUENCE_COLUMNS, "rows": rows})
    return render_page(
        "features.html.j2", page_figures({"parts": _parts_figure(features)}), title=title, details=details,
        tables=tables, error=error_words(features.sizes["document"]), origin=list_origin(features),
    )  # fmt: skip


def _parts_figure(features: xr.Dataset) -> PanelGrid:
    """Draw the share of each part by layer."""
    shares, traces = part_shares(features), []
    error = uncertainty(shares.error, features.sizes["document"])
    mode = "lines+markers" if shares.sizes["layer"] < 40 else "lines"
    for part, colour in COLOURS.items():
        share = shares.share.sel(part=part)
        traces += band(part, shares.layer.values, share, error.sel(part=part), colour)
        traces.append(line(part, shares.layer.values, share, colour, hover="%{y:.1%}", mode=mode))
    x = {"title": "layer in front of which the stream is split", "rangemode": "tozero"}
    y = {"title": "share of the squared gradient", "tickformat": ".0%", **ZERO_LINE}
    return PanelGrid("Parts of the parameters' gradient by layer", [Panel("", traces, x, y)], height=340, columns=1)
