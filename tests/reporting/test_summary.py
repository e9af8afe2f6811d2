"""Laws of the summary of a result: true, narrow, and honest about what is not known."""

import io
import re
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console
from support.sample import sample

from posterity.axes import SIDES, STREAMS, WRITTEN
from posterity.errors import InputError
from posterity.reporting.result_table import LOSS_PARTS, rank_heads, summary_rows
from posterity.reporting.result_words import reading_notes, verdict_sentence
from posterity.reporting.summary import summary
from posterity.results import stats
from posterity.results.formatting import fixed_with_error, number_text, percent, value_with_error


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
    shares = stats.shares(plain, reader_of="rest")
    for index, stream in enumerate(STREAMS):
        for side in SIDES:
            share = shares.sel(stream=stream, side=side)
            width = stats.confidence(share.error, 5)
            assert cells[f"{side} share"][index] == f"{100 * share.share:.1f} ± {100 * width:.1f} %"
        by_head = stats.shares(plain, ("layer", "head"), "rest").share.sel(stream=stream, side="self")
        strong = by_head.where(~stats.weak_heads(plain, "rest").sel(stream=stream)).stack(place=("layer", "head"))
        layer, head = strong.idxmax("place").item()
        assert cells["largest, head"][index] == f"L{layer} H{head}"


@pytest.mark.parametrize("reader_of", ["rest", "all"])
def test_the_extremes_have_their_errors(plain, reader_of):
    rows = summary_rows(plain, reader_of)
    extremes = {
        row.label: (row.cells, share.cells)
        for row, share in pairwise(rows)
        if row.label.endswith((", layer", ", head"))
    }
    assert len(extremes) == 4
    for by, what in ((("layer",), "layer"), (("layer", "head"), "head")):
        shares = stats.shares(plain, by, reader_of).sel(side="self")
        if what == "head":
            shares = shares.where(~stats.weak_heads(plain, reader_of))
        for index, stream in enumerate(STREAMS):
            share = shares.sel(stream=stream).stack(place=by)
            for end, place in (("largest", share.share.argmax("place")), ("smallest", share.share.argmin("place"))):
                extreme = share.isel(place=int(place))
                names, numbers = extremes[f"{end}, {what}"]
                assert names[index] == " ".join(f"{dim[0].upper()}{int(extreme[dim])}" for dim in by)
                assert numbers[index] == percent(float(extreme.share), float(extreme.error), 5)


def test_queries_have_no_number_where_others_pay():
    result = sample(losses=True, horizons=(1, 4, 16))
    rows = [row for row in summary_rows(result) if row.part.startswith("Who pays")]
    assert [row.label for row in rows] == [*LOSS_PARTS.values(), "effective horizon"]
    assert all(row.cells[0] == "" and "" not in row.cells[1:] for row in rows)


def test_sentence_and_table_of_all_edges_say_so_and_hold_their_numbers(plain):
    sentence = verdict_sentence(plain, "all")
    share = stats.shares(plain).sel(side="other", stream="key")
    assert sentence.startswith("Over all edges, the credit of the keys and values of tiny/sample arrives ")
    assert f"{percent(float(share.share), float(share.error), 5)} (keys)" in sentence
    assert sentence != verdict_sentence(plain) == verdict_sentence(plain, "rest")
    assert {row.part for row in summary_rows(plain, "all")} == {
        "Credit of the gradient, all edges", "Sinks: part of all credit", "Extremes of the self share, all edges",
        "Gradient of the weights, all edges",
    }  # fmt: skip
    single = plain.assign_attrs(sinks=1)
    assert verdict_sentence(single).startswith("Beyond the first position, the credit")
    assert not any("all edges" in row.part for row in summary_rows(plain.assign_attrs(sinks=0), "all"))


def test_the_sentence_follows_the_numbers(plain):
    both = "Beyond the first 4 positions, the credit of the keys and values of tiny/sample arrives"
    assert f"{both} mostly over edges from later queries" in verdict_sentence(plain)
    own = plain.copy(deep=True)
    own["credit_by_document"].loc[{"side": "self", "stream": "key"}] *= 100
    parts = ("keys of tiny/sample arrives mostly over the self edge", "that of the values mostly over edges from later")
    assert f"the credit of the {', '.join(parts)}" in verdict_sentence(own)
    even = plain.copy(deep=True)
    wobble = np.array([0.1, -0.1, 0.1, -0.1, 0.05])[:, None, None, None, None, None] * np.array([1, -1])
    even["credit_by_document"] = plain.credit_by_document * 0 + 1 + wobble
    assert f"{both} about equally over the self edge and over edges" in verdict_sentence(even)


