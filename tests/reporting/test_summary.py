"""Laws of the summary of a result: true, narrow, and honest about what is not known."""

import io
import re

import numpy as np
import pytest
from rich.console import Console
from support.sample import sample

from posterity.axes import SIDES, STREAMS
from posterity.errors import InputError
from posterity.reporting.result_table import rank_heads, summary_rows
from posterity.reporting.result_words import verdict_sentence
from posterity.reporting.summary import summary
from posterity.results import stats
from posterity.results.formatting import percent


def printed(result, width=80) -> str:
    file = io.StringIO()
    summary(result, Console(file=file, width=width, highlight=False))
    return file.getvalue()


def test_the_summary_fits_eighty_columns(plain):
    text = printed(plain)
    assert all(len(line) <= 80 for line in text.splitlines())
    for row in summary_rows(plain):
        line = next(line for line in text.splitlines() if row.label in line)
        assert not line.rstrip().endswith("…")
        assert all(cell in text for cell in row.cells)


def test_the_summary_shows_the_numbers_of_the_result(plain):
    cells = {row.label.strip(): row.cells for row in summary_rows(plain) if "counting" not in row.label}
    shares = stats.shares(plain)
    for index, stream in enumerate(STREAMS):
        for side in SIDES:
            share = shares.sel(stream=stream, side=side)
            assert cells[f"{side} share"][index] == f"{100 * share.share:.1f} ± {100 * share.error:.1f} %"
        by_head = stats.shares(plain, ("layer", "head")).share.sel(stream=stream, side="self")
        strong = by_head.where(~stats.weak_heads(plain).sel(stream=stream)).stack(place=("layer", "head"))
        layer, head = strong.idxmax("place").item()
        assert cells["largest, head"][index].startswith(f"L{layer} H{head} ")


def test_the_sentence_follows_the_numbers(plain):
    assert "keys and values mostly for later readers" in verdict_sentence(plain)
    own = plain.copy(deep=True)
    own["credit_by_document"].loc[{"side": "self", "stream": "key"}] *= 100
    assert "keys mostly for their own position and its values mostly for later readers" in verdict_sentence(own)
    even = plain.copy(deep=True)
    wobble = np.array([0.1, -0.1, 0.1, -0.1, 0.05])[:, None, None, None, None] * np.array([1, -1])
    even["credit_by_document"] = plain.credit_by_document * 0 + 1 + wobble
    assert "keys and values about equally" in verdict_sentence(even)


def test_the_summary_says_what_is_not_known(plain):
    broken = plain.copy(deep=True)
    broken["credit_by_document"][0, 0, 0, 1, 0, 0] = np.nan
    broken["loss"][2] = np.nan
    text = printed(broken, 100)
    assert "–" in text
    assert "nan" not in text
    assert "known for 4 of 5 windows" in text
    assert "its values mostly" in text
    assert "of the keys" not in verdict_sentence(broken)
    broken["credit_by_document"][:] = np.nan
    assert "cannot be said" in verdict_sentence(broken)
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
    ranked = {(head.layer, head.head) for head in rank_heads(faint, "key")}
    assert (2, 1) not in ranked
    assert {(head.layer, head.head) for head in rank_heads(plain, "key")} - ranked == {(2, 1)}
    shares = [head.share for head in rank_heads(plain, "key")]
    assert shares == sorted(shares)


def test_percentages_show_small_numbers_and_their_errors():
    assert percent(0.12345, 0.00612) == "12.3 ± 0.6 %"
    assert percent(0.12345, 0.00012) == "12.35 ± 0.01 %"
    assert percent(0.0012) == "0.12 %"
    assert percent(float("nan"), 0.1) == "–"
