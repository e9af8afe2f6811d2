"""The command line passes on what was asked for, and every mistake is one line and an exit code."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import posterity
from posterity.atomic_files import check_output_path
from posterity.cli.guide import GUIDE
from posterity.cli.main import app, main
from posterity.errors import InputError
from posterity.inputs.documents import default_text
from posterity.inputs.model import LoadedModel
from posterity.measurement.distributed import Processes
from posterity.ops import block_kernels

SOURCE = str(Path(__file__).parents[2] / "src")


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def process(*args, **options):
    environment = {**os.environ, "PYTHONPATH": SOURCE, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "posterity", *args],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        **options,
    )


@pytest.fixture
def calls(monkeypatch):
    """Every function that a command calls, replaced by one that notes its arguments."""
    calls = []

    def note(name, value=None):
        def replacement(*args, **options):
            calls.append((name, args, options))
            return value

        return replacement

    loaded = LoadedModel("the model", "the tokenizer", "its name", "its revision")
    monkeypatch.setattr("posterity.inputs.model.load_model", note("load_model", loaded))
    monkeypatch.setattr("posterity.cli.outputs.check_output_path", note("check_output_path"))
    monkeypatch.setattr(posterity, "__version__", "9.9", raising=False)
    for name, value in {
        "measure": "the result",
        "inspect": "the result",
        "audit": "the result",
        "save": None,
        "report": None,
        "summary": None,
        "load": "a run",
    }.items():
        monkeypatch.setattr(posterity, name, note(name, value), raising=False)
    return calls


def fail(monkeypatch, error):
    def raised(*args, **options):
        raise error

    monkeypatch.setattr(posterity, "summary", raised, raising=False)
    monkeypatch.setattr(posterity, "load", lambda path: None, raising=False)


def test_measure_passes_on_what_was_given_and_leaves_the_defaults_to_the_library(calls, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/posterity", "measure", "a b"])
    result = run("measure")
    assert (result.exit_code, result.output) == (0, "")
    loading, measuring, showing = calls
    assert loading == ("load_model", (None, None, None, None, False), {})
    attributes = {"model": "its name", "revision": "its revision", "command": "posterity measure 'a b'"}
    assert measuring[1][:2] == ("the model", "the tokenizer")
    assert list(measuring[1][2]) == [default_text()]
    assert measuring[2] == {"attrs": attributes, "state": None, "processes": Processes()}
    assert showing == ("summary", ("the result",), {})


def test_measure_checks_the_outputs_and_texts_before_it_loads_the_model(calls, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some text")
    options = ["--context", 64, "--limit", 3, "--lags", "all", "--sinks", 2, "--batch", 2, "--no-weights", "--seed", 7]
    options += ["--dtype", "float64", "--device", "cpu", "--revision", "r", "--trust-remote-code"]
    result = run("measure", "org/model", text, *options, "--output", "run.nc", "--report", "page.html")
    assert result.exit_code == 0
    names = [name for name, _, _ in calls]
    assert names == ["check_output_path", "check_output_path", "load_model", "measure", "save", "report", "summary"]
    assert calls[2][1] == ("org/model", "float64", "cpu", "r", True)
    keywords = dict(calls[3][2])
    del keywords["attrs"]
    assert (keywords.pop("state"), keywords.pop("processes")) == (Path("run.nc.state"), Processes())
    assert keywords == {"context": 64, "limit": 3, "lags": "all", "sinks": 2, "batch": 2, "weights": False, "seed": 7}
    assert [name for name, _ in calls[3][1][2]] == [str(text)]
    assert calls[4][1] == ("the result", Path("run.nc"))
    assert calls[5][1] == ("the result", Path("page.html"))


def test_a_choice_of_kernels_holds_while_a_model_is_measured(calls, monkeypatch):
    choices = []
    monkeypatch.setattr(posterity, "measure", lambda *args, **options: choices.append(block_kernels._choice[0]))
    for words in ((), ("--kernels", "triton"), ("--kernels", "blocks")):
        assert run("measure", "org/model", *words).exit_code == 0
    assert choices == ["auto", "triton", "blocks"]
    assert block_kernels._choice == ["auto"]
    assert run("measure", "org/model", "--kernels", "flash").exit_code == 2


def test_random_weights_take_the_place_of_those_of_the_model(calls, monkeypatch):
    class Loaded(LoadedModel):
        def with_random_weights(self, seed):
            return LoadedModel(f"random {seed}", self.tokenizer, f"{self.name}, random weights", "")

    monkeypatch.setattr(
        "posterity.inputs.model.load_model", lambda *args: Loaded("the model", "the tokenizer", "its name", "r")
    )
    assert run("measure", "org/model", "--random-weights", "--seed", 3).exit_code == 0
    _, (model, *_), options = next(call for call in calls if call[0] == "measure")
    assert model == "random 3"
    assert options["attrs"]["model"] == "its name, random weights"


def test_who_pays_is_passed_on(calls):
    assert run("measure", "--losses", "--parameters", "--horizons", "1,2, 4").exit_code == 0
    keywords = dict(calls[1][2])
    del keywords["attrs"], keywords["state"], keywords["processes"]
    assert keywords == {"losses": True, "parameters": True, "horizons": (1, 2, 4)}


def test_inspect_passes_on_the_text_and_leaves_the_defaults_to_the_library(calls, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["posterity", "inspect"])
    assert run("inspect", "-t", "one text").exit_code == 0
    attributes = {"model": "its name", "revision": "its revision", "command": "posterity inspect"}
    assert calls == [
        ("load_model", (None, None, None, None, False), {}),
        ("inspect", ("the model", "the tokenizer", "one text"), {"attrs": attributes}),
        ("summary", ("the result",), {}),
    ]
    calls.clear()
    options = ["--batch", 2, "--horizons", "3,9", "--seed", 7, "-o", "one.nc", "-r", "one.html"]
    assert run("inspect", "org/model", "--text", "one text", *options).exit_code == 0
    assert [name for name, _, _ in calls] == [
        "check_output_path",
        "check_output_path",
        "load_model",
        "inspect",
        "save",
        "report",
        "summary",
    ]
    keywords = dict(calls[3][2])
    del keywords["attrs"]
    assert keywords == {"batch": 2, "horizons": (3, 9), "seed": 7}


def test_audit_sets_models_side_by_side_and_leaves_the_defaults_to_the_library(calls, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["posterity", "audit"])
    assert run("audit").exit_code == 0
    _, auditing, showing = calls
    attributes = {"model": "its name", "revision": "its revision", "command": "posterity audit"}
    assert auditing[1][:2] == ({"its name": "the model"}, {"its name": "the tokenizer"})
    assert list(auditing[1][2]) == [default_text()]
    assert auditing[2] == {
        "quick": False,
        "control": None,
        "attrs": attributes,
        "state": None,
        "processes": Processes(),
    }
    assert showing == ("summary", ("the result",), {})
    calls.clear()
    options = ["--rows", "4,8", "--contexts", "16,32", "--context", 64, "--documents", 3]
    options += ["--pass-tokens", 99, "--seed", 7]
    options += ["--quick", "--control", "random", "--beside", "other", "-o", "audit.nc", "-r", "audit.html"]
    assert run("audit", "one", *options).exit_code == 0
    names = [name for name, _, _ in calls]
    assert names == [
        "check_output_path",
        "check_output_path",
        "load_model",
        "load_model",
        "audit",
        "save",
        "report",
        "summary",
    ]
    keywords = dict(calls[4][2])
    del keywords["attrs"], keywords["state"], keywords["processes"]
    assert list(calls[4][1][0]) == ["its name", "other"]
    assert keywords == {
        "quick": True, "control": "random", "rows": (4, 8), "contexts": (16, 32), "context": 64, "limit": 3,
        "pass_tokens": 99, "seed": 7,
    }  # fmt: skip


@pytest.mark.parametrize("horizons", ["few", "1;2", "1,,2", "1.5", ""])
def test_horizons_that_are_no_numbers_are_refused_in_one_line_before_the_model_is_loaded(calls, horizons):
    for command in (["measure"], ["inspect", "--text", "one"]):
        result = run(*command, "--horizons", horizons)
        assert result.exit_code == 2
        assert result.stderr.startswith(
            "posterity: --horizons expects whole numbers with commas, such as 1,2,4,8; got "
        )
        assert result.stderr.count("\n") == 1
    assert calls == []


def test_a_missing_text_stops_before_the_model_is_loaded(calls):
    result = run("measure", "default", "none.txt")
    assert result.exit_code == 2
    assert re.fullmatch(r"posterity: expected a file.*there is no file none\.txt.*\n", result.stderr)
    assert calls == []


def test_the_defaults_that_the_help_shows_are_those_of_the_library():
    signature = inspect.signature(posterity.measure).parameters
    text = " ".join(process("measure", "--help").stdout.split())
    for name in ("context", "limit", "lags", "sinks", "batch", "seed"):
        shown = re.search(rf"--{name}(?:, --documents)? <.*?\[default: (\w+)\]", text)
        assert shown is not None
        assert shown[1] == str(signature[name].default)
    assert "[default: weights]" in text
    assert signature["weights"].default is True


def test_several_runs_make_one_page(calls):
    result = run("report", "a.nc", "b.nc", "-o", "page.html")
    assert (result.exit_code, result.output) == (0, "page written: page.html\n")
    assert run("report", "a.nc", "b.nc", "-o", "page.html", "--labels", "plain, myopic").exit_code == 0
    files, page = [Path("a.nc"), Path("b.nc")], Path("page.html")
    assert [call for call in calls if call[0] == "report"] == [
        ("report", (files, page), {"labels": []}),
        ("report", (files, page), {"labels": ["plain", "myopic"]}),
    ]


def test_summary_shows_a_run(calls):
    assert run("summary", "a.nc").exit_code == 0
    assert [call[:2] for call in calls] == [("load", (Path("a.nc"),)), ("summary", ("a run",))]


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 2)])
def test_check_answers_in_one_line_and_by_its_exit_code(calls, monkeypatch, ok, code):
    class Verdict:
        def __init__(self, model):
            assert model == "the model"
            self.ok = ok

        def __str__(self):
            return "its name: the verdict"

        def describe_kernels(self):
            return "what runs"

    def forecast(model, **options):
        assert (model, options) == ("the model", {"limit": 3})
        return "its size and what it takes"

    monkeypatch.setattr(posterity, "check", Verdict, raising=False)
    monkeypatch.setattr("posterity.measurement.forecast.forecast", forecast)
    result = run("check", "its name", "--limit", 3)
    assert result.exit_code == code
    assert result.stdout == "its name: the verdict\n" + ok * "what runs\nits size and what it takes\n"


def test_every_command_says_its_question_and_examples_that_its_options_take():
    app_help = run("--help").stdout
    commands = get_command(app).commands
    assert list(commands) == [name for name in GUIDE if name in commands]  # the order of use
    for name, command in commands.items():
        purpose, text = GUIDE[name], run(name, "--help").stdout
        assert re.search(rf"^  {name} +{re.escape(purpose.question[:20])}", app_help, re.MULTILINE)
        assert text.split("\n\n")[1].split() == purpose.question.split()
        for example in purpose.examples:
            assert f"    {example}\n" in text
            program, called, *words = shlex.split(example)
            assert (program, called) == ("posterity", name)
            command.make_context(name, words)  # a wrong option raises


@pytest.mark.parametrize("kind", ["--output", "--report"])
@pytest.mark.parametrize("name", ["run.csv", "run.json", "run", "run.txt"])
def test_an_output_with_the_ending_of_something_else_is_refused_in_one_line(calls, kind, name, monkeypatch):
    monkeypatch.setattr("posterity.cli.outputs.check_output_path", check_output_path)
    for command in (["measure"], ["audit"], ["inspect", "--text", "some"]):
        result = run(*command, kind, name)
        assert result.exit_code == 2
        expected = "a result that ends in .nc" if kind == "--output" else "a page that ends in .html"
        ending = expected[-3:] if kind == "--output" else ".html"
        assert result.stderr == f"posterity: expected {expected}; got {name}: name it run{ending}\n"
    assert calls == []


def test_a_text_that_names_a_file_is_refused_before_the_model_is_loaded(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("words")
    result = run("inspect", "--text", "my.txt")
    assert result.exit_code == 2
    assert result.stderr.startswith("posterity: expected a text; got 'my.txt', and a file of that name exists: did you")
    assert calls == []


def test_the_version_is_the_package_s(calls):
    assert run("--version").stdout == "posterity 9.9\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("expected one;\n got two"), 2, "posterity: expected one; got two"),
        (KeyboardInterrupt(), 130, "posterity: interrupted"),
        (MemoryError(), 2, "posterity: out of memory: lower --context or --batch, or choose --dtype bfloat16"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "posterity: out of memory: .*"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 2, "posterity: out of memory: .*"),
    ],
)
def test_mistakes_and_shortages_are_one_line_and_an_exit_code(monkeypatch, error, code, line):
    fail(monkeypatch, error)
    result = run("summary", "a.nc")
    assert result.exit_code == code
    assert result.stdout == ""
    assert re.fullmatch(line + "\n", result.stderr)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), OSError("a bug"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    fail(monkeypatch, error)
    result = run("summary", "a.nc")
    assert result.exception is error


@pytest.mark.parametrize(
    "args",
    [
        ["measure", "--context", "1"],
        ["measure", "--limit", "0"],
        ["audit", "--budget", "9"],
        ["measure", "--lags", "few"],
        ["measure", "--zorg"],
        ["inspect"],
        ["inspect", "--text", "one", "--batch", "0"],
        ["report", "a.nc"],
        ["report"],
        ["summary"],
        ["zorg"],
    ],
)
def test_a_wrong_option_is_exit_code_2_and_nothing_is_called(calls, args):
    result = run(*args)
    assert result.exit_code == 2
    assert re.fullmatch(r"posterity: [^\n]+; see (root|posterity)[^\n]* --help\n", result.stderr)
    assert calls == []


@pytest.mark.parametrize(
    ("args", "which"),
    [
        (("measure", "default", "some.txt", "-o", "some.txt"), "is read here"),
        (("measure", "default", "some.txt", "-o", "a.nc", "-r", "./a.nc"), "is the other output"),
        (("inspect", "some.txt", "--text", "one", "-r", "some.txt"), "is read here"),
        (("report", "some.txt", "-o", "some.txt"), "is read here"),
    ],
)
def test_no_output_takes_the_place_of_an_input_or_of_the_other_output(tmp_path, monkeypatch, calls, args, which):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.txt").write_text("words")
    result = run(*args)
    assert result.exit_code == 2
    assert re.fullmatch(rf"posterity: cannot write [^\n]+: it {which}; choose another file[^\n]*\n", result.stderr)
    assert [call for call in calls if call[0] != "check_output_path"] == []
    assert (tmp_path / "some.txt").read_text() == "words"


@pytest.mark.parametrize("option", ["--output", "--report"])
def test_no_file_of_another_kind_is_replaced(tmp_path, calls, option):
    there = tmp_path / ("run.nc" if option == "--output" else "page.html")
    there.write_bytes(b"weights")
    for command in ("measure", "audit"):
        result = run(command, option, there)
        assert result.exit_code == 2
        assert f"what is there is no {'result' if option == '--output' else 'page'}" in result.output
        assert result.output.count("\n") == 1
    assert there.read_bytes() == b"weights"
    there.write_bytes(b"\x89HDF and so on" if option == "--output" else b"<!DOCTYPE html>")
    assert run("measure", option, there).exit_code == 0


def test_help_answers_without_importing_torch():
    code = (
        "import sys; from posterity.cli import main; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout == "[]\n"
    result = process("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("measure", "inspect", "report", "check", "summary"))


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_that_wait_leave_their_core_unless_the_environment_decides(monkeypatch, chosen, spins):
    monkeypatch.setattr(os, "environ", dict(chosen))
    monkeypatch.setattr("posterity.cli.main.signal.signal", lambda *args: None)
    seen = []
    monkeypatch.setattr("posterity.cli.main.app", lambda **kwargs: seen.append(os.environ.get("GOMP_SPINCOUNT")))
    main()
    assert seen == [spins]


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_has_gone_brings_no_traceback(lines):
    code = (
        "import posterity\n"
        "from posterity.cli import main\n"
        "posterity.load = lambda path: None\n"
        f"posterity.summary = lambda result: print('line\\n' * {lines})\n"
        "import sys; sys.argv = ['posterity', 'summary', 'a.nc']; main.main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": SOURCE, "PYTHONUNBUFFERED": ""}
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, timeout=60
    )
    os.close(writing)
    assert (process.returncode, process.stderr) == (141, "")


def test_a_run_that_is_told_to_stop_says_so():
    code = (
        "import os, signal, sys\n"
        "from posterity.cli.main import main\n"
        "from posterity.inputs import text_sources\n"
        "text_sources.open_documents = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.argv = ['posterity', 'measure']; main()"
    )
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert process.returncode == 143
    *earlier, line = process.stderr.splitlines()  # earlier: what packages beside transformers log when imported
    assert line.startswith("posterity: told to stop from outside, ")
    assert not any(text.startswith(("posterity:", "Traceback")) for text in earlier)
