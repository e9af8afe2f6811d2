"""Laws of the summary and of the page: true, escaped, whole, and without any other computer."""

import html
import io
import json
import re
from contextlib import contextmanager
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console
from sample import sample

from posterity import derived
from posterity import result as results
from posterity.errors import InputError
from posterity.report import Page, _plotly, escaped_json, labels, report
from posterity.summary import percent, ranked_heads, rows, sentence, summary

HOSTILE = "<b>&lt;</b><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'\"{{7*7}}%{y}\u2028"
CHARTS = ["map", "lags", "layers", "positions", "first", "weights", "agreement"]
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def plain():
    return sample()


@pytest.fixture(scope="module")
def hostile():
    return sample(model=HOSTILE, text_name=HOSTILE, texts=[HOSTILE] * 5, modules=[HOSTILE] * 4, revision=HOSTILE)


PAGES = {}


def page(*given) -> str:
    """The page of these results, made once for each."""
    key = tuple(map(id, given))
    if key not in PAGES:
        made = report(list(given))
        assert isinstance(made, Page)
        PAGES[key] = given, made.html
    return PAGES[key][1]


def printed(result, width=80) -> str:
    file = io.StringIO()
    summary(result, Console(file=file, width=width, highlight=False))
    return file.getvalue()


class Reader(HTMLParser):
    """Tags with their attributes, text outside scripts and styles, and the contents of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self.inside = [], "", [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data


# ---- the summary


def test_the_summary_fits_eighty_columns(plain):
    text = printed(plain)
    assert all(len(line) <= 80 for line in text.splitlines())
    for row in rows(plain):
        line = next(line for line in text.splitlines() if row.label in line)
        assert not line.rstrip().endswith("…")
        assert all(cell in text for cell in row.cells)


def test_the_summary_shows_the_numbers_of_the_result(plain):
    cells = {row.label.strip(): row.cells for row in rows(plain) if "counting" not in row.label}
    found = derived.shares(plain)
    for index, stream in enumerate(results.STREAMS):
        for side in results.SIDES:
            one = found.sel(stream=stream, side=side)
            assert cells[f"{side} share"][index] == f"{100 * one.share:.1f} ± {100 * one.error:.1f} %"
        by_head = derived.shares(plain, ("layer", "head")).share.sel(stream=stream, side="self")
        best = by_head.where(~derived.weak(plain).sel(stream=stream)).stack(one=("layer", "head")).idxmax("one").item()
        assert cells["largest, head"][index].startswith(f"L{best[0]} H{best[1]} ")


def test_the_sentence_follows_the_numbers(plain):
    assert "keys and values mostly for later readers" in sentence(plain)
    own = plain.copy(deep=True)
    own["credit_by_document"].loc[{"side": "self", "stream": "key"}] *= 100
    assert "keys mostly for their own position and its values mostly for later readers" in sentence(own)
    even = plain.copy(deep=True)
    wobble = np.array([0.1, -0.1, 0.1, -0.1, 0.05])[:, None, None, None, None] * np.array([1, -1])
    even["credit_by_document"] = plain.credit_by_document * 0 + 1 + wobble
    assert "keys and values about equally" in sentence(even)


def test_the_summary_says_what_is_not_known(plain):
    broken = plain.copy(deep=True)
    broken["credit_by_document"][0, 0, 0, 1, 0] = np.nan
    broken["loss"][2] = np.nan
    text = printed(broken, 100)
    assert "–" in text
    assert "nan" not in text
    assert "known for 4 of 5 windows" in text
    assert "its values mostly" in text
    assert "of the keys" not in sentence(broken)
    broken["credit_by_document"][:] = np.nan
    assert "cannot be said" in sentence(broken)
    assert "nan" not in printed(broken)


def test_the_summary_of_one_window_without_lags_or_weights_has_no_made_up_numbers():
    text = printed(sample(documents=1, lags="self", with_weights=False))
    assert "±" not in text
    assert "there are no standard errors" in text
    assert "half of the credit" not in text
    assert "gradient of" not in text
    assert "agreement" not in text
    assert re.search(r"median lag of the credit\s+–\s+–\s+–", text)


def test_accounts_that_disagree_are_told(plain):
    assert "Warning" not in printed(plain)
    wrong = plain.copy(deep=True)
    wrong["credit"][1, 1] *= 1.5
    assert "Warning: the accounts of the credit disagree" in printed(wrong)


def test_rich_markup_in_a_name_is_shown_as_it_is():
    assert printed(sample(model="[red]name[/red]")).count("[red]name[/red]") == 2  # title and sentence


def test_a_summary_of_something_else_is_refused():
    with pytest.raises(InputError, match="but str came"):
        summary("run.nc")  # pyright: ignore[reportArgumentType]


def test_a_head_with_almost_no_credit_is_not_ranked(plain):
    faint = plain.copy(deep=True)
    faint["credit_by_document"][:, 2, 1] *= 0.001
    ranked = {(one.layer, one.head) for one in ranked_heads(faint, "key")}
    assert (2, 1) not in ranked
    assert {(one.layer, one.head) for one in ranked_heads(plain, "key")} - ranked == {(2, 1)}
    shares = [one.share for one in ranked_heads(plain, "key")]
    assert shares == sorted(shares)


def test_percentages_show_small_numbers_and_their_errors():
    assert percent(0.12345, 0.00612) == "12.3 ± 0.6 %"
    assert percent(0.12345, 0.00012) == "12.35 ± 0.01 %"
    assert percent(0.0012) == "0.12 %"
    assert percent(float("nan"), 0.1) == "–"


# ---- the page


def test_names_of_every_kind_show_as_text(hostile):
    read, reference = Reader(page(hostile)), Reader(page(sample(texts=["text"] * 5)))
    assert [tag for tag, _ in read.tags] == [tag for tag, _ in reference.tags]
    shown = HOSTILE.replace("\u2028", " ")
    assert read.text.count(shown) >= 6
    assert any(attrs.get("title") == shown for _, attrs in read.tags)
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)


def test_the_data_of_the_page_is_json_that_no_parser_mistakes_for_markup(hostile, plain):
    read = Reader(page(hostile, plain))
    kinds = [attrs.get("type") for tag, attrs in read.tags if tag == "script"]
    data = read.scripts[kinds.index("application/json")]
    assert not re.search("[<>&\u2028\u2029]", data)
    first, second = json.loads(data)
    assert first["name"] == HOSTILE.replace("\u2028", " ")
    np.testing.assert_allclose(
        second["layer"]["share"]["key"], derived.shares(plain, ("layer",)).share[:, 1, 0], rtol=1e-5
    )
    np.testing.assert_allclose(second["lags"]["share"]["value"], derived.profile(plain).share[2], rtol=1e-5)


def test_escaped_json_means_the_same():
    value = {"a": HOSTILE, "b": [1.5, None, "</script><!--"]}
    assert json.loads(escaped_json(value)) == value
    assert not re.search("[<>&\u2028\u2029]", escaped_json(value))
    with pytest.raises(ValueError, match="JSON compliant"):
        escaped_json(float("nan"))


def test_the_page_names_no_other_computer(plain):
    text = page(plain, sample(seed=1)).replace(_plotly(), "")
    assert len(text) < 300_000
    assert not re.findall(r"(?:https?:)?//\w", re.sub(r"(?m)//\s.*$", "", text))
    assert not re.findall(r"@import|url\(|<link|<base|\bfetch\(|XMLHttp", text)
    assert not any({"src", "href", "action"} & set(attrs) - {"href"} for _, attrs in Reader(text).tags)
    assert {attrs["href"] for _, attrs in Reader(text).tags if "href" in attrs} == {"#charts"}


def test_the_page_runs_only_its_own_scripts(plain):
    import base64
    import hashlib

    read = Reader(page(plain))
    policy = next(attrs["content"] for tag, attrs in read.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split("style-src")[0]
    code = [one for one in read.scripts if not one.startswith("[{")]
    assert len(code) == 2
    for one in code:
        assert base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() in policy


def test_the_script_of_plotly_is_in_the_page_once(plain):
    assert page(plain, plain, plain).count(_plotly()) == 1


def test_numbers_that_are_not_known_do_not_stop_the_page(plain):
    broken = plain.copy(deep=True)
    broken["credit_by_document"][0, 0, 0, 1, 0] = np.nan
    broken["profile_by_document"][:, :, 2] = np.nan
    broken["credit"][:, :, 0] = np.nan
    read = Reader(page(broken))
    (data,) = json.loads(next(one for one in read.scripts if one.startswith("[{")))
    assert data["lags"]["share"]["value"] == [None] * broken.sizes["lag"]
    assert data["layer"]["share"]["key"][0] is None
    one = sample(layers=1, heads=1, context=1, documents=1, lags="all", with_weights=False)
    for result in (broken, one, sample(lags="self", with_weights=False, missing_heads=2)):
        text = page(result).replace(_plotly(), "")
        assert not re.search(r"\bnan\b|NaN|Infinity", text.split("<script>")[0])
        assert "undefined" not in text.split("<script>")[0]


def test_every_result_has_a_name_of_its_own(plain):
    assert labels([plain]) == ["tiny/sample"]
    assert labels([plain, sample(text_name="other")]) == ["tiny/sample, sample text", "tiny/sample, other"]
    assert len(set(labels([plain, plain, plain]))) == 3


def test_the_page_is_written_whole_to_its_path(tmp_path, plain):
    path = tmp_path / "report.html"
    assert report(plain, path) == path
    assert path.read_text(encoding="utf-8") == page(plain)
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_can_be_made_from_files(tmp_path, plain):
    saved = results.save(plain, tmp_path / "run.nc")
    assert report(saved).html == page(plain)
    assert report([str(saved), plain]).html == page(plain, plain)


def test_bad_input_is_refused_before_anything_is_written(tmp_path, plain):
    with pytest.raises(InputError, match="at least one result"):
        report([], tmp_path / "report.html")
    with pytest.raises(InputError, match="does not exist"):
        report([tmp_path / "no.nc"], tmp_path / "report.html")
    with pytest.raises(InputError, match="but int came"):
        report([3], tmp_path / "report.html")  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"the folder .* does not exist"):
        report(tmp_path / "no.nc", tmp_path / "no" / "report.html")


def test_a_notebook_gets_the_same_page_in_a_frame(hostile):
    frame = report(hostile)._repr_html_()
    read = Reader(frame)
    assert [tag for tag, _ in read.tags] == ["iframe"]
    assert read.tags[0][1]["srcdoc"] == page(hostile)
    assert "allow-same-origin" not in read.tags[0][1]["sandbox"]
    assert html.unescape(frame.split('srcdoc="')[1].split('"')[0]) == page(hostile)


# ---- in a browser


@contextmanager
def browser(**options):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM)
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        context.set_default_timeout(60_000)
        tab, heard = context.new_page(), []
        tab.on("console", lambda message: heard.append(message.text))
        tab.on("pageerror", lambda error: heard.append(str(error)))
        tab.on("dialog", lambda dialog: (heard.append("dialog"), dialog.dismiss()))
        tab.on("request", lambda request: None if own(request.url) else heard.append(request.url[:200]))
        tab.route("**/*", lambda route: route.continue_() if own(route.request.url) else route.abort())
        yield tab, heard
        chromium.close()


def own(url):
    return url.startswith(("file:", "data:", "blob:", "about:"))


def opened(tab, path):
    tab.goto(f"file://{path}")
    tab.wait_for_selector("html[data-drawn]")
    return tab


DRAWN = """() => [...document.querySelectorAll('.chart')].map(chart => ({
    id: chart.dataset.chart, size: chart.querySelector('.main-svg').getBoundingClientRect().width,
    panels: chart.querySelectorAll('.cartesianlayer > .subplot').length,
    marks: chart.querySelectorAll('.scatterlayer .trace, .heatmaplayer image').length,
    saves: chart.querySelectorAll('.modebar-btn[data-title$=SVG], .modebar-btn[data-title$=PNG]').length,
}))"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 420])
def test_every_chart_is_drawn_without_an_error_or_a_request(tmp_path, plain, width):
    with browser(viewport={"width": width, "height": 900}) as (tab, heard):
        opened(tab, report(plain, tmp_path / "report.html"))
        drawn = tab.evaluate(DRAWN)
        assert [one["id"] for one in drawn] == CHARTS
        for one in drawn:
            assert one["panels"] == 3
            assert one["marks"] >= 3
            assert one["saves"] == 2
            assert 0.7 * width < one["size"] <= width
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for view, title in (("share per lag", "share per lag"), ("added up", "share up to this lag")):
            tab.get_by_label(view).check()
            tab.locator("#lags .ytitle", has_text=title).first.wait_for()
        assert heard == []


