"""Text, files, datasets or token ids in; windows of exactly `context` tokens out.

A document is cut into windows that follow one another without overlap; what is left at its end is dropped, and no
window spans two documents. Sources are read in order and only as far as the wanted number of windows needs.
"""

import codecs
import hashlib
import json
import mimetypes
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from posterity.errors import InputError

CHUNK = 1 << 20  # bytes read at a time
LINE = 1 << 26  # bytes of the longest line of a .jsonl file
# Cutting a text at white space can change the few tokens before the cut; so many are thrown away to be sure.
MARGIN = 64


@dataclass(frozen=True, eq=False)
class Window:
    """One input of the model: `context` token ids, where they came from, and the number of the window there."""

    ids: Int64[Tensor, "context"]
    text: str
    index: int


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


@dataclass(frozen=True, eq=False)
class Stream:
    """A long text that is read in pieces; each call of `pieces` starts again at its beginning (a pipe cannot)."""

    pieces: Callable[[], Iterator[str]]


def windows(documents: Any, tokenizer: Any, context: int, limit: int | None = None) -> list[Window]:
    """Cut documents into windows of `context` tokens, at most `limit` of them, in order.

    Args:
        documents: a str; token ids (1-D tensor, array or list; a 2-D batch is one document per row); an iterable of
            these; or named sources, pairs `(name, document)` as `sources` gives them. Token ids are taken as they are;
            with text, every window begins with whatever the tokenizer puts in front of a text (such as a BOS token).
        tokenizer: of transformers; may be None when `documents` holds token ids only.
        context: tokens in a window, at least 2.
        limit: the largest number of windows; None means all.

    Raises:
        InputError: when there is not one whole window, or a document is neither text nor token ids.
    """
    _check_count("context", context, 2)
    if limit is not None:
        _check_count("limit", limit, 1)
    found: list[Window] = []
    seen = longest = 0
    first_tokens: list[int] | None = None
    for name, document in named(documents):
        is_text = isinstance(document, str | Stream)
        if is_text and first_tokens is None:
            first_tokens = _prefix(tokenizer, context)
        prefix = (first_tokens or []) if is_text else []
        body = context - len(prefix)
        wanted = None if limit is None else (limit - len(found)) * body
        ids = _text_ids(name, document, tokenizer, wanted) if is_text else _given_ids(name, document, wanted)
        found += [Window(row, name, index) for index, row in enumerate(_cut(ids, prefix, body))]
        seen, longest = seen + 1, max(longest, len(ids) + len(prefix))
        if len(found) == limit:
            return found
    if not found:
        raise InputError(
            f"expected at least one document of {context} tokens; the longest of {seen} given has {longest}: "
            "give a longer text or lower the context (--context)"
        )
    return found


def whole(document: Any, tokenizer: Any) -> Int64[Tensor, "tokens"]:
    """One text (or its token ids) in full, behind the tokens with which the tokenizer begins every text."""
    if not isinstance(document, str):
        return _given_ids("the text", document, None)
    prefix = torch.tensor(_prefix(tokenizer, sys.maxsize), dtype=torch.int64)
    return torch.cat((prefix, _text_ids("the text", document, tokenizer, None)))


def digest(windows: Iterable[Window]) -> str:
    """Return the SHA-256 (hex) of all token ids (int64, little-endian), each window led by its length."""
    state = hashlib.sha256()
    for window in windows:
        state.update(len(window.ids).to_bytes(8, "little"))
        state.update(window.ids.cpu().numpy().astype("<i8").tobytes())
    return state.hexdigest()


def default_text() -> tuple[str, str]:
    """Return name and text of the default: the language topics of Python's own help, real English and Python."""
    from pydoc_data.topics import topics

    return f"pydoc topics of Python {platform.python_version()}", "\n\n".join(topics[key] for key in sorted(topics))


