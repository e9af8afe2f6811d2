"""All ten rows together: on a tiny model beside random weights, through file, table and page; and the real model."""

import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from support.pages import DRAWN, browser, opened
from support.tiny import tiny, tokens

import posterity
from posterity.clauses.all_clauses import CLAUSES
from posterity.clauses.drawing import Chart, View, bars, measured_line
from posterity.palette import DARK
from posterity.reporting.audit_page import draw_picture
from posterity.reporting.audit_table import figure_rows, reading_note
from posterity.results.audit_schema import AUDIT, SHARE
from posterity.results.formatting import percent, value_with_error

SMALL = {"context": 16, "limit": 2, "contexts": (4, 8, 16), "span": 32, "short": 8, "pass_tokens": 16, "prefix": 8}
SMALL |= {"positions": 2, "prefixes": 2, "future": 4, "draws": 3}


@pytest.fixture(scope="module")
def audited():
    return posterity.audit(tiny("llama"), None, tokens(6, 32), control="random", progress=False, **SMALL)


def test_every_clause_is_there_once_and_in_order(audited):
    assert [clause.number for clause in CLAUSES] == list(range(1, 11))
    assert audited.clause.values.tolist() == list(range(1, 11))
    assert set(audited.of_clause.values.tolist()) == set(range(1, 11))
    assert audited.figure.sel(model="LlamaForCausalLM").notnull().sum() > 40


def test_a_row_alone_finds_what_it_finds_among_all(audited):
    for number in (6, 7, 9, 10):
        alone = posterity.audit(tiny("llama"), None, tokens(6, 32), rows=[number], progress=False, **SMALL)
        both = audited.sel(model="LlamaForCausalLM", measure=alone.measure)
        np.testing.assert_allclose(alone.figure[0], both.figure, rtol=1e-9, atol=1e-12)


def test_all_rows_survive_file_and_table(tmp_path, audited):
    posterity.save(audited, tmp_path / "audit.nc")
    loaded = posterity.load(tmp_path / "audit.nc")
    assert loaded.equals(audited)
    console = Console(record=True, width=80)
    posterity.summary(loaded, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"{clause.number} · {clause.name}" in text for clause in CLAUSES)


def test_a_figure_prints_the_interval_of_its_few_windows(audited):
    models = audited.sizes["model"]
    for windows in (2, 4, 8):
        audit = audited.assign(windows=audited.windows.where(audited.windows == 0, windows))
        for index, measure in enumerate(audit.measure.values):
            row = next(row for row in figure_rows(audit, int(audit.of_clause[index])) if row.name == measure)
            for model in range(models):
                value, error = (float(audit[name][model, index]) for name in ("figure", "error"))
                counted = int(audit.windows[model, index]) or 8
                formatted = percent if str(audit.units_of.values[index]) == SHARE else value_with_error
                assert row.values[model] == formatted(value, error, windows=counted)
                assert counted != 2 or "±" not in row.values[model]
    assert "Student's t" in reading_note(audited)


def test_every_error_of_a_figure_says_over_how_many_windows_it_is_taken(audited):
    exact = audited.measure.str.startswith("z of")
    known = (audited.error > 0) & ~exact
    assert (audited.windows.where(known, 2) >= 2).all()
    assert known.sum() > 40
    assert (audited.windows.where(exact, 0) == 0).all()


def test_an_audit_of_before_prints_standard_errors(audited):
    old = audited.drop_vars("windows")
    assert AUDIT.check(old) is old
    cells = [row.values[0] for number in old.clause.values for row in figure_rows(old, number)]
    pairs = zip(old.figure.values[0].tolist(), old.error.values[0].tolist(), strict=True)
    formats = [percent if units == SHARE else value_with_error for units in old.units_of.values]
    assert sorted(cells) == sorted(style(*pair) for style, pair in zip(formats, pairs, strict=True))
    assert "the margin of error two: an older audit" in reading_note(old)


def test_names_in_a_picture_are_shown_as_they_are():
    line, bar = measured_line("<b>a</b>", [0, 1], [1, 2]), bars(["<i>c</i>"], [1])
    grid = draw_picture(Chart("<u>t</u>", "", [line, measured_line("&amp;", [0], [1]), bar], "<s>x</s>"), "<u>t</u>")
    drawn, layout = grid.traces, grid.layout(1100, titled=True)
    assert [trace.get("name") for trace in drawn] == ["&lt;b&gt;a&lt;/b&gt;", "&amp;amp;", None]
    assert drawn[2]["x"] == ["&lt;i&gt;c&lt;/i&gt;"]
    assert layout["title"]["text"] == "&lt;u&gt;t&lt;/u&gt;"
    assert layout["xaxis"]["title"]["text"] == "&lt;s&gt;x&lt;/s&gt;"
    assert layout["xaxis"]["unifiedhovertitle"]["text"] == "&lt;s&gt;x&lt;/s&gt; %{x}"


def test_a_clause_speaks_the_colours_of_the_page(audited):
    grids = [draw_picture(chart, "") for clause in CLAUSES for chart in clause.draw(View(audited, "LlamaForCausalLM"))]
    axes = [grid.layout(500)["coloraxis"] for grid in grids if grid.colours]
    assert len(axes) >= 6
    assert {colour for axis in axes for _, colour in axis["colorscale"]} <= set(DARK)
    for grid in grids:
        grid.figure()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 420])
def test_every_picture_of_the_audit_is_drawn_without_an_error_or_a_request(tmp_path, audited, width):
    with browser(viewport={"width": width, "height": 900}) as (tab, heard):
        opened(tab, posterity.report(audited, tmp_path / "audit.html"))
        drawn = tab.evaluate(DRAWN)
        assert len(drawn) == tab.evaluate("document.querySelectorAll('figure').length") > 40
        assert all(chart["marks"] > 0 and chart["saves"] == 2 and 0 < chart["size"] <= width for chart in drawn)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert heard == []


@pytest.mark.slow
def test_the_laws_hold_on_the_default_model(tmp_path):
    command = [sys.executable, "-m", "posterity", "audit", "--quick", "--rows", "1,4,7", "-o", str(tmp_path / "a.nc")]
    done = subprocess.run([*command, "-r", str(tmp_path / "a.html")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 · The count and the weights" in done.stdout
    audit = posterity.load(tmp_path / "a.nc")
    figure = dict(zip(audit.measure.values.tolist(), audit.figure.values[0].tolist(), strict=True))
    assert figure["later terms for one own"] == 127.5
    assert figure["error of the identity"] < 1e-4
    assert 0 < figure["self share of W_K, one window"] < 0.5
    assert "<html" in (tmp_path / "a.html").read_text()[:200].lower()
