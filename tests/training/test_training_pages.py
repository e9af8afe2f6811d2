"""Results over training and compared runs: files, tables, pages, the command line."""

import json
import re
import shlex

import numpy as np
import pytest
import xarray as xr
from support.pages import DRAWN, browser, data, opened, tables, traces
from support.sample import sample
from support.trainings import saved_losses
from typer.testing import CliRunner

import posterity
from posterity.cli import main as cli
from posterity.errors import InputError
from posterity.inputs.checkpoints import find_checkpoints
from posterity.reporting.report import Page, report
from posterity.reporting.result_words import heading
from posterity.results import stats, steps
from posterity.results.comparison_schema import COMPARISON, myopia_gaps
from posterity.results.files import save
from posterity.results.schema import RESULT

PAID = {"losses": True, "horizons": (1, 2, 4), "parameters": ("model.a", "model.b")}


@pytest.fixture(scope="module")
def measured():
    return {step: sample(seed=seed, **PAID) for seed, step in enumerate((0, 100, 250))}


@pytest.fixture(scope="module")
def stepped(measured):
    return steps.join_steps(measured)


def html(*results) -> str:
    page = report(list(results))
    assert isinstance(page, Page)
    return page.html


# ---- results over training -------------------------------------------------------------------------------------------


def test_steps_are_kept_whole_in_memory_and_in_a_file(tmp_path, measured, stepped):
    posterity.save(stepped, tmp_path / "run.nc")
    for joined in (stepped, posterity.load(tmp_path / "run.nc")):
        assert list(joined.step.values) == [0, 100, 250]
        parts = steps.split_steps(joined)
        for step, result in measured.items():
            RESULT.check(parts[step])
            for name, variable in result.data_vars.items():
                np.testing.assert_array_equal(parts[step][name], variable, err_msg=str(name))
        assert steps.latest_step(joined).equals(parts[250])


def test_several_checkpoints_have_the_name_of_the_folder_that_holds_them(measured):
    for names, common in (
        (("run/checkpoint-0", "run/checkpoint-100", "run/checkpoint-250"), "run"),
        (("a", "b", "c"), "a, b, c"),
        (("same", "same", "same"), "same"),
        (("/x/run/a", "/x/run/b", "/x/run/c"), "/x/run"),
    ):
        named = {
            step: result.assign_attrs(model=name) for (step, result), name in zip(measured.items(), names, strict=True)
        }
        joined = steps.join_steps(named)
        assert joined.attrs["model"] == common
        assert heading(steps.latest_step(joined))[0] == common


def test_shares_over_training_are_those_of_each_step(measured, stepped):
    for compute in (stats.shares, stats.weight_shares, stats.loss_shares, stats.horizon_curve):
        shares = compute(stepped, ("layer",))
        for step, result in measured.items():
            xr.testing.assert_allclose(shares.sel(step=step, drop=True), compute(result, ("layer",)))
    for step, result in measured.items():
        xr.testing.assert_allclose(stats.angles(stepped).sel(step=step, drop=True), stats.angles(result))
        horizon = stats.effective_horizon(result, ("layer",))
        xr.testing.assert_allclose(stats.effective_horizon(stepped, ("layer",)).sel(step=step, drop=True), horizon)


def test_angles_are_those_of_the_parts():
    result = sample(**PAID)
    own, later, inner = result.parameter_by_document.sum(("document", "parameter")).sel(
        loss_term=["own", "later", "inner"]
    )
    right = np.degrees(np.arccos(inner / np.sqrt(own * later)))
    assert float(stats.angles(result).parameters) == pytest.approx(float(right))
    assert 0 < right < 180
    assert "parameters" not in stats.angles(sample(losses=True))


