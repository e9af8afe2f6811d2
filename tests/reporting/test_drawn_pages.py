"""Laws of the page of results in a browser: everything is drawn, nothing fails, and names show as text."""

import time

import numpy as np
import pytest
from support.page_results import CHARTS, HOSTILE, LOSS_CHARTS, PARAMETERS
from support.pages import DRAWN, browser, data, opened, page, tables
from support.sample import sample
from support.sample_kinds import sample_comparison

from posterity.reporting.key_numbers import key_numbers
from posterity.reporting.report import report
from posterity.reporting.result_table import rank_heads, summary_rows
from posterity.reporting.result_words import edges_words, verdict_sentence


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 420])
def test_every_chart_is_drawn_without_an_error_or_a_request(tmp_path, plain, width):
    with browser(viewport={"width": width, "height": 900}) as (tab, heard):
        opened(tab, report(plain, tmp_path / "report.html"))
        drawn = tab.evaluate(DRAWN)
        assert [chart["id"] for chart in drawn] == CHARTS
        for chart in drawn:
            assert chart["panels"] == {"head": 1, "first": 2}.get(chart["id"], 3)
            assert chart["marks"] >= chart["panels"]
            assert chart["saves"] == 2
            assert 0.7 * width < chart["size"] <= width
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for view, title in (("share per lag", "share per lag"), ("share per doubling", "share per doubling")):
            tab.get_by_label(view).check()
            tab.locator("#lags .ytitle", has_text=title).first.wait_for()
        assert heard == []


@pytest.mark.slow
def test_hostile_names_show_as_text_in_the_browser(tmp_path, hostile, plain):
    with browser() as (tab, heard):
        opened(tab, report([hostile, plain], tmp_path / "report.html"))
        name = HOSTILE.replace("\u2028", " ").strip()
        assert tab.locator("h1").inner_text().startswith(name)
        legend = tab.locator("#layers .legendtext").first.text_content()
        assert legend is not None
        assert name.startswith(legend.removesuffix("…"))
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
        panels = {chart["id"]: chart["panels"] for chart in tab.evaluate(DRAWN)}
        assert panels == {
            "reach": 3,
            "lags": 3,
            "map": 6,
            "head": 1,
            "layers": 3,
            "positions": 6,
            "first": 2,
            "weights": 3,
            "agreement": 3,
        }
        left, right = (tab.locator("article").nth(index).bounding_box() for index in (0, 1))
        assert left["y"] == right["y"]
        assert left["x"] + left["width"] <= right["x"]
        assert heard == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_who_pays_is_drawn_without_an_error_or_a_request(tmp_path, paid, width):
    with browser(viewport={"width": width, "height": 900}, color_scheme="dark") as (tab, heard):
        opened(tab, report(paid, tmp_path / "report.html"))
        drawn = {entry["id"]: entry for entry in tab.evaluate(DRAWN)}
        assert set(drawn) == {*CHARTS, *LOSS_CHARTS}
        panels = {"loss_parts": 2, "inputs": 2, "loss_positions": 2, "modules": 2, "horizons": 3, "head_horizons": 3}
        assert {chart: drawn[chart]["panels"] for chart in LOSS_CHARTS} == panels
        assert drawn["loss_parts"]["marks"] == 6
        assert drawn["horizons"]["marks"] >= 3 * (4 + 1)
        assert all(drawn[chart]["saves"] == 2 and 0.7 * width < drawn[chart]["size"] <= width for chart in LOSS_CHARTS)
        beyond = tab.locator(
            "#head_horizons .heatmap-label text, #head_horizons text.heatmap-label"
        ).all_text_contents()
        signs = [trace.get("text", []) for trace in data(page(paid))["figures"]["head_horizons"]["data"]]
        assert len(beyond) == sum(row.count("&gt;") for rows in signs for row in rows) > 0
        assert set(beyond) == {">"}
        for entry in tab.locator("details").all():
            entry.evaluate("details => details.open = true")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert heard == []


