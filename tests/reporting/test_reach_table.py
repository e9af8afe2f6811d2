"""The table of the reach: the numbers of `posterity.reach`, which window each layer and key/value head needs."""

import re

import pytest
from rich.console import Console
from support.sample import sample
from support.sample_kinds import sample_audit
from typer.testing import CliRunner

import posterity
from posterity.cli.main import app
from posterity.errors import InputError
from posterity.reporting.reach_table import QUANTITIES, print_reach, window_sentence
from posterity.results import stats
from posterity.results.formatting import percent
from posterity.results.steps import join_steps


def printed(result, width=80, **options):
    console = Console(record=True, width=width)
    print_reach(result, console=console, **options)
    return console.export_text()


def rows(text):
    """Yield layer, head and cells of the table; a head stands under its layer."""
    layer = None
    for line in text.splitlines():
        match = re.match(r" {2,}(all|\d+)? +(all|\d+) {2,}(.*)", line)
        if match:
            layer = match[1] or layer
            yield layer, match[2], [tuple(cell.split(" ± ")) for cell in re.split(r" {2,}", match[3].strip())]


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_table_shows_the_reach_of_model_layers_and_key_value_heads(level):
    result = sample(layers=3, heads=4, missing_heads=1, seed=2, documents=3)
    reaches = {
        by: posterity.reach(result, by, (level,)).sel(level=level) for by in ((), ("layer",), ("layer", "kv_head"))
    }
    table = list(rows(printed(result, level=level)))
    assert [row[:2] for row in table] == [
        ("all", "all"), *((str(layer), head) for layer in range(3) for head in ("all", *"0123"[: 4 - (layer == 2)])),
    ]  # fmt: skip
    for layer, head, cells in table:
        by = ("layer", "kv_head")[: (layer != "all") + (head != "all")]
        place = dict(zip(by, (int(label) for label in (layer, head) if label != "all"), strict=True))
        expected = reaches[by].sel(place)
        for quantity, cell in zip(QUANTITIES, cells, strict=True):
            number = expected.sel(quantity=quantity)
            error = stats.uncertainty(float(number.error), result.sizes["document"])
            assert cell == (f"{float(number.lag):,.0f}", f"{error:,.0f}")


def test_a_layer_with_one_key_value_head_is_one_row_and_one_window_has_no_errors():
    text = printed(sample(layers=2, heads=1, documents=1))
    assert [row[:2] for row in rows(text)] == [("all", "all"), ("0", "0"), ("1", "0")]
    assert "One window: there are no errors." in text
    assert "±" not in text


def test_the_sentence_names_the_smallest_window_that_holds_enough():
    result = sample(documents=4)
    reach = posterity.reach(result, ()).sel(quantity=list(QUANTITIES))
    for level in (0.5, 0.8, 0.999):
        enough = [window for window in reach.window.values if (reach.covered.sel(window=window) >= level).all()]
        window = min(enough) if enough else max(reach.window.values)
        covered = reach.sel(window=window, quantity="value credit")
        sentence = window_sentence(result, level)
        assert sentence.startswith(f"The first 4 positions and the latest {window} hold ")
        share = percent(float(covered.covered), float(covered.covered_error), windows=4)
        short = "" if enough else f"; no measured window holds {100 * level:g} % of each"
        assert sentence.endswith(f" {share} of the value credit{short}.")
    assert not enough


def test_the_footnotes_say_what_each_answer_means_and_the_table_fits_a_terminal():
    text = printed(sample())
    for words in (
        "attention: what the forward pass reads",
        "mass: how much gradient",
        "credit: how much of the gradient",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_of_several_steps_the_last_is_printed():
    steps = join_steps({1: sample(seed=1), 2: sample(seed=2)})
    assert list(rows(printed(steps))) == list(rows(printed(sample(seed=2))))


def test_a_mistake_is_one_line():
    for match, arguments in {
        "expected a result as posterity.measure returns it": (sample_audit(),),
        "which was not measured": (sample(lags="self"),),
        "levels expects shares between 0 and 1": (sample(), 95.0),
    }.items():
        with pytest.raises(InputError, match=match):
            print_reach(*arguments)


def test_the_command_prints_the_table(tmp_path):
    path = posterity.save(sample(), tmp_path / "run.nc")
    answer = CliRunner().invoke(app, ["reach", str(path), "--level", "0.9"])
    assert answer.exit_code == 0, answer.output
    assert "within which 90 % lie, without the first 4 positions" in answer.output
    answer = CliRunner().invoke(app, ["reach", str(path), "--level", "90"])
    assert answer.exit_code == 2
    assert answer.stderr.count("\n") == 1