def test_results_that_do_not_belong_together_are_refused(measured, stepped):
    with pytest.raises(InputError, match="step 0 and step 7 were not measured in the same way"):
        steps.join_steps({0: measured[0], 7: sample()})
    with pytest.raises(InputError, match="at least one step; got none"):
        steps.join_steps({})
    with pytest.raises(InputError, match="steps do not begin at 0 or more and grow"):
        RESULT.check(stepped.isel(step=[1, 0]))


def test_summary_and_page_say_which_step_they_show(measured, stepped):
    last = steps.latest_step(stepped)
    assert any("after 250 steps" in line for line in heading(last))
    text = html(stepped)
    assert "after 250 steps" in text
    found = tables(text)
    caption = "Self share by layer, beyond the first 4 positions"
    assert found[caption] == tables(html(measured[250]))[caption]
    head, *rows = found["Self share by training step"]
    assert head == ["step", "query", "key", "value"]
    assert [row[0] for row in rows] == ["0", "100", "250"]
    share = stats.shares(measured[100]).share.sel(side="self", stream="key")
    assert rows[1][2].startswith(f"{100 * float(share):.1f}")
    angle = float(stats.angles(measured[100]).parameters)
    assert found["Angle between own and later losses by training step"][2][2] == f"{angle:.1f}°"
    keys = traces(text, "training", 1)["all layers"]
    assert keys["x"] == [0, 100, 250]
    np.testing.assert_allclose(keys["y"][1], float(share), rtol=1e-5)
    own = stats.loss_shares(measured[0], ("layer",)).share.sel(written="value", part="own")
    lines = traces(text, "training_own", 1)
    layers = [lines[name] for name in ("first layer", "scatter", "scatter+", "last layer")]
    np.testing.assert_allclose([line["y"][0] for line in layers], own, rtol=1e-5)
    np.testing.assert_allclose(traces(text, "training_angle", 1)["all layers"]["y"][1], angle, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 420])