def test_a_sentence_on_losses_speaks_of_losses_and_one_on_edges_never_says_for(plain):
    """A self edge carries later losses too: without a split by losses nothing is said of whom a key is written for."""
    assert not re.search(r"\bfor\b|own position|loss", verdict_sentence(plain))
    split = sample(losses=True, documents=8)
    split["loss_credit_by_document"].loc[{"part": "own"}] *= 0.01
    split["credit_by_document"].loc[{"side": "self"}] *= 100  # most over the self edge, nearly all by later losses
    shares = stats.loss_shares(split, reader_of="rest").sel(part="own")
    numbers = " and ".join(
        percent(1 - float(shares.share.sel(written=stream)), float(shares.error.sel(written=stream))) + f" ({stream}s)"
        for stream in WRITTEN
    )
    losses, edges = verdict_sentence(split).split(". ", 1)
    assert losses == (
        "Beyond the first 4 positions, the credit of the keys and values of tiny/sample is paid mostly by later "
        f"losses: {numbers}, the rest by the own loss"
    )
    assert edges.startswith("The credit of the keys and values arrives mostly over the self edge: ")
    split["loss_credit_by_document"].loc[{"part": "own"}] *= 1e5
    assert "is paid mostly by the own loss" in verdict_sentence(split)


def test_a_sentence_decides_where_the_interval_of_few_windows_leaves_one_half(plain):
    even = plain.isel(document=slice(3)).copy(deep=True)
    wobble = np.array([0.1, -0.1, 0.0])[:, None, None, None, None, None] * np.array([-1, 1])
    even["credit_by_document"] = even.credit_by_document * 0 + 1 + wobble + np.array([-0.15, 0.15])
    share = stats.shares(even, reader_of="rest").sel(side="other", stream="key")
    assert 2 * share.error < share.share - 0.5 < stats.confidence(share.error, 3)
    assert "about equally" in verdict_sentence(even)


def test_the_summary_says_what_is_not_known(plain):
    broken = plain.copy(deep=True)
    broken["credit_by_document"][0, 0, 0, 1] = np.nan
    broken["loss"][2] = np.nan
    text = printed(broken, 100)
    assert "–" in text
    assert "nan" not in text
    assert "known for 4 of 5 windows" in text
    assert "the credit of the values of tiny/sample arrives mostly" in text
    assert "keys" not in verdict_sentence(broken)
    broken["credit_by_document"][:] = np.nan
    assert "cannot be said" in verdict_sentence(broken)
    assert "nan" not in printed(broken)


def test_the_summary_of_one_window_without_lags_or_weights_has_no_made_up_numbers():
    text = printed(sample(documents=1, lags="self", with_weights=False))
    assert "±" not in text
    assert "there are no errors" in text
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


def test_results_by_name_are_printed_one_after_the_other(plain):
    text = printed({"before": plain, "after": plain})
    before, after = text.split("after ──")
    assert before.startswith("before ──")
    assert before.split("\n", 1)[1] == printed(plain) == after.split("\n", 1)[1]


def test_a_summary_of_something_else_is_refused():
    with pytest.raises(InputError, match="but str came"):
        summary("run.nc")  # pyright: ignore[reportArgumentType]


def test_few_windows_print_the_interval_and_two_print_no_error():
    for windows, words in {
        2: "2 windows: no error worth printing.",
        4: "± is half the 95 % interval (Student's t) over 4 windows",
        8: "± is one standard error over 8 windows.",
    }.items():
        result = sample(documents=windows)
        assert words in " ".join(printed(result).split())
        share = stats.shares(result, reader_of="rest").sel(side="self", stream="key")
        width = float(share.error) * {4: 3.182446, 8: 1.0}.get(windows, np.nan)
        expected = percent(float(share.share)) if windows == 2 else f"{100 * share.share:.1f} ± {100 * width:.1f} %"
        assert next(row for row in summary_rows(result) if row.label == "self share").cells[1] == expected


def test_windows_with_more_than_ten_times_the_median_gradient_are_named(plain):
    equal = plain.copy(deep=True)
    equal["credit_by_document"][:] = equal.credit_by_document[0].values
    assert "median window" not in printed(equal)
    heavy = equal.copy(deep=True)
    heavy["credit_by_document"][1] *= 9.99
    assert not stats.heavy_windows(heavy).any()
    heavy["credit_by_document"][3, :, :, 2] *= 10.01
    assert stats.heavy_windows(heavy).values.tolist() == [False, False, False, True, False]
    norms = stats.window_norms(heavy).sel(stream="value")
    times = float(norms[3] / norms.median())
    text = " ".join(printed(heavy).split())
    assert (
        f"Warning: the median window's gradient (squared norm) is exceeded {times:.0f} times by window 3 (text 1)"
        in text
    )
    assert "window 1" not in text


def test_table_and_sentence_lead_without_the_first_positions_and_give_their_part_in_a_row(plain):
    sunk = plain.copy(deep=True)
    sunk["credit_by_document"].loc[{"reader_of": "first", "side": "self"}] *= 1000  # a sink alone makes most self
    rows = {row.label.strip(): row for row in summary_rows(sunk)}
    assert rows["self share"].part == "Credit of the gradient, beyond the first 4 positions"
    assert "mostly over edges from later queries" in verdict_sentence(sunk)
    for index, stream in enumerate(STREAMS):
        lead, part = (
            shares.sel(stream=stream)
            for shares in (stats.shares(sunk, reader_of="rest").sel(side="self"), stats.first_share(sunk))
        )
        assert rows["self share"].cells[index] == percent(float(lead.share), float(lead.error), 5)
        assert rows["edges into the first 4"].cells[index] == percent(float(part.share), float(part.error), 5)
    assert rows["the first position alone"].cells[0] == ""
    for whole in (sunk.assign_attrs(sinks=0), sample(context=4)):
        text = printed(whole)
        assert "beyond" not in text.lower()
        assert "share of first position" in text


