"""`posterity table` writes the rows of `posterity.table` in every format, and replaces only a table of its kind."""

import io

import pandas as pd
import pytest
from support.sample import sample
from support.sample_kinds import sample_audit
from typer.testing import CliRunner

import posterity
from posterity.cli.main import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def result():
    return sample()


@pytest.fixture(scope="module")
def path(tmp_path_factory, result):
    return posterity.save(result, tmp_path_factory.mktemp("run") / "run.nc")


def test_csv_is_printed_and_read_back_to_the_last_digit(path, result):
    for options, by in (((), None), (("--by", "layer"), ("layer",)), (("--by", ""), ())):
        answer = run("table", path, "--kind", "shares", *options)
        assert answer.exit_code == 0, answer.output
        frame = pd.read_csv(io.StringIO(answer.stdout), dtype={"units": str})
        pd.testing.assert_frame_equal(frame, posterity.table(result, "shares", by), check_dtype=False, check_exact=True)


def test_the_format_is_that_of_the_option_or_of_the_suffix(tmp_path, path, result):
    right = posterity.table(result, "profile")
    for name, options in {"a.parquet": (), "b.table": ("--parquet",)}.items():
        assert run("table", path, "--kind", "profile", *options, "-o", tmp_path / name).exit_code == 0
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / name), right, check_exact=True)
    assert run("table", path, "--kind", "profile", "-o", tmp_path / "c.tex").exit_code == 0
    lines = (tmp_path / "c.tex").read_text().splitlines()
    assert lines[0].startswith(r"\begin{tabular}")
    assert len([line for line in lines if line.endswith(r"\\")]) == len(right) + 1
    assert run("table", path, "--kind", "profile", "-o", tmp_path / "d.csv").exit_code == 0
    assert run("table", path, "--kind", "profile").stdout == (tmp_path / "d.csv").read_text()


def test_an_audit_is_a_table_too_and_its_labels_are_escaped(tmp_path):
    posterity.save(sample_audit(("50 % & more_\\", "b")), tmp_path / "audit.nc")
    answer = run("table", tmp_path / "audit.nc", "--kind", "audit", "--latex")
    assert r"50 \% \& more\_\textbackslash" in answer.stdout


def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, path):
    note = tmp_path / "note.csv"
    note.write_text("mine")
    for match, arguments in {
        "expected one of the tables shares, profile": ("--kind", "shame"),
        "'loss_credit_by_document', which was not measured: measure with losses=True (--losses)": ("--kind", "losses"),
        "expected one format; got --csv and --latex": ("--csv", "--latex"),
        "--parquet cannot be printed: add --output": ("--parquet",),
        "by expects a sequence of 'layer' and 'head'": ("--by", "heads"),
        f"cannot write {path}: it is read here": ("-o", path),
        "what is there is no csv table of posterity; choose another file": ("-o", note),
        "expected a table that ends in .csv, .parquet, .tex; got": ("-o", tmp_path / "t.xlsx"),
        "ends as a table of another format": ("--csv", "-o", tmp_path / "t.tex"),
    }.items():
        answer = run("table", path, *arguments)
        assert answer.exit_code == 2, arguments
        assert match in answer.stderr
        assert answer.stderr.count("\n") == 1
    assert note.read_text() == "mine"
    for _ in range(2):  # a table takes the place of a table of its kind
        assert run("table", path, "-o", tmp_path / "t.csv").exit_code == 0
    assert run("table", path, "--latex", "-o", tmp_path / "t.csv").exit_code == 2