@pytest.mark.slow
def test_a_part_that_points_against_the_sum_hangs_below_zero(tmp_path, paid):
    against = paid.copy(deep=True)
    credit = against.loss_credit_by_document
    credit.loc[{"layer": 1, "written": "key", "part": "own"}] = -0.5 * credit.sel(layer=1, written="key", part="future")
    with browser() as (tab, heard):
        opened(tab, report(against, tmp_path / "report.html"))
        boxes = [
            tab.locator("#loss_parts .subplot.xy .barlayer .trace").nth(part).locator("path").all() for part in range(3)
        ]
        own, later, future = ([path.bounding_box() for path in paths] for paths in boxes)
        zero = own[0]["y"] + own[0]["height"]
        assert own[1]["y"] == pytest.approx(zero, abs=1.5)
        assert later[1]["y"] + later[1]["height"] == pytest.approx(zero, abs=1.5)
        assert future[1]["y"] < future[0]["y"] - 20
        above, below = zero - future[1]["y"], own[1]["y"] + own[1]["height"] - zero
        assert above - below == pytest.approx(zero - future[0]["y"], abs=3)
        assert heard == []


@pytest.mark.slow
def test_results_with_and_without_who_pays_stand_side_by_side(tmp_path, plain, paid):
    other = sample(layers=2, heads=2, losses=True, horizons=(3, 9), parameters=["model.layers.1.b"], model="other")
    horizons = sample(horizons=(4,), model="some")
    with browser() as (tab, heard):
        opened(tab, report([plain, paid, other, horizons], tmp_path / "report.html"))
        panels = {chart["id"]: chart["panels"] for chart in tab.evaluate(DRAWN)}
        expected = {"loss_parts": 4, "inputs": 2, "loss_positions": 4, "modules": 3, "horizons": 3, "head_horizons": 9}
        assert {chart: panels[chart] for chart in LOSS_CHARTS} == expected
        assert heard == []


@pytest.mark.slow
def test_results_whose_names_begin_alike_have_lines_of_their_own(tmp_path, plain):
    long = "the same and very long name of a model, in all of its first forty letters, "
    with browser() as (tab, heard):
        first, second = sample(model=long + "one", losses=True), sample(model=long + "two", losses=True)
        opened(tab, report([first, plain, second], tmp_path / "report.html"))
        for chart in ("layers", "inputs"):
            names = tab.locator(f"#{chart} .legendtext").all_text_contents()
            assert [name[:6] for name in names if "very long" in name] == ["1: the", "3: the"]
        assert heard == []


@pytest.mark.slow
def test_hostile_names_of_modules_show_as_text_in_the_browser(tmp_path):
    names = [f"{HOSTILE.replace('.', '')}.0.{HOSTILE}", HOSTILE, f"model.layers.1.<i>{'long' * 20}</i>"]
    hostile = sample(losses=True, parameters=names, horizons=(1, 2), modules=[HOSTILE] * 4)
    name = HOSTILE.replace("\u2028", " ")
    assert name in [row[0] for row in tables(page(hostile))["Parameters of modules in no layer"]]
    with browser() as (tab, heard):
        opened(tab, report(hostile, tmp_path / "report.html"))
        titles = tab.locator("#modules .annotation-text").all_text_contents()
        assert len(titles) == 2
        assert any(title.startswith(HOSTILE[:20]) for title in titles)
        assert any(title.startswith("<i>longlong") and title.endswith("…") for title in titles)
        assert tab.evaluate("document.querySelectorAll('img, .chart a[href], .chart i, main script').length") == 0
        assert heard == []