def sources(
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


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise InputError(f"expected {name} to be a whole number of at least {least}; got {value!r}")


# Documents: what the caller may hand over


def named(documents: Any) -> Iterator[tuple[str, Any]]:
    """Give every document a name."""
    if isinstance(documents, str | Stream):
        documents = [("text", documents)]
    elif isinstance(documents, Tensor | np.ndarray):
        documents = [documents] if documents.ndim < 2 else documents
    elif isinstance(documents, bytes | Mapping) or not isinstance(documents, Iterable):
        raise InputError(
            f"expected text or token ids; got {_kind(documents)}: pass a str, token ids, or a list of them"
        )
    items = iter(documents)
    first = list(islice(items, 1))
    if not first:
        raise InputError("expected at least one document; got none: give a text or token ids")
    items = chain(first, items)
    if _is_id(first[0]):
        items = iter([list(items)])
    for number, item in enumerate(items):
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
            yield item[0], item[1]
        else:
            yield f"document {number}", item


def _is_id(value: Any) -> bool:
    return isinstance(value, int | float | np.number) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the fields {', '.join(map(str, value))}"
    return type(value).__name__


def _given_ids(name: str, document: Any, wanted: int | None) -> Int64[Tensor, "tokens"]:
    """Check token ids and return the first `wanted` of them."""
    if not isinstance(document, Tensor | np.ndarray | list | tuple | range):
        raise InputError(f"{name}: expected text or token ids; got {_kind(document)}")
    if isinstance(document, Tensor | np.ndarray) and document.ndim != 1:
        raise InputError(f"{name}: expected token ids in one dimension; got the shape {tuple(document.shape)}")
    part = document[:wanted]
    try:
        ids = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
    except (TypeError, ValueError):
        raise InputError(f"{name}: expected token ids, whole numbers in one dimension; got other values") from None
    if len(ids) == 0:
        return torch.zeros(0, dtype=torch.int64)
    if ids.ndim != 1 or ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise InputError(
            f"{name}: expected token ids, whole numbers in one dimension; got {ids.dtype} {tuple(ids.shape)}"
        )
    ids = ids.detach().to("cpu", torch.int64)
    if ids.min() < 0:
        raise InputError(f"{name}: expected token ids of at least 0; got {int(ids.min())}: leave padding out")
    return ids


def _cut(ids: Int64[Tensor, "tokens"], prefix: list[int], body: int) -> Iterator[Int64[Tensor, "context"]]:
    head = torch.tensor(prefix, dtype=torch.int64)
    for start in range(0, len(ids) - body + 1, body):
        yield torch.cat([head, ids[start : start + body]])


# Text to tokens


def _prefix(tokenizer: Any, context: int) -> list[int]:
    """Return the special tokens that the tokenizer puts in front of a text; those after it are not used."""
    if not callable(tokenizer):
        raise InputError(f"expected a tokenizer of transformers to read text; got {_kind(tokenizer)}")
    probe = "a"
    bare, full = _encode(tokenizer, probe), _encode(tokenizer, probe, special=True)
    starts = [start for start in range(len(full) - len(bare) + 1) if full[start : start + len(bare)] == bare]
    prefix = full[: starts[0]] if starts else []
    if len(prefix) >= context:
        raise InputError(f"expected a context above the {len(prefix)} tokens that begin every text; got {context}")
    return prefix


def _encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    # verbose=False: no warning about a text longer than the model's limit, for it is cut into windows afterwards.
    return tokenizer(text, add_special_tokens=special, return_attention_mask=False, truncation=False, verbose=False)[
        "input_ids"
    ]


def _text_ids(name: str, document: str | Stream, tokenizer: Any, wanted: int | None) -> Int64[Tensor, "tokens"]:
    """Return the first `wanted` tokens of a text, all for None, and read little more text than that takes.

    The tokens of a beginning of the text are those of the whole but for a few at its end, which are dropped.
    """
    pieces = iter([document]) if isinstance(document, str) else document.pieces()
    text, size = "", sys.maxsize if wanted is None else 6 * (wanted + MARGIN)
    while True:
        text, whole = _grow(text, pieces, size)
        head = text if whole else text[: _edge(text, size)]
        _check_unicode(head, name)
        ids = _encode(tokenizer, head) if head else []
        if whole or (wanted is not None and len(ids) >= wanted + MARGIN):
            return torch.tensor(ids[:wanted], dtype=torch.int64)
        size *= 2


def _check_unicode(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: expected Unicode text; character {error.start} is half of a pair") from None


def _grow(text: str, pieces: Iterator[str], size: int) -> tuple[str, bool]:
    """Return the text with as many pieces behind it as make it `size` long, and whether the pieces have ended."""
    held, length = [text], len(text)
    while length < size:
        piece = next(pieces, None)
        if piece is None:
            return "".join(held), True
        held.append(piece)
        length += len(piece)
    return "".join(held), False


def _edge(text: str, size: int) -> int:
    """Return where to cut: at the last white space before `size`, or at `size` if there is none near."""
    low = max(0, size - 1000)
    edge = max(text.rfind(" ", low, size), text.rfind("\n", low, size))
    return size if edge < 0 else edge


# Command-line arguments to documents


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
        raise InputError(f"{place}: expected a JSON object with the field {field!r}; got {_kind(row)}")
    if field not in row:
        raise InputError(f"{place}: expected the field {field!r}; got {', '.join(map(str, row))}: choose with --field")
    if not isinstance(row[field], str):
        raise InputError(f"{place}: expected text in the field {field!r}; got {_kind(row[field])}: choose with --field")
    _check_unicode(row[field], place)
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
