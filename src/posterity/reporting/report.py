"""Results as one page of HTML that needs nothing else: no network, no server, no other file."""

import base64
import hashlib
import html
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import xarray as xr
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from posterity.errors import InputError
from posterity.reporting.charts import charts
from posterity.reporting.summary import (
    Head,
    heading,
    mean_loss,
    model_name,
    notes,
    percent,
    ranked_heads,
    rows,
    sentence,
    text_name,
)
from posterity.reporting.tables import tables
from posterity.results import audit_schema as outcome
from posterity.results import files as stored
from posterity.results import schema as results
from posterity.results import stats as derived
from posterity.results import steps

Source = xr.Dataset | str | os.PathLike[str]
EXTREMES = 5  # heads shown at each end of the ranking
TEXTS = 12  # texts shown by name
MARKS = 4  # on one letter
_LETTERS = "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]+"
RIGHT_TO_LEFT = re.compile(rf"{_LETTERS}(?:\W+{_LETTERS})*")  # words in a row


@dataclass(frozen=True)
class Page:
    """A page that a notebook shows by itself, also after it was exported."""

    html: str

    def _repr_html_(self) -> str:
        style = "width:100%;height:52rem;border:1px solid #8884;border-radius:8px"
        return (
            f'<iframe srcdoc="{html.escape(self.html, quote=True)}" title="Posterity report" style="{style}" '
            'sandbox="allow-scripts allow-downloads allow-modals"></iframe>'
        )

    def __repr__(self) -> str:
        """Short, so that a notebook's log does not hold the page twice."""
        return f"<Page of {len(self.html) / 1e6:.1f} MB: show it in a notebook or write it with a path>"


def report(result: Source | Iterable[Source], path: str | os.PathLike[str] | None = None) -> Page | Path:
    """Show one or more results (or files of results) side by side.

    With a path the page is written there, whole or not at all, and the path is returned; without one the page itself is
    returned, which a notebook shows. Raises InputError for a path that cannot be written or what is not a result.
    """
    target = None if path is None else results.writable(path)
    sources = [result] if isinstance(result, (xr.Dataset, str, os.PathLike)) else list(result)
    if not sources:
        raise InputError("expected at least one result for the report, but none came; pass a result or a file")
    files = [
        os.path.realpath(one) for one in sources if isinstance(one, (str, os.PathLike)) and "\0" not in os.fspath(one)
    ]
    if path is not None and os.path.realpath(path) in files:
        raise InputError(
            f"the page would take the place of the result {path}: choose another path, such as report.html"
        )
    loaded = [stored.load(one) if isinstance(one, (str, os.PathLike)) else one for one in sources]
    page = _rendered(loaded)
    if target is None or path is None:
        return Page(page)
    results.write_whole(target, page.encode())
    return Path(path)


def _rendered(loaded: list[xr.Dataset]) -> str:
    """The page of results, or of one audit or comparison."""
    kinds = {results.kind(one) for one in loaded} - {""}
    if not kinds:
        return render([results.check(one) for one in loaded])
    if len(loaded) > 1:
        raise InputError(
            "expected results, or one audit or comparison, which has a page of its own: audit several models in one "
            "command (--beside) to see them side by side"
        )
    if kinds == {"comparison"}:
        from posterity.reporting.comparison_page import render as render_comparison
        from posterity.training import compare as comparison

        return render_comparison(comparison.check(loaded[0]))
    from posterity.reporting.audit_page import render as render_audit

    return render_audit(outcome.check(loaded[0]))


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


def page_environment() -> Environment:
    """What fills the templates of this package: everything is escaped, and nothing may be missing."""
    environment = Environment(
        loader=PackageLoader("posterity.reporting", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: shown(value) if type(value) is str else value,
    )  # fmt: skip
    environment.filters["tied"] = lambda text: text.replace("± ", "±\u00a0").replace(" %", "\u00a0%")
    return environment


def shown(text: str) -> str:
    """A text as a page can show it: right-to-left letters turn nothing else around, and marks cover nothing else."""
    marks, signs = 0, []
    for sign in text:
        kind = unicodedata.category(sign)
        marks = marks + 1 if kind[0] == "M" else 0
        if marks <= MARKS:
            signs.append("\ufffd" if kind in ("Cc", "Cf", "Cs") and sign not in "\n\t" else sign)
    return RIGHT_TO_LEFT.sub("\u2068\\g<0>\u2069", "".join(signs))


def policy(scripts: list[str]) -> str:
    """The only scripts that a browser may run in the page, by their digests."""
    return " ".join(f"'sha256-{_digest(code)}'" for code in scripts)


def labels(loaded: list[xr.Dataset]) -> list[str]:
    """A name for each result that tells it from the others: the model, then the text, then a number."""
    names = [model_name(one) for one in loaded]
    if len(set(names)) < len(names):
        names = [f"{name}, {text_name(one)}" for name, one in zip(names, loaded, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return names


def escaped_json(data: object) -> str:
    """JSON that no HTML parser can mistake for markup and no script for a line end."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII, so U+2028 and U+2029 are escaped
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


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


def _digest(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


def asset(name: str) -> str:
    """A file of this package as text."""
    return (files("posterity.reporting") / "assets" / name).read_text(encoding="utf-8").replace("\r\n", "\n")


@cache
def plotly_script() -> str:
    """Plotly's own script, from its Python package."""
    from plotly.offline import get_plotlyjs  # slow to import, and only a report needs it

    code = get_plotlyjs()
    assert "</script" not in code
    assert "<!--" not in code
    assert "\r" not in code
    return code
