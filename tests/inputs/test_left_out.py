"""What no window holds is said wherever a measurement is: on the terminal, on the page, in the attributes."""

import json

import pytest
from support.texts import PLAIN, WORDS
from support.tiny import tiny
from typer.testing import CliRunner

import posterity
from posterity.cli.main import app
from posterity.inputs.documents import default_text
from posterity.inputs.model import LoadedModel

SHORT = [list(range(1, 21))] * 200
COUNTS = {"documents_read": 201, "documents_left_out": 200, "tokens_read": 4064, "tokens_left_out": 4000}
LINE = "left out: 200 of 201 documents, 4,000 of 4,064 tokens"


@pytest.fixture(scope="module")
def result():
    model = tiny("llama", num_hidden_layers=1, vocab_size=128)
    return posterity.measure(model, None, [*SHORT, list(range(1, 65))], context=64, lags="self", progress=False)


def test_a_result_knows_what_its_windows_leave_out(result):
    assert {name: result.attrs[name] for name in COUNTS} == COUNTS
    assert "limit" not in result.attrs
    assert result.attrs["tokens"] == 64


@pytest.mark.slow
def test_table_and_page_say_what_is_left_out_also_of_a_saved_result(result, tmp_path, capsys):
    posterity.save(result, tmp_path / "run.nc")
    loaded = posterity.load(tmp_path / "run.nc")
    posterity.summary(loaded)
    assert LINE in capsys.readouterr().out.splitlines()
    assert LINE in posterity.report(loaded, tmp_path / "run.html").read_text()
    posterity.summary(loaded.drop_attrs().assign_attrs(schema_version=loaded.attrs["schema_version"]))
    assert "left out" not in capsys.readouterr().out


def test_the_command_says_at_which_limit_reading_ended(tmp_path, monkeypatch):
    model = tiny("llama", num_hidden_layers=1, vocab_size=len(PLAIN))
    monkeypatch.setattr("posterity.inputs.model.load_model", lambda *_: LoadedModel(model, PLAIN, "tiny", ""))
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("the cat", WORDS * 9, WORDS * 9)))
    out = CliRunner().invoke(app, ["measure", "tiny", str(path), "--context", "16", "--documents", "2"])
    assert out.exit_code == 0, out.stderr
    size = len(PLAIN("the cat").input_ids)
    assert f"left out: 1 of 2 documents, {size} of {32 + size} tokens; reading ended at the limit of 2 windows" in (
        " ".join(out.stdout.split())
    )


def test_folding_and_an_audit_say_it_too(tmp_path):
    model = tiny("llama", num_hidden_layers=1, vocab_size=128)
    documents = [[1, 2, 3], *([list(range(1, 17))] * 3)]
    assert "left out: 1 of 4 documents, 3 of 51 tokens" in str(
        posterity.fold(model, None, documents, context=16, limit=1, progress=False)
    )
    audit = posterity.audit(
        model, None, documents, rows=[1], context=16, limit=4, contexts=(4, 8), span=8, short=4, pass_tokens=4,
        prefix=2, future=2, progress=False,
    )  # fmt: skip
    assert audit.attrs["documents_left_out"] == 1
    assert "left out: 1 of 4 documents, 3 of 51 tokens" in posterity.report(audit, tmp_path / "audit.html").read_text()


@pytest.mark.slow
def test_training_says_which_texts_no_row_holds(tmp_path, capsys):
    from posterity.training.run import train
    from posterity.training.settings import Settings

    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in [default_text()[1][:4000], *["the"] * 11]))
    settings = Settings(data=(str(path),), steps=1, batch=1, context=8, width=8, depth=1, heads=1)
    with pytest.raises(posterity.InputError, match="the longest of 1 given"):  # held out: one short text of ten
        train(tmp_path / "none", settings)
    path.write_text("\n".join(json.dumps({"text": text}) for text in [default_text()[1][:4000]] * 2))
    train(tmp_path / "run", settings)
    err = capsys.readouterr().err
    assert "training rows, left out: 0 of 2 documents, " in err