@pytest.mark.slow
def test_a_chart_can_be_saved_as_a_picture_with_its_title_in_light_colours(tmp_path, plain):
    with browser(color_scheme="dark") as (tab, heard):
        opened(tab, report(plain, tmp_path / "report.html"))
        tab.get_by_label("share per doubling").check()
        for kind, start in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
            with tab.expect_download() as download:
                tab.locator("#lags .tools button", has_text=kind).click()
            path = tmp_path / kind
            download.value.save_as(path)
            assert path.read_bytes().startswith(start)
            assert download.value.suggested_filename == f"posterity-lags.{kind.lower()}"
        picture = (tmp_path / "SVG").read_text()
        assert "How far the credit reaches: share of the gradient by lag" in picture
        assert "share per doubling of lag + 1" in picture
        assert 'width="1100"' in picture
        assert "rgb(255, 255, 255)" in picture
        assert "rgb(26, 32, 39)" not in picture
        assert heard == []


@pytest.mark.slow
def test_a_page_of_five_thousand_heads_is_small_and_soon_drawn_and_has_no_sign_that_covers_others(tmp_path):
    result = sample(layers=80, heads=64, context=16, documents=3, losses=True, horizons=(1, 2, 4, 8))
    path = report(result, tmp_path / "report.html")
    assert path.stat().st_size < 4e6
    with browser() as (tab, heard):
        start = time.monotonic()
        opened(tab, path)
        assert time.monotonic() - start < 20
        for figure in ("map", "head_horizons"):
            assert tab.locator(f"#{figure} .heatmaplayer image").count() >= 3
            assert tab.locator(f"#{figure} .heatmap-label").count() == 0
        assert heard == []


@pytest.mark.slow
def test_the_switch_of_edges_changes_sentence_numbers_tables_and_rankings(tmp_path, paid):
    def shown(selector):
        return [text.replace("\u00a0", " ") for text in tab.locator(f"{selector}:visible").all_inner_texts()]

    with browser() as (tab, heard):
        opened(tab, report(paid, tmp_path / "report.html"))
        tab.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        for reader_of, label in (("all", "counted"), ("rest", "left out")):
            tab.get_by_label(label).check()
            rows = summary_rows(paid, reader_of)
            assert shown(".sentence") == [verdict_sentence(paid, reader_of)]
            assert shown(".whole td") == ["", *(cell for row in rows for cell in row.cells)]
            values = [number.value for number in key_numbers(paid, reader_of)]
            assert shown(".key .value") == values
            words = edges_words(paid, reader_of)
            for figure, tables_of_edges in (("layers", 1), ("loss_parts", 2), ("horizons", 3)):
                captions = shown(f"#{figure} caption")
                assert len(captions) == tables_of_edges
                assert all(words in caption for caption in captions)
            largest = rank_heads(paid, "query", reader_of)[-1]
            (rankings,) = shown("#heads .streams")
            assert f"\nlayer {largest.layer}, head {largest.head}\t" in rankings[:60]
        assert heard == []


@pytest.mark.slow
def test_tables_of_two_results_and_long_names_of_compared_runs_fit_a_telephone(tmp_path):
    results = [sample(losses=True, horizons=(1, 4), seed=seed, model="a/model") for seed in (0, 1)]
    results[1]["credit_by_document"].loc[{"layer": 2, "stream": "key", "side": "other"}] *= -0.1  # a † in the table
    compared = sample_comparison()
    compared["folder"] = ("run", [f"/home/someone/experiments/a-run-with-a-long-name-{run}" for run in range(4)])
    overflow = (
        "[...document.querySelectorAll('.summary')].map(table => table.scrollWidth - table.parentNode.clientWidth)"
    )
    with browser(viewport={"width": 390, "height": 900}) as (tab, heard):
        for source in (results, compared):
            opened(tab, report(source, tmp_path / "report.html"))
            tab.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390
            assert max(tab.evaluate(overflow)) <= 0
        assert heard == []


def await_value(tab, expression, value):
    """Ask again until the answer is right; the page's policy forbids what the browser's own waiting needs."""
    for _ in range(200):
        if tab.evaluate(expression) == value:
            return
        tab.wait_for_timeout(50)
    assert tab.evaluate(expression) == value


