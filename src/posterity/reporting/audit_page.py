"""An audit as a page: the table of verdicts, then every clause with its figures and pictures."""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import xarray as xr
from plotly.basedatatypes import BaseTraceType

from posterity.clauses.all_clauses import CLAUSES
from posterity.clauses.drawing import Chart, View
from posterity.errors import InputError
from posterity.reporting.audit_table import figure_rows, reading_note
from posterity.reporting.html import figure_text, render_page
from posterity.reporting.page_figures import page_figures
from posterity.reporting.panel_grid import Axis, Panel, PanelGrid
from posterity.reporting.traces import ZERO_LINE, layer_axis
from posterity.results.audit_schema import REFUSED
from posterity.results.netcdf import portable_value

HEIGHT = 240  # pixels of a picture
LOG = {"type": "log", "dtick": "D2"}  # ticks at 1, 2 and 5 of every power of ten


def render_audit(audit: xr.Dataset) -> str:
    """Return the page as one string of HTML; `audit` as `posterity.audit` returns it."""
    models = [str(model) for model in audit.model.values]
    views = [View(audit, model) for model in models]
    clauses, grids = [], {}
    for index, number in enumerate(audit.clause.values.tolist()):
        pictures = []
        for charts in zip_longest(*(_draw_clause(audit, view, index) for view in views)):  # models side by side
            for model, chart in zip(models, charts, strict=True):
                if chart is not None:
                    name = f"chart-{len(grids)}"
                    title = f"{chart.title} · {model}" if len(models) > 1 else chart.title
                    grids[name] = draw_picture(chart, title)
                    pictures.append({"name": name, "title": title, "text": chart.text})
        clauses.append(
            {
                "number": number,
                "name": str(audit.name.values[index]),
                "statement": str(audit.statement.values[index]),
                "verdicts": [str(verdict) for verdict in audit.verdict.values[:, index]],
                "reasons": [str(reason) for reason in audit.reason.values[:, index]],
                "rows": list(figure_rows(audit, number)),
                "pictures": pictures,
            }
        )
    provenance = [(str(name).replace("_", " "), str(portable_value(value))) for name, value in audit.attrs.items()]
    return render_page(
        "audit.html.j2", page_figures(grids), styles=["audit.css"], models=models, clauses=clauses,
        note=reading_note(audit), provenance=[pair for pair in provenance if pair[1]],
    )  # fmt: skip


def _draw_clause(audit: xr.Dataset, view: View, index: int) -> list[Chart]:
    """Return the pictures of the clause at an index.

    Raises:
        InputError: Something that it was measured by is missing or has another form.
    """
    number = int(audit.clause[index])
    clause = next((clause for clause in CLAUSES if clause.number == number), None)
    try:
        assert clause is not None, "there is no such clause"
        return list(clause.draw(view))
    except (LookupError, AttributeError, ValueError, TypeError, AssertionError) as error:  # as xarray and numpy put it
        if (audit.verdict[:, index] == REFUSED).all():
            return []
        raise InputError(
            f"expected an audit with all that it measured, but clause {number} cannot be drawn ({error}): audit again"
        ) from error


def draw_picture(chart: Chart, title: str) -> PanelGrid:
    """Return the picture as a figure of one panel."""
    named = len(chart.traces) > 1 and chart.colours is None
    traces = [_escaped(trace, in_legend=named) for trace in chart.traces]
    x: Axis | Callable[[float], Axis] = {"title": chart.x} | (LOG if "x" in chart.log else {})
    if chart.x == "layer" and (places := [int(x) for trace in chart.traces for x in trace.to_plotly_json()["x"]]):
        x = layer_axis(max(places) + 1)
    y: dict[str, Any] = {"title": chart.y, "hoverformat": ".4~g", **ZERO_LINE} | (LOG if "y" in chart.log else {})
    y |= {"range": list(chart.y_range)} if chart.y_range else {}
    colours = None if chart.colours is None else dict(chart.colours)
    return PanelGrid(
        title, [Panel("", traces, x, y)], height=HEIGHT, columns=1,
        colours=None if colours is None else lambda length: colours,
    )  # fmt: skip


def _escaped(trace: BaseTraceType, in_legend: bool) -> BaseTraceType:
    """Return the trace with its names as a figure shows them."""
    attributes = trace.to_plotly_json()
    if name := attributes.get("name"):
        attributes |= {"name": figure_text(name), "legendgroup": name if in_legend else None}
    if attributes["type"] == "bar":
        attributes["x"] = [figure_text(str(name)) for name in attributes["x"]]
    return type(trace)(attributes, showlegend=in_legend)