def test_a_file_of_before_has_its_old_numbers_and_says_so(plain):
    names = [name for name in plain.data_vars if "reader_of" in plain[name].dims]
    old = plain.drop_vars(
        ["mass_by_document", "attention_by_document", "tail_moment", "kv_head", "group"], errors="ignore"
    )
    summed = {name: old[name].sum("reader_of", skipna=False) for name in names if name in old}
    old = old.drop_vars([*summed, "reader_of"])
    old = old.assign(
        {name: x.expand_dims(reader_of=["all"]).transpose(*plain[name].dims) for name, x in summed.items()}
    )
    rows = {row.label.strip(): row.cells for row in summary_rows(old)}
    share = stats.shares(plain).sel(side="self", stream="key")
    assert rows["self share"][1] == percent(float(share.share), float(share.error), 5)
    assert "eyond the first" not in verdict_sentence(old)
    assert any("An older file" in note for note in reading_notes(old))
    assert not any("An older file" in note for note in reading_notes(plain))


def test_a_share_beyond_its_bounds_is_marked_and_explained(plain):
    assert "†" not in printed(plain)
    beyond = plain.copy(deep=True)
    beyond["credit_by_document"].loc[{"layer": 2, "stream": "key", "side": "other"}] *= -0.1
    text = printed(beyond)
    assert re.search(r"largest, layer .* L2 .*\n.*its share .* 1\d\d\.\d ± \d+\.\d % †", text)
    assert "† beyond 0 to 100 %" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_heads_that_share_keys_rank_by_what_they_bring_to_their_group(plain):
    shared = plain.copy(deep=True)
    shared.kv_head[:] = [0, 0, 1]
    credit = shared.credit_by_document.sel(reader_of="rest")
    credit[:, 1, 0, 1] = credit[:, 1, 1, 1, 1].values[:, None] * np.array([0.3, -0.15])  # 200 % of little credit
    shared["credit_by_document"].loc[{"reader_of": "rest"}] = credit
    own = stats.shares(shared, ("layer", "head"), "rest").sel(layer=1, head=0, stream="key", side="self").share
    assert own > 1
    heads = {(head.layer, head.head): head for head in rank_heads(shared, "key")}
    total = credit.sum(("document", "side"))[1, :, 1].values
    for head, members in ((0, [0, 1]), (1, [0, 1]), (2, [2])):
        expected = float(credit[:, 1, head, 1, 0].sum()) / total[members].sum()
        shares = stats.group_shares(shared, "rest").sel(layer=1, head=head, stream="key", side="self")
        np.testing.assert_allclose(shares.share, expected, rtol=1e-12)
        if (1, head) in heads:
            assert heads[1, head].share == float(shares.share)
    assert (
        stats.group_shares(shared)
        .sel(stream="query")
        .identical(stats.shares(shared, ("layer", "head")).sel(stream="query"))
    )
    labels = [row.label for row in summary_rows(shared)]
    assert "largest, head in its group" in labels
    assert "largest, head" in [row.label for row in summary_rows(plain)]
    with pytest.raises(InputError, match="key/value head of each head"):
        stats.group_shares(plain.drop_vars("kv_head"))


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


@pytest.mark.parametrize("number", [-1e-6, -4e-5, -0.0, 0.0])
def test_no_zero_has_a_minus(number):
    texts = [percent(number), percent(number, 0.01), value_with_error(number, 0.01), fixed_with_error(number, 0.1)]
    texts += [number_text(number), value_with_error(-0.0)]
    assert not [text for text in texts if re.search(r"[-−]0(\.0*)?( |$)", text)]
    assert percent(-0.25, 0.01) == "−25.0 ± 1.0 %"
    assert value_with_error(-0.25, 0.01) == "−0.250 ± 0.010"


@pytest.mark.parametrize(("prices", "losses"), [("text", "the text"), ("samples", "labels that the model draws")])
def test_prices_are_said_in_a_note(prices, losses):
    result = sample(prices=prices, documents=9)
    by_layer = result.price_by_document.sum(("document", "group")) / result.tokens.sum()
    (note,) = [note for note in reading_notes(result) if note.startswith("Prices")]
    assert note.startswith(f"Prices, by the losses of {losses}: cached keys and values are worth ")
    worth = float(note.split(" worth ")[1].split(" ± ")[0])
    assert worth == pytest.approx(float(by_layer.sum()), rel=0.01)
    dearest = sorted(range(4), key=lambda layer: -float(by_layer[layer]))[:3]
    assert f"most in layers {', '.join(map(str, dearest))} (" in note
    assert not [note for note in reading_notes(sample()) if "rice" in note]
