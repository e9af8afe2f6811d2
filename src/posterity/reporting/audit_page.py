"""An audit as a page: the table of verdicts, then every clause with its figures and pictures."""

from itertools import zip_longest
from typing import Any

import xarray as xr
from markupsafe import Markup

from posterity.clauses.audit import CLAUSES
from posterity.clauses.drawing import Chart, View
from posterity.errors import InputError
from posterity.reporting.audit_table import NOTE, rows
from posterity.reporting.html import asset, escaped_json, page_environment, plotly_script, policy
from posterity.reporting.html import shown as as_shown
from posterity.results.audit_schema import REFUSED
from posterity.results.schema import plain


def render(audit: xr.Dataset) -> str:
    """The page as one string of HTML; `audit` as `posterity.audit` gives it."""
    models = [str(one) for one in audit.model.values]
    views = {model: View(audit, model) for model in models}
    clauses, charts = [], []
    for at, number in enumerate(audit.clause.values.tolist()):
        shown = []
        drawn = {model: _pictures(audit, view, at) for model, view in views.items()}
        for pictures in zip_longest(*drawn.values()):  # the same picture of every model side by side
            for model, chart in zip(models, pictures, strict=True):
                if chart is not None:
                    place = f"chart-{len(charts)}"
                    charts.append({"place": place, **_drawn(chart)})
                    title = f"{chart.title} · {model}" if len(models) > 1 else chart.title
                    shown.append({"place": place, "title": title, "text": chart.text})
        clauses.append(
            {
                "number": number, "name": str(audit.name.values[at]), "statement": str(audit.statement.values[at]),
                "verdicts": [str(one) for one in audit.verdict.values[:, at]],
                "reasons": [str(one) for one in audit.reason.values[:, at]], "rows": list(rows(audit, number)),
                "charts": shown,
            }
        )  # fmt: skip
    scripts = [plotly_script(), asset("audit.js")]
    provenance = [(str(name).replace("_", " "), str(plain(value))) for name, value in audit.attrs.items()]
    return page_environment().get_template("audit.html.j2").render(
        models=models, clauses=clauses, note=NOTE, provenance=[pair for pair in provenance if pair[1]],
        style=Markup(asset("style.css") + asset("audit.css")), scripts=[Markup(code) for code in scripts],
        policy=policy(scripts), data=Markup(escaped_json(charts)),
    )  # fmt: skip


def _pictures(audit: xr.Dataset, view: View, at: int) -> list[Chart]:
    """The pictures of a clause, the one at this place.

    Raises:
        InputError: Something that it was measured by is missing or has another form.
    """
    number = int(audit.clause[at])
    clause = next((one for one in CLAUSES if one.number == number), None)
    try:
        assert clause is not None, "there is no such clause"
        return list(clause.draw(view))
    except (LookupError, AttributeError, ValueError, TypeError, AssertionError) as error:  # as xarray and numpy put it
        if (audit.verdict[:, at] == REFUSED).all():
            return []
        raise InputError(
            f"expected an audit with all that it measured, but clause {number} cannot be drawn ({error}): audit again"
        ) from error


def _drawn(chart: Chart) -> dict[str, Any]:
    traces = [{**trace, "name": as_shown(str(trace.get("name") or ""))} for trace in chart.traces]
    return {"traces": traces, "x": as_shown(chart.x), "y": as_shown(chart.y), "layout": chart.layout}
