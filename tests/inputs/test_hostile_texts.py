"""Broken lines of .jsonl files are named, or left out when that was asked for, and then counted."""

import json

import pytest
from support.texts import PLAIN, WORDS
from support.tiny import tiny
from typer.testing import CliRunner

import posterity
from posterity.cli.main import app
from posterity.errors import InputError
from posterity.inputs import row_files
from posterity.inputs.model import LoadedModel
from posterity.inputs.text_sources import SkippedLines, open_documents
from posterity.inputs.windows import cut_windows

GOOD = json.dumps({"text": WORDS})
BROKEN = {
    "cut off": '{"text": "a',
    "of another type": '{"text": ["a"]}',
    "no object": "[1]",
    "without the field": '{"body": "a"}',
    "a name twice": '{"text": "a", "text": "b"}',
    "half of a pair": '{"text": "\\ud800"}',
    "a number without end": '{"text": ' + "9" * 5000 + "}",
    "too deep": "[" * 100_000,
    "no UTF-8": b'{"text": "\xff"}',
    "UTF-16": GOOD.encode("utf-16-le"),
    "zero bytes": b"\0\0\0",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named_or_skipped_and_counted(tmp_path, name):
    line = BROKEN[name] if isinstance(BROKEN[name], bytes) else BROKEN[name].encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode(), b"", line, GOOD.encode(), line]))
    with pytest.raises(InputError, match=r"a\.jsonl, line 3: ") as caught:
        cut_windows(open_documents([str(path)]), PLAIN, 4)
    assert str(caught.value).isprintable()
    skipped = SkippedLines()
    windows = cut_windows(open_documents([str(path)], skipped=skipped), PLAIN, 4)
    assert {window.text for window in windows} == {f"{path}:1", f"{path}:4"}
    assert skipped.lines == {str(path): (2, 3)}
    assert str(skipped) == f"skipped lines: 2 broken of {path} (the first is line 3)"


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "LONGEST_LINE", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 2000)
    for skipped in (None, SkippedLines()):
        with pytest.raises(InputError, match="line 1: expected at most"):
            cut_windows(open_documents([str(path)], skipped=skipped), PLAIN, 4)


def test_measure_says_what_it_skipped_and_the_result_knows_it(tmp_path, monkeypatch):
    model = tiny("llama", vocab_size=len(PLAIN))
    monkeypatch.setattr("posterity.inputs.model.load_model", lambda *_: LoadedModel(model, PLAIN, "tiny", ""))
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([GOOD, "{", "[", GOOD]))
    out = ["--context", "8", "--documents", "99", "-o", str(tmp_path / "run.nc")]
    result = CliRunner().invoke(app, ["measure", "tiny", str(path), *out])
    assert result.exit_code == 2
    assert "line 2" in result.stderr
    assert "--skip-broken" in result.stderr
    assert not (tmp_path / "run.nc").exists()
    result = CliRunner().invoke(app, ["measure", "tiny", str(path), "--skip-broken", *out])
    assert result.exit_code == 0, result.stderr
    assert f"skipped lines: 2 broken of {path} (the first is line 2)" in result.stderr.splitlines()
    assert posterity.load(tmp_path / "run.nc").attrs["skipped_lines"] == 2


def test_a_run_of_broken_lines_is_another_run_and_knows_them(tmp_path, capsys):
    from posterity.training.run import train
    from posterity.training.settings import Settings

    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps({"text": WORDS * 40}), "{"]))
    small = {"data": (str(path),), "steps": 1, "batch": 1, "context": 8, "width": 8, "depth": 1, "heads": 1}
    with pytest.raises(InputError, match="line 2"):
        train(tmp_path / "run", Settings(**small), progress=False)
    train(tmp_path / "run", Settings(**small, skip_broken=True))
    assert f"skipped lines: 1 broken of {path} (the first is line 2)" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["skipped_lines"] == 1