@pytest.mark.slow
def test_hostile_names_show_as_text_in_the_browser(tmp_path, hostile, plain):
    with browser() as (tab, heard):
        opened(tab, report([hostile, plain], tmp_path / "report.html"))
        shown = HOSTILE.replace("\u2028", " ").strip()
        assert tab.locator("h1").inner_text().startswith(shown)
        legend = tab.locator("#layers .legendtext").first.text_content()
        assert legend is not None
        assert shown.startswith(legend.removesuffix("…"))
        assert len(legend) == 40
        titles = tab.locator("#map .annotation-text").all_text_contents()
        assert any(title.startswith("query · " + HOSTILE[:20]) for title in titles)
        assert tab.evaluate("document.querySelectorAll('img, .chart a[href]').length") == 0
        assert heard == []


@pytest.mark.slow
def test_several_results_stand_side_by_side(tmp_path, plain):
    uneven = sample(layers=2, heads=2, context=32, missing_heads=1, with_weights=False, model="other")
    with browser() as (tab, heard):
        opened(tab, report([plain, uneven], tmp_path / "report.html"))
        panels = {one["id"]: one["panels"] for one in tab.evaluate(DRAWN)}
        assert panels == {"map": 6, "lags": 3, "layers": 3, "positions": 6, "first": 3, "weights": 3, "agreement": 3}
        left, right = (tab.locator("article").nth(index).bounding_box() for index in (0, 1))
        assert left["y"] == right["y"]
        assert left["x"] + left["width"] <= right["x"]
        assert heard == []


