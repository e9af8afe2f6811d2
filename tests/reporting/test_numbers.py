"""The table under every figure: its numbers, for the view that is shown, and a copy of them as text."""

import numpy as np
import pytest
from support.pages import browser, opened
from support.sample import sample

from posterity.reporting.report import report
from posterity.results import stats
from posterity.results.formatting import horizon_text, percent


def rows(tab, figure):
    """Return the rows of the tables of a figure as lists of text."""
    script = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    return tab.locator(f"#{figure} .numbers tr").evaluate_all(script)


@pytest.mark.slow
def test_every_figure_has_its_numbers_as_a_table_that_follows_the_choices_and_can_be_copied(tmp_path):
    result = sample(losses=True, horizons=(1, 4))
    result["credit_by_document"].loc[{"layer": 3, "head": 0}] *= 1e-3
    result["horizon_by_document"].loc[{"layer": 3, "head": 0}] *= 1e-3
    with browser(permissions=["clipboard-read", "clipboard-write"]) as (tab, heard):
        opened(tab, report(result, tmp_path / "report.html"))
        tab.evaluate("document.querySelectorAll('.numbers').forEach(part => part.open = true)")
        empty = (
            "[...document.querySelectorAll('.chart')].filter(c => !c.closest('figure').querySelector('.numbers td'))"
        )
        assert tab.evaluate(f"{empty}.length") == 0
        for reader_of, label in (("rest", "left out"), ("all", "counted")):
            tab.get_by_label(label).check()
            share = stats.profile(result, (), reader_of).share.sel(stream="query")
            head, first = rows(tab, "lags")[:2]
            assert head == ["lag (tokens)", "attention", "counting edges alone", "credit"]
            assert first[0] == "0"
            assert first[3].startswith(percent(float(share[0])).split()[0])
            shares = stats.shares(result, ("layer", "head"), reader_of).sel(
                side="self", stream="query", layer=2, head=1
            )
            words = percent(float(shares.share), float(shares.error), 5)
            assert next(row for row in rows(tab, "map") if row[0] == "2")[2].replace("\u00a0", " ") == words
            reach = stats.effective_horizon(result, ("layer", "head"), reader_of).sel(stream="query").values
            weak = stats.weak_heads(result, reader_of).sel(stream="query").values
            assert weak[3, 0]
            for layer, row in enumerate(rows(tab, "head_horizons")[1:5]):
                marks = np.where(weak[layer], " †", "")
                lengths = [horizon_text(float(length), 1, 4) for length in reach[layer]]
                assert row == [str(layer), *(f"{length}{mark}" for length, mark in zip(lengths, marks, strict=True))]
        tab.locator("#map .numbers > button").click()
        tab.locator("#map .numbers > button", has_text="Copied").wait_for()
        lines = tab.evaluate("navigator.clipboard.readText()").splitlines()
        assert lines[0] == "query († credit too small or too uncertain)"
        assert lines[1].split("\t") == ["layer", "head 0", "head 1", "head 2"]
        assert lines[4].split("\t")[2] == words
        assert heard == []