def test_charts_over_training_are_drawn_without_an_error(tmp_path, stepped, width):
    plain = steps.join_steps({step: sample(seed=step, model="other") for step in (0, 300)})
    for given, panels, lines in (([stepped], (3, 2, 2), 5), ([stepped, plain], (3, 2, 2), 1)):
        with browser(viewport={"width": width, "height": 900}) as (tab, heard):
            opened(tab, report(given, tmp_path / "report.html"))
            drawn = {one["id"]: one for one in tab.evaluate(DRAWN)}
            assert tuple(drawn[name]["panels"] for name in ("training", "training_own", "training_angle")) == panels
            assert drawn["training"]["marks"] >= 3 * lines
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert heard == []


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def holds_model(folder, step=None):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if step is not None:
        (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    return str(folder)


def test_checkpoints_are_found_by_their_steps(tmp_path):
    ten, two = holds_model(tmp_path / "run" / "checkpoint-10"), holds_model(tmp_path / "run" / "checkpoint-2")
    other, plain = holds_model(tmp_path / "best", step=7), holds_model(tmp_path / "plain")
    (tmp_path / "run" / "checkpoint-30").mkdir()
    assert find_checkpoints([ten, two, other, "a.txt", "-"]) == ({2: two, 7: other, 10: ten}, ["a.txt", "-"])
    assert find_checkpoints([str(tmp_path / "run"), "a.txt"]) == ({2: two, 10: ten}, ["a.txt"])
    for none in ([], [plain], [plain, "a.txt"], ["gpt2", "a.txt"], [str(tmp_path)]):
        assert find_checkpoints(none) == ({}, none)
    with pytest.raises(InputError, match="plain does not say its step"):
        find_checkpoints([ten, plain])
    with pytest.raises(InputError, match="are both of step 10"):
        find_checkpoints([ten, two, holds_model(tmp_path / "again-10")])


def run(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two trained runs, by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    small = ["--data", "induction", "--task", "vocabulary=11", "--task", "length=12", "--width", 16, "--depth", 2]
    small += ["--heads", 2, "--batch", 4, "--steps", 4, "--warmup", 1, "--rate", 0.02, "--save-every", 2, "--keep", 9]
    for name, more in {"full": (), "myopic": ("--horizon", "myopic", "--cut", "hidden", "--monitor-every", 2)}.items():
        done = run("train", "-o", folder / name, *small, *more)
        assert done.exit_code == 0, done.output
        trained, following = done.stdout.splitlines()
        loss = saved_losses(folder / name)[-1]
        assert trained == f"trained: {folder / name}, training loss {loss:.4f} (nats per token, steps 4 to 4)"
        arms = {"full": f"{folder / 'full'} OTHER", "myopic": f"PLAIN {folder / 'myopic'}"}[name]
        assert following.startswith(f"next: posterity compare {arms} -r gap.html # ")
    return folder


@pytest.mark.slow
def test_a_folder_of_checkpoints_is_measured_over_training(tmp_path, runs):
    texts = tmp_path / "some.txt"
    texts.write_text("one two three " * 400)
    text = run("train", "-o", tmp_path / "text", "--data", texts, "--steps", 2, "--save-every", 1, "--context", 16,
               "--width", 16, "--depth", 1, "--heads", 2, "--batch", 2)  # fmt: skip
    assert text.exit_code == 0, text.output
    measurement = ["measure", tmp_path / "text", texts, "--context", "16", "--losses", "-r", "report.html"]
    assert text.stdout.splitlines()[-1] == f"next: {shlex.join(['posterity', *map(str, measurement)])}"
    folders = [tmp_path / "text" / f"checkpoint-{step}" for step in (2, 1)]
    done = run("measure", *folders, texts, "--context", 16, "--documents", 2, "--losses", "--parameters",
               "-o", tmp_path / "over.nc", "-r", tmp_path / "over.html")  # fmt: skip
    assert done.exit_code == 0, done.output
    found = posterity.load(tmp_path / "over.nc")
    assert list(found.step.values) == [1, 2]
    one = run("measure", folders[0], texts, "--context", 16, "--documents", 2, "--losses", "-o", tmp_path / "one.nc")
    assert one.exit_code == 0, one.output
    np.testing.assert_array_equal(found.credit.sel(step=2), posterity.load(tmp_path / "one.nc").credit)
    assert "Over training" in (tmp_path / "over.html").read_text()
    refused = run("measure", *folders, "-")
    assert refused.exit_code == 2
    assert "standard input can be read for one model only" in refused.stderr


# ---- compared runs ---------------------------------------------------------------------------------------------------


def test_train_and_compare_on_the_command_line(tmp_path, runs):
    done = run("compare", runs / "full", runs / "myopic", "-o", tmp_path / "gap.nc", "-r", tmp_path / "gap.html")
    assert done.exit_code == 0, done.output
    compared = xr.load_dataset(tmp_path / "gap.nc", engine="h5netcdf")
    found = myopia_gaps(compared)
    shown = done.stdout
    gap = f"{float(found.gap[1]):+.4f} ± {float(found.gap_error[1]):.4f}"
    assert re.search(rf"myopic, cut at hidden +1 .*{re.escape(gap)}", shown)
    page = (tmp_path / "gap.html").read_text()
    assert gap in page.replace("\u00a0", " ")
    assert (runs / "myopic" / "monitor.html").exists()
    assert list(posterity.load(runs / "myopic" / "monitor.nc").step.values) == [0, 2, 4]
    assert not (runs / "full" / "monitor.nc").exists()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("train", "-o", "x", "--horizon", "some"), "expected a horizon full, myopic"),
        (("train", "-o", "x", "--horizon", "discount:2"), "Discount expects"),
        (("train", "-o", "x", "--data", "sines", "--task", "chance"), "--task expects NAME=NUMBER"),
        (("train", "-o", "x", "--data", "none.txt"), "expected a file"),
        (("train", "-o", "x", "--layers", "a"), "--layers expects whole numbers"),
        (("train", "-o", "x", "--data", "induction", "--model", "zorg"), "expected a type of transformers"),
        (("compare", "x", "y"), "expected the folder of a run"),
        (("compare", "x"), "expected the folder of a run"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, monkeypatch, args, line):
    monkeypatch.chdir(tmp_path)
    done = run(*args)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("posterity: ")
    assert done.stderr.count("\n") == 1
    assert line in done.stderr


def test_a_comparison_is_read_again_by_every_command(tmp_path, compared):
    save(compared, tmp_path / "gap.nc")
    assert posterity.load(tmp_path / "gap.nc").equals(compared)
    shown = run("summary", tmp_path / "gap.nc")
    assert shown.exit_code == 0, shown.output
    assert "over 3 held-out rows and the seeds" in shown.output
    assert run("report", tmp_path / "gap.nc", "-o", tmp_path / "gap.html").exit_code == 0
    assert "What a horizon costs" in (tmp_path / "gap.html").read_text()
    compared.drop_vars("arm").to_netcdf(tmp_path / "broken.nc", engine="h5netcdf")
    answer = run("summary", tmp_path / "broken.nc")
    assert answer.exit_code == 2
    assert "expected a comparison of `posterity compare`, but it has no 'arm'; it is damaged" in answer.stderr


@pytest.fixture
def compared():
    random = np.random.default_rng(0)
    arms = ["vanilla", "vanilla", "<b>x</b>", "<b>x</b>"]
    return xr.Dataset(
        {"loss": (("run", "document", "position"), random.random((4, 3, 6)), {"units": "nats"})},
        {"folder": ("run", ["a", "b", "c", "d"]), "arm": ("run", arms), "seed": ("run", [0, 1, 0, 1]),
         "document": range(3), "position": range(6)},
        {"kind": COMPARISON.name, "data": "<i>text</i>", "steps": 5},
    )  # fmt: skip


def test_an_error_over_one_seed_is_not_said_to_be_over_seeds(capsys, compared):
    for comparison, words in (
        (compared, "one standard error over 3 held-out rows and the seeds."),
        (compared.isel(run=[0, 2]), "over 3 held-out rows (one seed: what another would change is not in it)."),
    ):
        posterity.summary(comparison)
        page = html(comparison)
        for text in (capsys.readouterr().out, page):
            assert words in " ".join(text.split())
        assert "and seeds" not in page


def test_the_axis_of_a_gap_begins_at_zero(compared):
    layout = data(html(compared))["figures"]["gap"]["layout"]
    axes = [axis for name, axis in layout.items() if name.startswith("yaxis")]
    assert [axis["rangemode"] for axis in axes] == ["tozero"]


@pytest.mark.slow
def test_the_page_of_compared_runs_is_drawn_without_an_error(tmp_path, compared):
    posterity.report(compared, tmp_path / "gap.html")
    with browser() as (tab, heard):
        opened(tab, tmp_path / "gap.html")
        assert tab.locator("table.summary").inner_text().count("<b>x</b>") == 1
        assert tab.evaluate("document.querySelectorAll('article b, article i').length") == 0
        assert tab.locator("#gap .scatterlayer .trace").count() == 3
        assert heard == []


def test_rows_of_a_chat_train_by_the_field_that_the_error_advises(tmp_path):
    path, line = tmp_path / "chat.jsonl", " ".join(f"word {number}" for number in range(200))
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "body": line}
    path.write_text("\n".join([json.dumps(row)] * 3))
    small = ["--data", path, "--steps", 1, "--context", 8, "--width", 8, "--depth", 1, "--heads", 1, "--batch", 2]
    refused = run("train", "-o", tmp_path / "run", *small)
    assert refused.exit_code == 2
    assert refused.stderr.rstrip().endswith("name a field that holds text (--field)")
    done = run("train", "-o", tmp_path / "run", *small, "--field", "body")
    assert done.exit_code == 0, done.output
    assert "--field body" in done.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["field"] == "body"
