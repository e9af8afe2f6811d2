"""Files that hold one document in each row: lines of JSON (.jsonl), an array (.json), a table (.csv, .tsv)."""

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from posterity.errors import InputError
from posterity.inputs.conversations import Completion, Conversation, find_conversation
from posterity.inputs.documents import check_unicode, document_kind
from posterity.inputs.text_files import read_text

LONGEST_LINE = 1 << 26  # bytes of a line of a .jsonl file, characters of a field of a table
FIELD = "text"  # that holds a row's text, unless another is named
Documents = Iterator[tuple[str, Any]]


@dataclasses.dataclass(eq=False)
class SkippedLines:
    """The lines of files that hold no document and were left out: by file, their number and the first."""

    lines: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def add(self, path: str, number: int) -> None:
        """Count a line."""
        count, first = self.lines.get(path, (0, number))
        self.lines[path] = count + 1, min(first, number)

    @property
    def total(self) -> int:
        """The number of lines over all files."""
        return sum(count for count, _ in self.lines.values())

    def __str__(self) -> str:
        counts = [
            f"{count} broken of {path} (the first is line {first})" for path, (count, first) in self.lines.items()
        ]
        return f"skipped lines: {', '.join(counts) or 'none'}"


def row_reader(path: str) -> Callable[[str, str | None, SkippedLines | None], Documents] | None:
    """Return what reads a file's rows as documents, by the ending of its name; None if it is a text itself."""
    readers = {
        ".jsonl": read_json_lines, ".json": read_json_file, ".csv": partial(read_table, delimiter=","),
        ".tsv": partial(read_table, delimiter="\t"),
    }  # fmt: skip
    return readers.get(Path(path).suffix.lower())


def row_document(row: Any, field: str | None, place: str) -> str | Conversation | Completion:
    """Return the document of a row: the text in a field, or without one a conversation or a completion.

    Args:
        row: The row, by fields.
        field: The field that was asked for; None: "text", and where there is none, the fields of a conversation.
        place: Where the row is.

    Raises:
        InputError: It has none; the message begins with `place`.
    """
    name = field or FIELD
    if not isinstance(row, Mapping):
        raise InputError(f"{place}: expected a JSON object with the field {name!r}; got {document_kind(row)}")
    if field is None and row.get(name) is None and (conversation := find_conversation(row, place)) is not None:
        return conversation
    if name not in row:
        raise InputError(f"{place}: expected the field {name!r}; got {', '.join(map(str, row))}: choose with --field")
    if isinstance(row[name], list) and row[name] and all(isinstance(turn, Mapping) for turn in row[name]):
        conversation = find_conversation({"messages": row[name], "tools": row.get("tools")}, place)
        assert conversation is not None
        return conversation
    if not isinstance(row[name], str):
        raise InputError(
            f"{place}: expected text in the field {name!r}; got {document_kind(row[name])}: choose with --field"
        )
    check_unicode(row[name], place)
    return row[name]


def read_json_lines(path: str, field: str | None, skipped: SkippedLines | None) -> Documents:
    """Yield the document of each line; with `skipped`, a line without one is noted there and left out."""
    for number, line in _read_lines(path):
        place = f"{path}, line {number}"
        try:
            document = row_document(_parse_line(line, place), field, place)
        except InputError:
            if skipped is None:
                raise
            skipped.add(path, number)
            continue
        yield f"{path}:{number}", document


def read_json_file(path: str, field: str | None, skipped: SkippedLines | None) -> Documents:
    """Yield the documents of an array of texts or objects, of one object, or of lines of JSON, as some call .json."""
    first = next((line for _, line in _read_lines(path)), b"")
    try:
        is_line = isinstance(_load_json(first.decode("utf-8-sig")), Mapping)
    except (ValueError, RecursionError):
        is_line = False
    if is_line:
        yield from read_json_lines(path, field, skipped)
        return
    try:
        value = _load_json("".join(read_text(path)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: expected JSON; {error}: mend it, or name it .txt to read it as text") from None
    if isinstance(value, Mapping):
        yield path, row_document(value, field, path)
        return
    if not isinstance(value, list):
        raise InputError(f"{path}: expected an array of texts or of objects; got {document_kind(value)}")
    for number, row in enumerate(value):
        place = f"{path}, entry {number}"
        if isinstance(row, str):
            check_unicode(row, place)
        yield f"{path}[{number}]", row if isinstance(row, str) else row_document(row, field, place)


def read_table(path: str, field: str | None, skipped: SkippedLines | None, *, delimiter: str) -> Documents:
    """Yield the text of one column for each row; the first row names the columns."""
    reader = csv.reader(_text_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        place = f"{path}, line {number}"
        try:
            row = _next_row(reader)
            if row is None:
                return
            if header is None:
                header = _check_header(row, field, place) if row else None
                continue
            if row and len(row) != len(header):
                raise csv.Error(f"expected {len(header)} columns as in the first row; got {len(row)}")
        except csv.Error as error:
            if skipped is None or header is None:
                raise InputError(f"{place}: {error}: mend or remove the row, or use --skip-broken") from None
            skipped.add(path, number)
            continue
        if row:
            yield f"{path}:{number}", row_document(dict(zip(header, row, strict=True)), field, place)


def _read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each line that is not blank."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
                if len(line) > LONGEST_LINE:
                    raise InputError(
                        f"{path}, line {number}: expected at most {LONGEST_LINE >> 20} MB in a line: split it"
                    )
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InputError(f"expected a file that can be read; {path}: {error.strerror or error}") from error


def _parse_line(line: bytes, place: str) -> Any:
    try:
        return _load_json(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place}: expected one JSON object in UTF-8; {error}: mend or remove the line, or leave out broken ones "
            "(--skip-broken)"
        ) from None


def _load_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_names)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object whose names differ: of two equal ones nobody could say which is meant."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return values


def _text_lines(path: str) -> Iterator[str]:
    """Yield the lines of a text with their ends."""
    rest = ""
    for piece in read_text(path):
        *lines, rest = (rest + piece).split("\n")
        yield from (f"{line}\n" for line in lines)
        if len(rest) > LONGEST_LINE:
            raise InputError(f"{path}: expected at most {LONGEST_LINE >> 20} MB in a line: split it")
    if rest:
        yield rest


def _next_row(reader: Any) -> list[str] | None:
    """Return the next row of a table; None at its end."""
    before = csv.field_size_limit(LONGEST_LINE)  # else a text has at most 131,072 characters
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _check_header(row: list[str], field: str | None, place: str) -> list[str]:
    """Return the names of the columns, which differ."""
    if len(set(row)) < len(row):
        raise InputError(f"{place}: expected names of columns that differ; got {', '.join(row)}")
    return row
