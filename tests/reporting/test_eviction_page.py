"""An eviction as a table and as a page: every number is that of the Dataset, and names are escaped."""

import io

import numpy as np
import pytest
from rich.console import Console
from support.sample_kinds import sample_eviction

import posterity
from posterity.errors import InputError
from posterity.results.formatting import value_with_error


def printed(eviction, width):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    posterity.summary(eviction, console)
    return console.file.getvalue()


def test_the_table_has_every_divergence():
    eviction = sample_eviction(documents=9)
    wide, narrow = printed(eviction, 80), printed(eviction, 70)
    assert "tiny/sample: 9 prompts of 32 tokens, 16 predicted behind each, task copy" in wide
    for budget in eviction.budget.values:
        for scorer in eviction.scorer.values:
            for share in eviction.kept.values:
                values = eviction.divergence.sel(budget=budget, scorer=scorer, kept=share).values
                text = value_with_error(values.mean(), values.std(ddof=1) / 3, windows=9)
                assert text in wide
                assert f" {text.split(' ')[0]} " in narrow
    assert "one standard error over 9 windows" in " ".join(wide.split())
    assert "A wider terminal" in " ".join(narrow.split())
    assert max(map(len, narrow.splitlines())) <= 70


def test_the_page_has_the_table_and_a_chart_and_escapes_names(tmp_path):
    eviction = sample_eviction()
    eviction["scorer"] = ["<script>alert(1)</script>", "predicted price"]
    page = posterity.report(eviction, tmp_path / "page.html").read_text()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "The same share in every head" in page
    assert 'data-chart="divergence"' in page
    posterity.save(eviction, tmp_path / "e.nc")
    again = posterity.report(tmp_path / "e.nc", tmp_path / "again.html").read_text()
    assert again == page


def test_one_window_has_no_error():
    page = posterity.report(sample_eviction(documents=1)).html
    assert " ± " not in page.split("<main", 1)[-1].split("Where this comes from")[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.drop_vars("loss"), "it has no 'loss'"),
        (lambda x: x.assign_coords(kept=[0.25, 0.5]), "its shares do not fall"),
        (lambda x: x.assign_coords(budget=["fair", "equal"]), "its budgets are none of"),
        (lambda x: x.isel(document=slice(0)), "it holds nothing"),
        (lambda x: x.assign(divergence=x.divergence * np.inf), "it holds an infinite number"),
        (lambda x: x.drop_attrs().assign_attrs(kind="eviction"), "it does not say its"),
    ],
)
def test_what_is_no_eviction_is_refused(change, message):
    for function in (posterity.summary, lambda x: posterity.table(x, "eviction"), posterity.report):
        with pytest.raises(InputError, match=message):
            function(change(sample_eviction()))
