"""Paths that no file system takes, and run folders of anyone, are one line and exit code 2."""

import pytest
from support.hostile import run_command
from typer.testing import CliRunner

from posterity.cli.main import app

NUL = "a\0b"


@pytest.mark.parametrize(
    "arguments",
    [
        ["measure", "./none", NUL],
        ["measure", NUL],
        ["measure", "./none", "-o", NUL],
        ["measure", "./none", "-r", NUL],
        ["inspect", "./none", "-t", NUL, "-o", NUL],
        ["audit", "./none", "--beside", NUL],
        ["check", NUL],
        ["check", "~nobody/x"],
        ["check", "~nobody/x.gguf"],
        ["measure", "~nobody/x", "~nobody/y"],
        ["fold", "./none", "-o", NUL],
        ["summary", NUL],
        ["train", "-o", NUL, "--data", "sines", "--steps", "1"],
        ["train", "-o", "/proc/x/y", "--data", "sines", "--steps", "1"],
        ["compare", NUL, NUL],
        ["report", NUL, "-o", "x.html"],
        ["report", "./none", "-o", NUL],
    ],
    ids=ascii,
)
def test_paths_that_cannot_be_are_refused(arguments):
    assert run_command(arguments) is False


@pytest.mark.parametrize("command", ["prices", "fold", "evict", "measure"])
@pytest.mark.parametrize("output", ["", ".", "..", "/", NUL])
def test_an_output_without_a_name_is_refused_in_an_empty_folder_too(command, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command([command, "./none", "--output", output]) is False


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "null",
        "[" * 100_000,
        '{"data": 3}',
        '{"layers": "x"}',
        '{"steps": "x"}',
        '{"data_digest": 1, "horizon": 3}',
        '{"data_digest": 1, "streams": 3}',
        "\udcff",
    ],
)
def test_a_run_folder_that_is_damaged_is_refused_by_compare_and_train(tmp_path, text):
    (tmp_path / "run.json").write_text(text, errors="surrogateescape")
    (tmp_path / "metrics.json").write_text("[]")
    for arguments in (
        ["compare", str(tmp_path), str(tmp_path)],
        ["train", "-o", str(tmp_path), "--data", "sines", "--steps", "1"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2, result.exception
        assert result.stderr.startswith("posterity: ")
        assert result.stderr.count("\n") == 1
