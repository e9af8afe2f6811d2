"""Reports in a notebook: the first holds plotly's script, the others ask it; a cell that runs again holds its own."""

import sys
from types import SimpleNamespace

import pytest
from support.pages import browser
from support.sample import sample

from posterity.reporting import notebook
from posterity.reporting.html import packed_plotly
from posterity.reporting.report import report


@pytest.fixture
def run_cell(monkeypatch):
    """Return a function that begins a run of the cell with an id, as ipykernel tells of it; None for a nameless one."""
    shell = SimpleNamespace(execution_count=0, cell=None)
    shell.get_parent = lambda: {"metadata": {"cellId": shell.cell} if shell.cell else {}}
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(notebook, "_runs", {})

    def run(cell):
        shell.cell, shell.execution_count = cell, shell.execution_count + 1

    return run


def holds_script(page) -> bool:
    return packed_plotly() in page._repr_html_()


def test_the_first_report_of_a_notebook_holds_the_script_and_a_cell_that_runs_again_its_own(run_cell):
    page = report(sample())
    run_cell("a")
    assert [holds_script(page), holds_script(page)] == [True, False]
    run_cell("b")
    assert not holds_script(page)
    for cell in ("b", "a"):
        run_cell(cell)
        assert holds_script(page)


def test_without_names_of_cells_every_report_holds_the_script(run_cell):
    page = report(sample())
    for _ in range(2):
        run_cell(None)
        assert holds_script(page)


@pytest.mark.slow
def test_a_report_without_the_script_draws_with_that_of_another_and_else_says_what_to_do(tmp_path, run_cell):
    page = report(sample(with_weights=False))
    run_cell("a")
    first = page._repr_html_()
    run_cell("b")
    second = page._repr_html_()
    assert len(second) < len(first) / 2
    outer = tmp_path / "notebook.html"
    outer.write_text(f"<!doctype html><meta charset=utf-8>{second}<div>{first}</div>", encoding="utf-8")
    with browser() as (tab, heard):
        tab.goto(f"file://{outer}")
        for number in range(2):
            frame = tab.frame_locator("iframe").nth(number)
            frame.locator("html[data-drawn]").wait_for(state="attached")
            assert frame.locator("#lags .main-svg").count() > 0
            assert not frame.locator("#waiting").is_visible()
        outer.write_text(f"<!doctype html><meta charset=utf-8>{second}", encoding="utf-8")
        tab.goto(f"file://{outer}")
        tab.frame_locator("iframe").get_by_text("run this cell again").wait_for()
        assert heard == []
