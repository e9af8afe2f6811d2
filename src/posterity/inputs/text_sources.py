"""What the command line names as text: files, lines of JSON, datasets, standard input; named documents out."""

import codecs
import json
import mimetypes
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, BinaryIO

from posterity.errors import InputError
from posterity.inputs.windows import Stream, check_unicode, default_text, kind

CHUNK = 1 << 20  # bytes read at a time
LINE = 1 << 26  # bytes of the longest line of a .jsonl file


@dataclass(eq=False)
class Skipped:
    """Lines of .jsonl files that hold no document and were left out: their number and the first, by file."""

    lines: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, path: str, number: int) -> None:
        """Count a line."""
        count, first = self.lines.get(path, (0, number))
        self.lines[path] = count + 1, min(first, number)

    @property
    def total(self) -> int:
        """How many, over all files."""
        return sum(count for count, _ in self.lines.values())

    def __str__(self) -> str:
        said = (f"{count} broken of {path} (the first is line {first})" for path, (count, first) in self.lines.items())
        return f"skipped lines: {', '.join(said) or 'none'}"


def documents(
    args: Iterable[str], field: str = "text", skipped: Skipped | None = None
) -> Iterator[tuple[str, str | Stream]]:
    """Return named documents for the TEXT arguments of the command line; for none of them, the default text.

    An argument is a UTF-8 file, `-` for standard input, a `.jsonl` file (one document in `field` of each line), or
    a dataset `name`, `name:config` or `name:config:split` of the datasets library (split "train" unless said).
    All arguments are opened here, so that a wrong one is found before the work; they are read later, as far as needed.
    With `skipped`, a line of a .jsonl file that holds no document is noted there and left out.

    Raises:
        InputError: for a missing, empty, binary or unreadable file, a broken line, an unknown field or dataset.
    """
    opened = [_open(arg, field, skipped) for arg in args]
    return chain.from_iterable(opened) if opened else iter([default_text()])


def _open(arg: str, field: str, skipped: Skipped | None) -> Iterator[tuple[str, str | Stream]]:
    if arg == "-":
        return iter([("standard input", Stream(lambda: _decode(sys.stdin.buffer, "standard input")))])
    if os.path.isdir(arg):
        raise InputError(f"expected a text file; {arg} is a folder: name the files in it")
    if os.path.exists(arg):
        if os.path.isfile(arg) and os.path.getsize(arg) == 0:
            raise InputError(f"expected text; {arg} is empty: give another file")
        if arg.lower().endswith(".jsonl"):
            return _json_lines(arg, field, skipped)
        if os.path.isfile(arg):  # a pipe can be read only once, so it is left alone
            next(_read(arg), None)
        return iter([(arg, Stream(lambda: _read(arg)))])
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^:]*){0,2}", arg)
    if not is_name or arg.lower().endswith(".jsonl") or mimetypes.guess_type(arg)[0]:
        raise InputError(f"expected a file, '-' or the name of a dataset; there is no file {arg}: check the path")
    return _rows(arg, _open_dataset(arg), field)


def _read(path: str) -> Iterator[str]:
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
        chunk = file.read(CHUNK)
        begin = offset - len(decoder.getstate()[0])
        if (nul := chunk.find(b"\0")) >= 0:
            raise InputError(f"expected UTF-8 text; {name} is binary, byte {offset + nul} is zero: convert it to text")
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise InputError(
                f"expected UTF-8 text; {name} has another encoding at byte {begin + error.start}: convert it to UTF-8"
            ) from None
        text = text.removeprefix("\ufeff") if begin == 0 else text
        offset += len(chunk)
        if text:
            yield text
        if not chunk:
            return


def _json_lines(path: str, field: str, skipped: Skipped | None) -> Iterator[tuple[str, str]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE + 1), b""), 1):
                if len(line) > LINE:
                    raise InputError(f"{path}, line {number}: expected at most {LINE >> 20} MB in a line: split it")
                if not line.strip():
                    continue
                try:
                    place = f"{path}, line {number}"
                    document = _field(_parse(line, place), field, place)
                except InputError:
                    if skipped is None:
                        raise
                    skipped.add(path, number)
                    continue
                yield f"{path}:{number}", document
    except OSError as error:
        raise InputError(f"expected a file that can be read; {path}: {error.strerror or error}") from error


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place}: expected one JSON object in UTF-8; {error}: mend or remove the line, or leave out broken ones "
            "(--skip-broken)"
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names differ: of two equal ones nobody could say which is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _field(row: Any, field: str, place: str) -> str:
    if not isinstance(row, Mapping):
        raise InputError(f"{place}: expected a JSON object with the field {field!r}; got {kind(row)}")
    if field not in row:
        raise InputError(f"{place}: expected the field {field!r}; got {', '.join(map(str, row))}: choose with --field")
    if not isinstance(row[field], str):
        raise InputError(f"{place}: expected text in the field {field!r}; got {kind(row[field])}: choose with --field")
    check_unicode(row[field], place)
    return row[field]


def _open_dataset(arg: str) -> Iterable[Any]:
    import datasets

    name, config, split = [*arg.split(":"), "", ""][:3]
    try:
        return datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # a name that is no dataset, or a broken one, can fail anywhere inside datasets
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"expected a file or a dataset; {arg} is no file, and as a dataset: {reason}") from error


def _rows(arg: str, rows: Iterable[Any], field: str) -> Iterator[tuple[str, str]]:
    from datasets.exceptions import DatasetsError

    try:
        for number, row in enumerate(rows):
            yield f"{arg}#{number}", _field(row, field, f"{arg}, row {number}")
    except (OSError, DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"expected to read the dataset {arg}; {reason}: try again") from error