PAPER = "document.querySelector('#layers .main-svg').style.background"
LINES = """[...new Set([...document.querySelectorAll('#layers .scatterlayer .trace:last-child path.js-line')]
    .map(path => path.style.stroke))]"""
LIGHT, DARK = ("rgb(255, 255, 255)", "rgb(194, 90, 0)"), ("rgb(26, 32, 39)", "rgb(242, 165, 92)")


@pytest.mark.slow
def test_colours_follow_the_scheme_and_are_light_in_print(tmp_path, plain):
    with browser(color_scheme="dark") as (tab, heard):
        opened(tab, report(plain, tmp_path / "report.html"))
        for change, (paper, line) in (
            (lambda: None, DARK),
            (lambda: tab.emulate_media(color_scheme="light"), LIGHT),
            (lambda: tab.emulate_media(color_scheme="dark"), DARK),
            (lambda: tab.evaluate("dispatchEvent(new Event('beforeprint'))"), LIGHT),
            (lambda: tab.evaluate("dispatchEvent(new Event('afterprint'))"), DARK),
        ):
            change()
            await_value(tab, PAPER, paper)
            await_value(tab, LINES, [line])
        assert heard == []


@pytest.mark.slow
def test_a_page_is_drawn_in_other_columns_when_its_width_changes(tmp_path, plain):
    columns = """new Set([...document.querySelectorAll('#layers .annotation-text')]
        .map(title => Math.round(title.getBoundingClientRect().x))).size"""
    with browser() as (tab, heard):
        opened(tab, report(plain, tmp_path / "report.html"))
        assert tab.evaluate(columns) == 3
        for width, number in ((500, 1), (1200, 3)):
            tab.set_viewport_size({"width": width, "height": 900})
            await_value(tab, columns, number)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert heard == []


@pytest.mark.slow
def test_the_page_in_a_notebooks_frame_works(tmp_path, hostile):
    outer = tmp_path / "notebook.html"
    outer.write_text("<!doctype html><meta charset=utf-8>" + report(hostile)._repr_html_(), encoding="utf-8")
    with browser(color_scheme="dark") as (tab, heard):
        tab.goto(f"file://{outer}")
        frame = tab.frame_locator("iframe")
        frame.locator("html[data-drawn]").wait_for(state="attached")
        assert frame.locator(".chart .main-svg").count() >= 3
        assert frame.locator("h1").inner_text().startswith(HOSTILE[:20])
        with tab.expect_download() as download:
            frame.locator("#map .tools button", has_text="PNG").click()
        assert download.value.suggested_filename == "posterity-map.png"
        assert heard == []


@pytest.mark.slow
def test_numbers_that_are_not_known_leave_the_charts_standing(tmp_path):
    more = {"losses": True, "horizons": (1, 4), "parameters": PARAMETERS}
    smallest = sample(layers=1, heads=1, context=1, documents=1, lags="all", with_weights=False, **more)
    broken = sample(**more)
    for name in ("credit_by_document", "profile_by_document", "loss_credit_by_document", "horizon_by_document"):
        broken[name][:] = np.nan
    with browser() as (tab, heard):
        for result in (smallest, broken, sample(lags="self", missing_heads=1)):
            opened(tab, report(result, tmp_path / "report.html"))
            assert all(drawn["size"] > 800 for drawn in tab.evaluate(DRAWN))
        assert heard == []


@pytest.mark.slow
def test_every_control_can_be_reached_by_key(tmp_path, plain):
    with browser() as (tab, _):
        opened(tab, report(plain, tmp_path / "report.html"))
        reached = set()
        for _ in range(80):
            tab.keyboard.press("Tab")
            focus = "(({textContent, name, localName}) => name || (localName === 'button' ? textContent : localName))"
            focus += "(document.activeElement)"
            reached.add(tab.evaluate(focus))
        assert {"a", "summary", "view", "layer", "head", "SVG", "PNG"} <= reached
