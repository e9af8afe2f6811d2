"""Pages of HTML that need nothing else: templates, escaping, content security policy, plotly's script."""

import base64
import hashlib
import json
import re
import unicodedata
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined

MARKS = 4  # on one letter


_LETTERS = "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]+"


RIGHT_TO_LEFT = re.compile(rf"{_LETTERS}(?:\W+{_LETTERS})*")  # words in a row


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


def escaped_json(data: object) -> str:
    """JSON that no HTML parser can mistake for markup and no script for a line end."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII, so U+2028 and U+2029 are escaped
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


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