@pytest.mark.slow
def test_a_chart_can_be_saved_as_a_picture(tmp_path, plain):
    with browser() as (tab, heard):
        opened(tab, report(plain, tmp_path / "report.html"))
        for kind, start in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
            with tab.expect_download() as download:
                tab.locator(f'#lags .modebar-btn[data-title="Save as {kind}"]').click()
            path = tmp_path / kind
            download.value.save_as(path)
            assert path.read_bytes().startswith(start)
            assert download.value.suggested_filename == f"posterity-lags.{kind.lower()}"
        assert heard == []


@pytest.mark.slow
def test_the_page_in_a_notebooks_frame_works(tmp_path, hostile):
    outer = tmp_path / "notebook.html"
    outer.write_text("<!doctype html><meta charset=utf-8>" + report(hostile)._repr_html_(), encoding="utf-8")
    with browser(color_scheme="dark") as (tab, heard):
        tab.goto(f"file://{outer}")
        frame = tab.frame_locator("iframe")
        frame.locator("html[data-drawn]").wait_for(state="attached")
        assert frame.locator(".chart .main-svg").count() >= len(CHARTS)
        assert frame.locator("h1").inner_text().startswith(HOSTILE[:20])
        with tab.expect_download() as download:
            frame.locator('#map .modebar-btn[data-title="Save as PNG"]').click()
        assert download.value.suggested_filename == "posterity-map.png"
        assert heard == []


@pytest.mark.slow
def test_numbers_that_are_not_known_leave_the_charts_standing(tmp_path, plain):
    one = sample(layers=1, heads=1, context=1, documents=1, lags="all", with_weights=False)
    broken = plain.copy(deep=True)
    broken["credit_by_document"][:] = np.nan
    broken["profile_by_document"][:] = np.nan
    with browser() as (tab, heard):
        for result in (one, broken, sample(lags="self", missing_heads=1)):
            opened(tab, report(result, tmp_path / "report.html"))
            assert all(drawn["size"] > 800 for drawn in tab.evaluate(DRAWN))
        assert heard == []


@pytest.mark.slow
def test_every_control_can_be_reached_by_key(tmp_path, plain):
    with browser() as (tab, _):
        opened(tab, report(plain, tmp_path / "report.html"))
        reached = set()
        for _ in range(60):
            tab.keyboard.press("Tab")
            focus = "(({dataset, name, localName}) => dataset.title || name || localName)(document.activeElement)"
            reached.add(tab.evaluate(focus))
        assert {"a", "summary", "view", "Save as SVG", "Save as PNG"} <= reached
