"""Pages of HTML that need nothing else: templates, escaping, content security policy, plotly's script."""

import base64
import gzip
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import xarray as xr
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

HYPHEN = re.compile(r"(?<![\w.-])-(?=\d)")  # before a number
MARKS = 4  # on one letter
_LETTERS = "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]+"
RIGHT_TO_LEFT = re.compile(rf"{_LETTERS}(?:\W+{_LETTERS})*")  # words in a row


def render_page(
    template: str, data: object, styles: Sequence[str] = (), scripts: Sequence[str] = (), **values: Any
) -> str:
    """Fill a template; the page holds its styles, its scripts, plotly's script and the data that they draw.

    Args:
        template: The asset's name.
        data: What the scripts read, as JSON.
        styles: Names of assets beside style.css.
        scripts: Names of assets beside plotly's script, theme.js and numbers.js.
        values: What else the template shows; every text is escaped.
    """
    code = list(map(asset, ("theme.js", "numbers.js", *scripts)))
    return (
        page_environment()
        .get_template(template)
        .render(
            style=Markup("".join(map(asset, ("style.css", *styles)))), scripts=[Markup(script) for script in code],
            plotly=packed_plotly(), policy=policy([plotly_script(), *code]), data=packed_json(data),
            **values,
        )
    )  # fmt: skip


def list_origin(dataset: xr.Dataset) -> dict[str, str]:
    """Return where the numbers of a page come from: texts, command, version, dtype, device and digest, where known."""
    attrs = dataset.attrs
    origin = {
        "texts": "; ".join(dict.fromkeys(map(str, dataset.text.values))), "command": attrs.get("command", ""),
        "posterity": attrs.get("posterity_version", ""), "dtype": attrs.get("dtype", ""),
        "device": attrs.get("device", ""), "text digest": attrs.get("text_digest", ""),
    }  # fmt: skip
    return {name: str(value) for name, value in origin.items() if str(value)}


def without_plotly(page: str) -> str:
    """Return a page without plotly's script, which asks the other pages of a notebook for it."""
    return page.replace(packed_plotly(), "")


@cache
def page_environment() -> Environment:
    """Return what fills the templates of this package: everything is escaped, and nothing may be missing."""
    environment = Environment(
        loader=PackageLoader("posterity.reporting", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: displayable(value) if type(value) is str else value,
    )
    environment.filters["signed"] = signed
    environment.filters["tied"] = tied
    return environment


def signed(text: str) -> str:
    """Return a text whose numbers below zero have a minus and no hyphen."""
    return HYPHEN.sub("\u2212", text)


def tied(text: str) -> str:
    """Return such a text whose numbers are not parted from their signs at the end of a line."""
    return re.sub("(?<=±) | (?=[%†])", "\u00a0", signed(text))


def figure_text(text: str) -> str:
    """Return a text as a figure shows it: plotly reads a little HTML in its texts."""
    return displayable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def displayable(text: str) -> str:
    """Return a text whose right-to-left letters turn nothing else around, and whose marks cover nothing else."""
    if text.isascii() and text.isprintable():
        return text
    marks, signs = 0, []
    for sign in text:
        kind = unicodedata.category(sign)
        marks = marks + 1 if kind[0] == "M" else 0
        if marks <= MARKS:
            signs.append("\ufffd" if kind in ("Cc", "Cf", "Cs") and sign not in "\n\t" else sign)
    return RIGHT_TO_LEFT.sub("\u2068\\g<0>\u2069", "".join(signs))


def policy(scripts: list[str]) -> str:
    """Name the only scripts that a browser may run in the page, by their digests."""
    return " ".join(f"'sha256-{_digest(code)}'" for code in scripts)


def packed_json(data: object) -> str:
    """Return JSON as gzip in base64, a third of its size, which no HTML parser can mistake for markup."""
    return _pack(json.dumps(data, allow_nan=False, separators=(",", ":")))


def _pack(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _digest(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


def asset(name: str) -> str:
    """Read a file of this package."""
    return (files("posterity.reporting") / "assets" / name).read_text(encoding="utf-8").replace("\r\n", "\n")


@cache
def plotly_script() -> str:
    """Return plotly's own script: its bundle of cartesian charts, a third of the complete one."""
    code = asset("plotly/plotly-cartesian.min.js")
    assert "</script" not in code
    assert "<!--" not in code
    return code


@cache
def packed_plotly() -> str:
    """Return plotly's script as gzip in base64, 0.7 MB instead of 1.5; `theme.js` unpacks it."""
    return _pack(plotly_script())
