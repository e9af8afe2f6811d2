"""The texts that a command line names: files, lines of JSON, datasets and standard input, as named documents."""

import codecs
import dataclasses
import json
import mimetypes
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, BinaryIO

from posterity.errors import InputError, first_line
from posterity.inputs.documents import TextStream, check_unicode, default_text, document_kind

CHUNK_BYTES = 1 << 20  # read at a time
LONGEST_LINE = 1 << 26  # bytes of a line of a .jsonl file


@dataclasses.dataclass(eq=False)
class SkippedLines:
    """The lines of .jsonl files that hold no document and were left out: by file, their number and the first."""

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


def open_documents(
    args: Iterable[str], field: str = "text", skipped: SkippedLines | None = None
) -> Iterator[tuple[str, str | TextStream]]:
    """Return named documents for the TEXT arguments of the command line; for none of them, the default text.

    An argument is a UTF-8 file, `-` for standard input, a `.jsonl` file (one document in `field` of each line), or
    a dataset `name`, `name:config` or `name:config:split` of the datasets library (split "train" unless said).
    All arguments are opened here, so that a wrong one is found before the work; they are read later, as far as needed.
    With `skipped`, a line of a .jsonl file that holds no document is noted there and left out.

    Raises:
        InputError: for a missing, empty, binary or unreadable file, a broken line, an unknown field or dataset.
    """
    sources = [_open_source(arg, field, skipped) for arg in args]
    return chain.from_iterable(sources) if sources else iter([default_text()])


def _open_source(arg: str, field: str, skipped: SkippedLines | None) -> Iterator[tuple[str, str | TextStream]]:
    if arg == "-":
        return iter([("standard input", TextStream(lambda: _decode(sys.stdin.buffer, "standard input")))])
    if os.path.isdir(arg):
        raise InputError(f"expected a text file; {arg} is a folder: name the files in it")
    if os.path.exists(arg):
        if os.path.isfile(arg) and os.path.getsize(arg) == 0:
            raise InputError(f"expected text; {arg} is empty: give another file")
        if arg.lower().endswith(".jsonl"):
            return _read_json_lines(arg, field, skipped)
        if os.path.isfile(arg):  # a pipe can be read only once, so it is left alone
            next(_read_text(arg), None)
        return iter([(arg, TextStream(lambda: _read_text(arg)))])
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^:]*){0,2}", arg)
    if not is_name or arg.lower().endswith(".jsonl") or mimetypes.guess_type(arg)[0]:
        raise InputError(f"expected a file, '-' or the name of a dataset; there is no file {arg}: check the path")
    return _read_dataset(arg, _open_dataset(arg), field)


# Text files


def _read_text(path: str) -> Iterator[str]:
    try:
        with open(path, "rb") as file:
            yield from _decode(file, path)
    except OSError as error:
        raise InputError(f"expected a file that can be read; {path}: {error.strerror or error}") from error


def _decode(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield the text of a UTF-8 file chunk by chunk, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    while True:
        chunk = file.read(CHUNK_BYTES)
        start = offset - len(decoder.getstate()[0])
        if (nul := chunk.find(b"\0")) >= 0:
            raise InputError(f"expected UTF-8 text; {name} is binary, byte {offset + nul} is zero: convert it to text")
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise InputError(
                f"expected UTF-8 text; {name} has another encoding at byte {start + error.start}: convert it to UTF-8"
            ) from None
        text = text.removeprefix("\ufeff") if start == 0 else text
        offset += len(chunk)
        if text:
            yield text
        if not chunk:
            return


# Lines of JSON


def _read_json_lines(path: str, field: str, skipped: SkippedLines | None) -> Iterator[tuple[str, str]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
                place = f"{path}, line {number}"
                if len(line) > LONGEST_LINE:
                    raise InputError(f"{place}: expected at most {LONGEST_LINE >> 20} MB in a line: split it")
                if not line.strip():
                    continue
                try:
                    document = _text_of(_parse_line(line, place), field, place)
                except InputError:
                    if skipped is None:
                        raise
                    skipped.add(path, number)
                    continue
                yield f"{path}:{number}", document
    except OSError as error:
        raise InputError(f"expected a file that can be read; {path}: {error.strerror or error}") from error


def _parse_line(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place}: expected one JSON object in UTF-8; {error}: mend or remove the line, or leave out broken ones "
            "(--skip-broken)"
        ) from None


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object whose names differ: of two equal ones nobody could say which is meant."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return values


def _text_of(row: Any, field: str, place: str) -> str:
    if not isinstance(row, Mapping):
        raise InputError(f"{place}: expected a JSON object with the field {field!r}; got {document_kind(row)}")
    if field not in row:
        raise InputError(f"{place}: expected the field {field!r}; got {', '.join(map(str, row))}: choose with --field")
    if not isinstance(row[field], str):
        raise InputError(
            f"{place}: expected text in the field {field!r}; got {document_kind(row[field])}: choose with --field"
        )
    check_unicode(row[field], place)
    return row[field]


# Datasets


def _open_dataset(arg: str) -> Iterable[Any]:
    import datasets  # here, for it is slow to import

    name, config, split = [*arg.split(":"), "", ""][:3]
    try:
        return datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # a name that is no dataset, or a broken one, can fail anywhere inside datasets
        reason = first_line(error)
        raise InputError(f"expected a file or a dataset; {arg} is no file, and as a dataset: {reason}") from error


def _read_dataset(arg: str, rows: Iterable[Any], field: str) -> Iterator[tuple[str, str]]:
    from datasets.exceptions import DatasetsError

    try:
        for number, row in enumerate(rows):
            yield f"{arg}#{number}", _text_of(row, field, f"{arg}, row {number}")
    except (OSError, DatasetsError) as error:
        raise InputError(f"expected to read the dataset {arg}; {first_line(error)}: try again") from error
