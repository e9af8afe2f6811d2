"""Results as a page: sentence, table, rankings, provenance and pictures, side by side."""

import xarray as xr
from markupsafe import Markup

from posterity.reporting.charts import charts
from posterity.reporting.html import asset, escaped_json, page_environment, plotly_script, policy, shown
from posterity.reporting.summary import (
    Head,
    heading,
    mean_loss,
    model_name,
    notes,
    ranked_heads,
    rows,
    sentence,
    text_name,
)
from posterity.reporting.tables import tables
from posterity.results import schema as results
from posterity.results import stats as derived
from posterity.results import steps
from posterity.results.formatting import percent

EXTREMES = 5  # heads shown at each end of the ranking


TEXTS = 12  # texts shown by name


def render(loaded: list[xr.Dataset]) -> str:
    """The page as one string of HTML."""
    last = [steps.latest(one) for one in loaded]
    names = labels(last)
    results_shown = [
        {"name": name, **_words(one), "tables": tables(over_steps)}
        for name, one, over_steps in zip(names, last, loaded, strict=True)
    ]
    data = [{"name": shown(name), **charts(one)} for name, one in zip(names, loaded, strict=True)]
    glass = any(one["glass"] for one in data)
    scripts = [plotly_script(), asset("result.js"), *([asset("inspected_text.js")] if glass else [])]
    return (
        page_environment()
        .get_template("result.html.j2")
        .render(
            results=results_shown,
            streams=results.STREAMS,
            weights=any(one["weights"] for one in data),
            has={name for one in results_shown for name in one["tables"]},
            glass=glass,
            style=Markup(asset("style.css") + (asset("inspected_text.css") if glass else "")),
            scripts=[Markup(code) for code in scripts],
            policy=policy(scripts),
            data=Markup(escaped_json(data)),
        )
    )


def labels(loaded: list[xr.Dataset]) -> list[str]:
    """A name for each result that tells it from the others: the model, then the text, then a number."""
    names = [model_name(one) for one in loaded]
    if len(set(names)) < len(names):
        names = [f"{name}, {text_name(one)}" for name, one in zip(names, loaded, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return names


def _words(result: xr.Dataset) -> dict:
    """What the template shows of one result as text and tables."""
    title, *details = heading(result)
    return {
        "model": title,
        "details": details,
        "sentence": sentence(result),
        "rows": rows(result),
        "notes": notes(result),
        "heads": {stream: _ends(ranked_heads(result, stream)[::-1]) for stream in results.STREAMS},
        "provenance": _provenance(result),
        "texts": _texts(result),
    }


def _ends(heads: list[Head]) -> list[dict | None]:
    """The first and the last few of the ranking, as text; None stands for those left out between them."""
    cells: list[dict | None] = []
    for one in heads:
        name, share = f"layer {one.layer}, head {one.head}", percent(one.share, one.error)
        cells.append({"name": name, "share": share, "portion": f"{one.portion:.2f}"})
    return cells if len(cells) <= 2 * EXTREMES + 1 else [*cells[:EXTREMES], None, *cells[-EXTREMES:]]


def _provenance(result: xr.Dataset) -> list[tuple[str, str]]:
    known = [(str(name).replace("_", " "), str(results.plain(value))) for name, value in result.attrs.items()]
    off = float(derived.balance(result).max())
    return [
        *((name, value) for name, value in known if value),
        ("accounts disagree by at most", f"{off:.1e} of a layer"),
    ]


def _texts(result: xr.Dataset) -> list[tuple[str, int, str]]:
    """Texts in the order of the windows: name, windows, mean loss; the last line counts those not shown."""
    names = [str(name) for name in result.text.values]
    unique = list(dict.fromkeys(names))
    table = [(name, names.count(name), mean_loss(result.isel(document=[one == name for one in names])))
             for name in unique[:TEXTS]]  # fmt: skip
    hidden = unique[TEXTS:]
    return [*table, (f"{len(hidden)} more texts", sum(map(names.count, hidden)), "")] if hidden else table
