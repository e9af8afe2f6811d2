"""The table of windows in a terminal: every price with its error, the proposal in words, the trials beside it."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from support.sample import sample
from typer.testing import CliRunner

import posterity
from posterity.cli.main import app
from posterity.results.window_plan import Estimate, Trial, other_choices, plan_windows, pool_trials


def printed(plan):
    console = Console(width=80, highlight=False, file=io.StringIO())
    posterity.summary(plan, console)
    return console.file.getvalue()


def tried(plan):
    """Return the plan with trials of made-up cost."""
    choices = [("cheapest", plan.proposal), *other_choices(plan.result, plan.proposal)]
    cost = Estimate(0.01, 0.001), Estimate(-0.002, 0.0012)
    trials = [Trial(choice, layers.layers, layers.predicted, *cost) for choice, layers in choices]
    return replace(plan, trials=(*trials[:3], pool_trials(trials[3:])), trial_windows=9)


def test_every_price_is_printed_with_its_error():
    result = sample(layers=5, prices="samples", documents=9)
    text = printed(plan_windows(result))
    prices = result.window_price_by_document.sum("document") / result.tokens.sum()
    lines = [line for line in text.splitlines() if re.match(r" +\d+ ", line)]
    assert len(lines) == 5
    for layer, line in enumerate(lines):
        numbers = [float(number) for number in line.split()[1:]]
        np.testing.assert_allclose(numbers, 1000 * prices.sel(layer=layer), rtol=0.01)
    assert text.count("±") == 5 * result.sizes["window"] + 1
    assert "add --local 1/2" in text


def test_the_proposal_is_a_sentence_and_trials_stand_beside_it():
    plan = plan_windows(sample(layers=5, prices="samples", documents=9), "2/5", 8)
    text = printed(tried(plan))
    names = " and ".join(map(str, plan.proposal.layers))
    assert f"Local at a window of 8 tokens: layers {names}. By the sum of their prices" in text
    for choice in ("cheapest", "evenly spaced", "least attention", "random"):
        (line,) = [line for line in text.splitlines() if line.startswith(f" {choice} ")]
        assert line.count("±") == 3
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_no_window_within_the_budget_is_said():
    text = printed(plan_windows(sample(prices="samples"), 2, budget=0.0))
    assert "No window lets 2 of 4 layers look back less far within 0 nats per token" in " ".join(text.split())


def test_the_command_shows_the_windows_of_a_result(tmp_path):
    path = str(posterity.save(sample(prices="text"), tmp_path / "run.nc"))
    answer = CliRunner().invoke(app, ["windows", path, "--local", "1/2", "--window", "8"])
    assert answer.exit_code == 0, answer.output
    assert "Local at a window of 8 tokens" in answer.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run.nc", "--verify"], "expected a model with --verify"),
        (["--local", "2", "--sinks", "4", "-o", "local"], "a sliding window keeps no first keys"),
        (["-o", "local"], "say how many"),
        (["run.nc", "--local", "0"], "share above 0, at most 1"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    posterity.save(sample(prices="text"), "run.nc")
    answer = CliRunner().invoke(app, ["windows", *options])
    assert answer.exit_code == 2
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1
