"""What the command line reads by its name, Python reads too: models, files, the default text; and rows and labels."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from support.model_folders import tiny_tokenizer
from support.texts import PLAIN, WORDS
from support.tiny import tiny, tokens
from typer.testing import CliRunner

import posterity
from posterity import InputError
from posterity.cli.main import app
from posterity.inputs.documents import Tokens, default_text
from posterity.inputs.named_documents import name_documents
from posterity.inputs.windows import cut_windows, read_corpus, token_digest

TEXT = "the cat sat on the mat and the dog ran " * 40
OPTIONS = {"context": 16, "weights": False, "progress": False}


def equal(left, right):
    assert left.attrs["text_digest"] == right.attrs["text_digest"]
    for name in left.data_vars:
        assert np.array_equal(left[name].values, right[name].values, equal_nan=True), name


def named(documents):
    return list(name_documents(documents))


# The model


def test_names_give_the_result_of_the_command_line_and_its_attributes(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text(TEXT)
    ran = CliRunner().invoke(app, ["measure", "model", "my.txt", "--context", "16", "--no-weights", "-o", "run.nc"])
    assert ran.exit_code == 0, ran.output
    shell, result = posterity.load("run.nc"), posterity.measure("model", "my.txt", **OPTIONS)
    assert shell.sizes["document"] == 16  # of more that there are
    equal(shell, result)
    for name in ("model", "revision", "text_name", "limit"):
        assert shell.attrs[name] == result.attrs[name], name
    assert result.attrs["model"] == "model"


def test_a_model_by_name_and_loaded_and_in_parts_give_the_same_result(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text(TEXT)
    options, loaded = OPTIONS | {"limit": 1}, posterity.load_model("model")
    expected = posterity.measure(loaded.model, loaded.tokenizer, TEXT, **options)
    for arguments in (
        ("model", "my.txt"), (Path("model"), Path("my.txt")), (loaded, ["my.txt"]), (loaded, None, Path("my.txt")),
        (loaded.model, loaded.tokenizer, "my.txt"), ("model", tiny_tokenizer(), TEXT),
    ):  # fmt: skip
        equal(posterity.measure(*arguments, **options), expected)
    assert posterity.measure("model", TEXT, attrs={"model": "mine"}, **options).attrs["model"] == "mine"


def test_without_documents_the_default_text_is_measured(folder):
    loaded = posterity.load_model(folder)
    expected = posterity.measure(loaded.model, loaded.tokenizer, [default_text()], limit=2, **OPTIONS)
    equal(posterity.measure(str(folder), limit=2, **OPTIONS), expected)
    equal(posterity.measure(loaded.model, loaded.tokenizer, limit=2, **OPTIONS), expected)
    with pytest.raises(InputError, match="expected a tokenizer of transformers to read text; got NoneType"):
        posterity.measure(loaded.model, **OPTIONS)
    with pytest.raises(InputError, match="got str in front of the documents: pass several files or texts as one list"):
        posterity.measure("default", "a.txt", "b.txt")


def test_token_ids_need_no_tokenizer_and_16_windows_are_measured_unless_said():
    model, options = tiny("llama"), {"context": 2, "lags": "self", "weights": False, "batch": 17, "progress": False}
    ids = tokens(17, 2)
    expected = posterity.measure(model, None, ids, limit=None, **options)
    assert expected.sizes["document"] == 17
    equal(posterity.measure(model, ids.tolist(), limit=None, **options), expected)
    result = posterity.measure(model, ids.numpy(), **options)
    assert (result.sizes["document"], result.attrs["limit"]) == (16, 16)


def test_audit_fold_and_inspect_take_names_too(folder, tmp_path):
    path = tmp_path / "my.txt"
    path.write_text(TEXT)
    name, loaded = str(folder), posterity.load_model(folder)
    small = {"context": 16, "contexts": (4, 8), "span": 8, "limit": 2, "rows": [1], "progress": False}
    audit = posterity.audit(name, path, **small)
    equal_figures = posterity.audit(loaded.model, loaded.tokenizer, TEXT, **small)
    assert np.array_equal(audit.figure, equal_figures.figure, equal_nan=True)
    assert audit.model.values.tolist() == [name]
    pair = posterity.audit({"a": name, "b": loaded}, path, **small)
    assert pair.model.values.tolist() == ["a", "b"]
    assert np.array_equal(pair.figure.sel(model="a"), audit.figure.isel(model=0), equal_nan=True)
    heads = posterity.fold(name, path, context=16, limit=1, progress=False)
    assert heads.heads == posterity.fold(loaded, None, TEXT, context=16, limit=1, progress=False).heads
    text = "the cat sat on the mat"
    equal(posterity.inspect(name, text, progress=False), posterity.inspect(loaded, None, text, progress=False))
    with pytest.raises(InputError, match="inspect expects a text of 2 to 256 tokens; got none"):
        posterity.inspect(name)
    with pytest.raises(InputError, match=r"a file of that name exists: did you mean what it holds, pathlib.Path"):
        posterity.inspect(name, str(path))


# Files


def test_a_str_is_a_text_unless_it_names_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(WORDS)
    Path("rows.jsonl").write_text(json.dumps({"text": WORDS}))
    for documents in ("a.txt", Path("a.txt"), ["a.txt"], ("a.txt",), [Path("a.txt")]):
        [(name, stream)] = named(documents)
        assert (name, "".join(stream.pieces())) == ("a.txt", WORDS)
    assert named("rows.jsonl") == named(Path("rows.jsonl")) == [("rows.jsonl:1", WORDS)]
    assert [name for name, _ in named(["a.txt", "rows.jsonl"])] == ["a.txt", "rows.jsonl:1"]
    assert [name for name, _ in named([WORDS, Path("a.txt")])] == ["document 0", "a.txt"]
    assert named(["words", "a b"]) == [("document 0", "words"), ("document 1", "a b")]
    assert named([("mine", "a.txt")]) == [("mine", "a.txt")]
    assert named("the cat") == [("text", "the cat")]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("none.txt", "expected a text or a file; there is no file none.txt: check the path"),
        ("none.jsonl", "there is no file none.jsonl"),
        (Path("none"), "expected a file; there is no file none: check the path"),
        ([WORDS, Path("none")], "there is no file none"),
        ([Path("a\0b")], "there is no file"),
        ("folder", "expected a text file; folder is a folder"),
        ([WORDS, "a.txt"], r"document 1: expected a text; got 'a.txt', and a file of that name exists: did you mean "),
        (["a.txt", "none.txt"], r"did you mean pathlib.Path\('a.txt'\)\? As words, pass \('document 0', 'a.txt'\)"),
    ],
)
def test_a_path_that_cannot_be_meant_is_refused_in_one_line(documents, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(WORDS)
    Path("folder").mkdir()
    with pytest.raises(InputError, match=message):
        cut_windows(documents, PLAIN, 2)


def test_a_wrong_file_is_found_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("posterity.inputs.arguments.load_model", None)
    for run in (posterity.measure, posterity.audit, posterity.fold):
        with pytest.raises(InputError, match=r"there is no file none\.txt"):
            run("default", "none.txt")


# Rows and labels


def test_rows_of_a_tokenized_data_set_are_their_tokens_without_padding():
    ids = [[5, 6, 7, 8, 0, 0], [1, 2, 3, 4, 5, 6]]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1, 1, 1, 1, 0, 0], [1] * 6]})
    batch = rows.with_format("torch")[:]
    for documents in (rows, rows.with_format("torch"), rows.with_format("numpy"), batch, rows[:], list(rows)):
        assert [(name, document.tolist()) for name, document in named(documents)] == [
            ("document 0", ids[0][:4]), ("document 1", ids[1]),
        ]  # fmt: skip
    assert named(rows[1])[0][1].tolist() == ids[1]
    encoded = PLAIN(WORDS, return_attention_mask=True)
    assert token_digest(cut_windows(encoded, None, 4)) == token_digest(cut_windows(WORDS, PLAIN, 4))


def test_labels_of_a_row_say_which_tokens_have_a_loss(tmp_path):
    ids, mask = list(range(1, 13)), [1] * 11 + [0]
    labels = [-100] * 6 + ids[6:11] + [-100]
    model = tiny("llama")
    [(_, row)] = named([{"input_ids": ids, "attention_mask": mask, "labels": labels}])
    assert isinstance(row, Tokens)
    result = posterity.measure(
        model, [{"input_ids": ids, "labels": labels[:-1] + ids[-1:]}], context=12, progress=False
    )
    assert result.tokens == 6
    loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels[:-1] + ids[-1:]])).loss  # in float32
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    whole = posterity.measure(model, [{"input_ids": ids, "labels": ids}], context=12, progress=False)
    equal(whole, posterity.measure(model, [ids], context=12, progress=False))
    for run in (posterity.audit, posterity.fold):
        with pytest.raises(InputError, match="document 0: expected token ids; got labels with -100"):
            run(model, [{"input_ids": ids, "labels": labels[:-1] + ids[-1:]}], context=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": [2, 3, 4]}, "document 0: expected labels that are the token ids themselves or -100"),
        ({"labels": [1, 2]}, "document 0: expected 3 numbers in the field 'labels', one for each token"),
        ({"labels": 1}, "expected 3 numbers in the field 'labels'"),
        ({"attention_mask": "abc"}, "expected 3 numbers in the field 'attention_mask'"),
        ({"input_ids": "abc"}, "document 0: expected text or token ids; got str"),
    ],
)
def test_a_tokenized_row_that_is_not_what_it_says_is_refused_in_one_line(fields, message):
    with pytest.raises(InputError, match=message):
        read_corpus([{"input_ids": [1, 2, 3], **fields}], None, 2, conversations=True)


def test_labels_name_the_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(WORDS)
    texts = {"english": WORDS, "file": str(path), "path": path, "ids": [1, 2, 3], "several": [WORDS, WORDS]}
    names = ["english", "file", "path", "ids", "several: document 0", "several: document 1"]
    assert [name for name, _ in named(texts)] == names
    result = posterity.measure(
        tiny("llama"), {"a": tokens(1, 12)[0], "b": tokens(1, 12)[0]}, context=12, progress=False
    )
    assert result.attrs["text_name"] == "a; b"
    assert [name for name, _ in named([("pair", path)])] == ["pair"]
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": [WORDS, WORDS]})})
    assert [name for name, _ in named(splits)] == ["train: document 0", "train: document 1"]
    with pytest.raises(InputError, match="there is no file"):
        named({"a": Path("none")})
