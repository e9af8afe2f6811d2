"""Names and tokens that mean harm: no page runs, fetches or holds anything of them, and no terminal obeys them."""

import io
import unicodedata

import numpy as np
import pytest
import xarray as xr
from rich.console import Console
from support.pages import browser, opened, page
from support.sample import sample

import posterity
from posterity.reporting.html import MARKS, displayable
from posterity.results.audit_schema import AUDIT, KIND_VERSION
from posterity.results.comparison_schema import COMPARISON

SCRIPT = "<script>document.title='ran'</script><img src=//evil.example/x onerror=alert(1)><svg onload=alert(2)>"
EVIL = [
    SCRIPT,
    "</script><!--<script>",
    "</style><style>*{display:none}",
    "\"' onmouseover=alert(3) x=\"'",
    "{{ 7*7 }}{% raise %}",
    "javascript:alert(4)",
    "%{customdata}<a href='javascript:alert(5)'>x</a><br>",
    "\u202eDESREVER\u2066\u2069\u200f",
    "שלום עולם",
    "zero\u200b\ufeffwidth",
    "Z" + "\u0301\u0489" * 300,
    "👩‍🚀🏴\U000e0067🙂",
    "\x1b[2J\x1b]0;title\x07\x9b31m\b\r",
    "lone\ud800surrogate",
    "\u2028\u2029\x85\x0c",
    "[red]markup[/red] [/nothing]",
]
ALL = "|".join(EVIL)


def measured():
    tokens = [EVIL[i % len(EVIL)] for i in range(16)]
    names = {"model": ALL, "text_name": ALL, "revision": ALL, "architecture": ALL, "command": ALL, "dtype": ALL}
    return sample(
        layers=2, heads=2, context=16, documents=3, losses=True, horizons=(1, 4), tokens=tokens, parameters=EVIL,
        modules=EVIL[:2], texts=EVIL[6:9], **names,
    )  # fmt: skip


def compared():
    arms = ["vanilla", *EVIL]
    return xr.Dataset(
        {"loss": (("run", "document", "position"), np.ones((len(arms), 2, 4)), {"units": ALL})},
        {"folder": ("run", ["a", *EVIL]), "arm": ("run", arms), "seed": ("run", [0] * len(arms)),
         "document": range(2), "position": range(4)},
        {"kind": COMPARISON.name, "data": ALL, "steps": 5},
    )  # fmt: skip


def audited():
    """One model, one clause, one measure, without pictures; every text of it hostile."""
    texts = {"reason": (("model", "clause"), [[ALL]]), "name": ("clause", [ALL]), "statement": ("clause", [ALL])}
    texts |= {name: ("measure", [ALL]) for name in ("formula", "expected", "units_of")}
    numbers = {name: (("model", "measure"), [[0.5]]) for name in ("figure", "error", "baseline")}
    coords = {"model": [ALL], "clause": [1], "measure": [ALL], "of_clause": ("measure", [1])}
    verdict = {"verdict": (("model", "clause"), [["not measured"]])}
    return xr.Dataset(
        {**texts, **numbers, **verdict}, coords, {"kind": AUDIT.name, "kind_version": KIND_VERSION, "model": ALL}
    )


PAGES = {"measured": measured, "compared": compared, "audited": audited}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PAGES)
def test_nothing_of_a_name_runs_or_is_fetched_and_no_node_of_it_is_in_the_page(tmp_path, kind):
    path = tmp_path / "<img src=x onerror=alert(6)>\u202e.html"
    with browser() as (tab, heard):
        tab.goto(posterity.report(PAGES[kind](), path).as_uri())
        tab.wait_for_selector("html[data-drawn]")
        tab.mouse.move(400, 400)
        assert tab.title().startswith("Posterity")
        assert (
            tab.evaluate("document.querySelectorAll('img, iframe, object, embed, base, link, a[href*=script]').length")
            == 0
        )
        on = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(n => n.startsWith('on'))"
        assert tab.evaluate(on) == []
        assert tab.evaluate("getComputedStyle(document.querySelector('main')).display") != "none"
        text = tab.locator("body").inner_text()
        assert SCRIPT in text
        assert not any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text if sign not in "\n\t")
        assert not set("\u202e\u2066\u200f\u200b") & set(text)
        assert heard == []


@pytest.mark.slow
def test_right_to_left_letters_turn_nothing_around_them_around(tmp_path):
    """Where the words of a line stand, from left to right, is the order in which they are written."""
    with browser() as (tab, heard):
        result = sample(model="שלום", architecture="עולם", dtype="טוב", text_name="ערב")
        opened(tab, posterity.report(result, tmp_path / "report.html"))
        places = """() => {
            const line = [...document.querySelectorAll('.details')].find(e => e.textContent.includes('nats'));
            const text = line.firstChild, found = []; for (const word of ['ערב', '5', '64', 'loss']) {
            const range = document.createRange(), at = text.data.indexOf(word); range.setStart(text, at);
            range.setEnd(text, at + word.length); found.push(range.getBoundingClientRect().x); } return found; }"""
        found = tab.evaluate(places)
        assert found == sorted(found)
        assert heard == []


def test_texts_of_a_page_are_isolated_and_of_finite_height():
    assert displayable("a שלום עולם 5 windows") == "a \u2068שלום עולם\u2069 5 windows"
    assert displayable("\u202ea\u2069\x1b\ud800") == "\ufffda\ufffd\ufffd\ufffd"
    assert displayable("e" + "\u0301" * 100 + "e\u0301") == "e" + "\u0301" * MARKS + "e\u0301"
    assert displayable("1.5\u00a0% ± 2") == "1.5\u00a0% ± 2"


@pytest.mark.parametrize("kind", PAGES)
def test_every_page_is_whole_unicode_and_nothing_in_it_is_markup_of_a_name(kind):
    text = page(PAGES[kind]())
    text.encode()
    assert "<img" not in text.split("<script")[0]
    assert text.count("</script>") == text.count("<script")
    assert not set("\u202e\u200f\u2066") & set(text.split("<script")[0])


@pytest.mark.parametrize("kind", PAGES)
def test_a_terminal_gets_no_commands(tmp_path, kind):
    path = posterity.save(PAGES[kind](), tmp_path / "a.nc")
    file = io.StringIO()
    posterity.summary(posterity.load(path), Console(file=file, width=80, highlight=False))
    assert [sign for sign in file.getvalue() if not sign.isprintable() and sign != "\n"] == []
