"""Files of rows are read as documents, whatever their line ends, and what is wrong in them is named with its place."""

import csv
import json

import pytest
from support.texts import PLAIN, WORDS

from posterity.errors import InputError
from posterity.inputs import row_files, text_files
from posterity.inputs.text_sources import SkippedLines, open_documents
from posterity.inputs.windows import cut_windows, token_digest

TEXTS = [WORDS, 'a "quoted" word, a comma', "two\nlines\tand a tab ", "é 漢 🙂"]


def write(path, data):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def write_table(path, delimiter, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return str(path)


def texts_of(path, field=None, skipped=None):
    return [text for _, text in open_documents([path], field, skipped)]


@pytest.mark.parametrize(("ending", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".CSV", ",")])
def test_each_row_of_a_table_is_a_document(tmp_path, ending, delimiter):
    path = write_table(tmp_path / f"a{ending}", delimiter, [["id", "text"], *enumerate(TEXTS)])
    documents = list(open_documents([path]))
    assert [text for _, text in documents] == TEXTS
    assert [name for name, _ in documents] == [f"{path}:{line}" for line in (2, 4, 5, 7)]
    assert texts_of(path, "id") == ["0", "1", "2", "3"]


def test_an_array_an_object_and_lines_of_json_are_documents(tmp_path):
    path = tmp_path / "a.json"
    rows = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]
    for data in (json.dumps(rows), json.dumps(rows, indent=2), json.dumps(TEXTS), "\n".join(map(json.dumps, rows))):
        assert texts_of(write(path, data)) == TEXTS
    assert texts_of(write(path, json.dumps({"text": WORDS}, indent=2))) == [WORDS]
    assert texts_of(write(path, b"\xef\xbb\xbf" + json.dumps(TEXTS).encode())) == TEXTS
    write(path, json.dumps([{"body": WORDS}]))
    assert list(open_documents([str(path)], "body")) == [(f"{path}[0]", WORDS)]


@pytest.mark.parametrize(
    ("ending", "newline"),
    [*((ending, b"\r\n") for ending in ("txt", "jsonl", "json", "csv", "tsv")), ("txt", b"\r"), ("csv", b"\r")],
)
def test_line_ends_change_no_token(tmp_path, ending, newline):
    data = {
        "txt": "\n".join(TEXTS),
        "jsonl": "\n".join(json.dumps({"text": text}) for text in TEXTS),
        "json": json.dumps(TEXTS, indent=1),
        "csv": 'id,text\n1,"two\nlines, twice"\n2,one line\n',
        "tsv": 'id\ttext\n1\t"two\nlines, twice"\n2\tone line\n',
    }[ending].encode()
    path = tmp_path / f"a.{ending}"
    expected = token_digest(cut_windows(open_documents([write(path, data)]), PLAIN, 3))
    assert b"\n" in data
    assert token_digest(cut_windows(open_documents([write(path, data.replace(b"\n", newline))]), PLAIN, 3)) == expected


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", '["a",', r"a\.json: expected JSON; .*line 1 column"),
        ("a.json", '[{"body": "a"}]', r"a\.json, entry 0: expected the field 'text'; got body: choose with --field"),
        ("a.json", '["a", 3]', r"a\.json, entry 1: expected a JSON object with the field 'text'; got int"),
        ("a.json", '["\\ud800"]', r"a\.json, entry 0: expected Unicode text"),
        ("a.json", "3", r"a\.json: expected an array of texts or of objects; got int"),
        ("a.json", '{"text": "a"}\n{', r"a\.json, line 2: expected one JSON object"),
        ("a.json", '{\n"body": "a"}', r"a\.json: expected the field 'text'; got body"),
        ("a.json", b'["\xff"]', r"a\.json has another encoding at byte 2"),
        ("a.csv", "id,body\n1,a\n", r"a\.csv, line 2: expected the field 'text'; got id, body: choose with --field"),
        ("a.csv", "text;id\na;1\n", r"a\.csv, line 2: expected the field 'text'; got text;id"),
        ("a.csv", "text,text\na,b\n", r"a\.csv, line 1: expected names of columns that differ"),
        ("a.csv", "id,text\n1,a\n2,b,c\n", r"a\.csv, line 3: expected 2 columns as in the first row; got 3"),
        ("a.csv", 'id,text\n1,"a\n2,b\n', r"a\.csv, line 2: unexpected end of data"),
        ("a.csv", b"id,text\n1,\xff\n", r"a\.csv has another encoding at byte 10"),
        ("a.csv", b"id,text\n1,\0\n", r"a\.csv is binary"),
    ],
)
def test_what_is_wrong_is_named_with_its_place_in_one_line(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(InputError, match=message) as caught:
        texts_of(path)
    assert str(caught.value).isprintable()


def test_broken_rows_of_a_table_are_skipped_and_counted_but_not_its_bytes(tmp_path):
    path, skipped = tmp_path / "a.csv", SkippedLines()
    assert texts_of(write(path, "id,text\n1,a\n2,b,c\n\n3,d\n4\n"), skipped=skipped) == ["a", "d"]
    assert str(skipped) == f"skipped lines: 2 broken of {path} (the first is line 3)"
    with pytest.raises(InputError, match="another encoding"):
        texts_of(write(path, b"id,text\n1,a\n2,\xff\n3,d\n"), skipped=SkippedLines())


def test_a_cell_holds_a_long_text_and_the_csv_module_is_left_as_it_was(tmp_path, monkeypatch):
    before, long = csv.field_size_limit(), "word " * 40_000
    path = write_table(tmp_path / "a.csv", ",", [["text"], [long]])
    assert texts_of(path) == [long]
    assert csv.field_size_limit() == before
    monkeypatch.setattr(row_files, "LONGEST_LINE", 1000)
    with pytest.raises(InputError, match="line 2: field larger than field limit"):
        texts_of(path)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1000)
    with pytest.raises(InputError, match="MB in a line"):
        texts_of(path)


@pytest.mark.parametrize(
    ("name", "data"), [("a.csv", "text,label\n"), ("a.tsv", "text\n\n"), ("a.jsonl", "\n\n"), ("a.json", "[]")]
)
def test_a_file_without_a_row_is_named(tmp_path, name, data):
    path = tmp_path / name
    path.write_text(data)
    for paths in ([str(path)], [str(path), str(path)]):
        with pytest.raises(InputError, match=rf"expected at least one row with a document; .*{name} has none"):
            cut_windows(open_documents(paths), PLAIN, 4)
