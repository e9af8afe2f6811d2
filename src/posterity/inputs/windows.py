"""Cut texts or token ids into windows of exactly `context` tokens.

A document is cut into windows that follow one another without overlap; what is left at its end is dropped, and no
window spans two documents. Texts are read in order and only as far as the requested number of windows needs.
"""

import hashlib
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from posterity.errors import InputError

MARGIN = 64  # tokens dropped before a cut in a text: cutting at white space can change the few tokens before it


@dataclass(frozen=True, eq=False)
class Window:
    """One input of the model: `context` token ids, the name of their document, and the window's number in it."""

    ids: Int64[Tensor, "context"]
    text: str
    index: int


@dataclass(frozen=True, eq=False)
class TextStream:
    """A long text that is read in pieces; each call of `pieces` starts again at its beginning (a pipe cannot)."""

    pieces: Callable[[], Iterator[str]]


def cut_windows(documents: Any, tokenizer: Any, context: int, limit: int | None = None) -> list[Window]:
    """Cut documents into windows of `context` tokens, at most `limit` of them, in order.

    Args:
        documents: a str; token ids (1-D tensor, array or list; a 2-D batch is one document per row); an iterable of
            these; or pairs `(name, document)`, such as `posterity.inputs.text_sources.open_documents` gives. Token ids
            are taken as they are; with text, every window begins with whatever the tokenizer puts in front of a text
            (such as a BOS token).
        tokenizer: of transformers; may be None when `documents` holds token ids only.
        context: tokens in a window, at least 2.
        limit: the largest number of windows; None means all.

    Raises:
        InputError: when there is not one full window, or a document is neither text nor token ids.
    """
    _check_count("context", context, 2)
    if limit is not None:
        _check_count("limit", limit, 1)
    windows: list[Window] = []
    count = longest = 0
    special_tokens: list[int] | None = None
    for name, document in name_documents(documents):
        is_text = isinstance(document, str | TextStream)
        if is_text and special_tokens is None:
            special_tokens = _special_prefix(tokenizer, context)
        prefix = (special_tokens or []) if is_text else []
        body = context - len(prefix)
        size = None if limit is None else (limit - len(windows)) * body
        ids = _text_ids(name, document, tokenizer, size) if is_text else _check_ids(name, document, size)
        windows += [Window(row, name, index) for index, row in enumerate(_cut_ids(ids, prefix, body))]
        count, longest = count + 1, max(longest, len(ids) + len(prefix))
        if len(windows) == limit:
            return windows
    if not windows:
        raise InputError(
            f"expected at least one document of {context} tokens; the longest of {count} given has {longest}: "
            "give a longer text or lower the context (--context)"
        )
    return windows


def document_ids(document: Any, tokenizer: Any) -> Int64[Tensor, "tokens"]:
    """Return all token ids of one document; those of a text begin with the tokenizer's special tokens."""
    if not isinstance(document, str):
        return _check_ids("the text", document, None)
    prefix = torch.tensor(_special_prefix(tokenizer, sys.maxsize), dtype=torch.int64)
    return torch.cat((prefix, _text_ids("the text", document, tokenizer, None)))


def token_digest(windows: Iterable[Window]) -> str:
    """Return the SHA-256 (hex) of all token ids (int64, little-endian), each window led by its length."""
    state = hashlib.sha256()
    for window in windows:
        state.update(len(window.ids).to_bytes(8, "little"))
        state.update(window.ids.cpu().numpy().astype("<i8").tobytes())
    return state.hexdigest()


def default_text() -> tuple[str, str]:
    """Return name and text of the default: the language topics of Python's own help, real English and Python."""
    from pydoc_data.topics import topics  # here, for it is slow to import

    return f"pydoc topics of Python {platform.python_version()}", "\n\n".join(topics[key] for key in sorted(topics))


def _check_count(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < minimum:
        raise InputError(f"expected {name} to be a whole number of at least {minimum}; got {value!r}")


# Documents: the forms a caller may pass


def name_documents(documents: Any) -> Iterator[tuple[str, Any]]:
    """Yield `(name, document)` for every document; one without a name is `document N`, a single text is `text`."""
    if isinstance(documents, str | TextStream):
        documents = [("text", documents)]
    elif isinstance(documents, Tensor | np.ndarray):
        documents = [documents] if documents.ndim < 2 else documents
    elif isinstance(documents, bytes | Mapping) or not isinstance(documents, Iterable):
        raise InputError(
            f"expected text or token ids; got {document_kind(documents)}: pass a str, token ids, or a list of them"
        )
    items = iter(documents)
    first = list(islice(items, 1))
    if not first:
        raise InputError("expected at least one document; got none: give a text or token ids")
    items = chain(first, items)
    if _is_token_id(first[0]):
        items = iter([list(items)])
    for number, item in enumerate(items):
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
            yield item[0], item[1]
        else:
            yield f"document {number}", item


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int | float | np.number) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)


def document_kind(value: Any) -> str:
    """Return the type of a value, and a mapping's fields, for messages."""
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the fields {', '.join(map(str, value))}"
    return type(value).__name__


def _check_ids(name: str, document: Any, size: int | None) -> Int64[Tensor, "tokens"]:
    """Check token ids and return the first `size` of them."""
    if not isinstance(document, Tensor | np.ndarray | list | tuple | range):
        raise InputError(f"{name}: expected text or token ids; got {document_kind(document)}")
    if isinstance(document, Tensor | np.ndarray) and document.ndim != 1:
        raise InputError(f"{name}: expected token ids in one dimension; got the shape {tuple(document.shape)}")
    values = document[:size]
    try:
        ids = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
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


def _cut_ids(ids: Int64[Tensor, "tokens"], prefix: list[int], body: int) -> Iterator[Int64[Tensor, "context"]]:
    head = torch.tensor(prefix, dtype=torch.int64)
    for start in range(0, len(ids) - body + 1, body):
        yield torch.cat([head, ids[start : start + body]])


# Text to tokens


def _special_prefix(tokenizer: Any, context: int) -> list[int]:
    """Return the special tokens that the tokenizer puts in front of a text; those after it are not used."""
    if not callable(tokenizer):
        raise InputError(f"expected a tokenizer of transformers to read text; got {document_kind(tokenizer)}")
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


def _text_ids(name: str, document: str | TextStream, tokenizer: Any, size: int | None) -> Int64[Tensor, "tokens"]:
    """Return the first `size` tokens of a text, all for None, and read little more text than that takes.

    The tokens of a text's beginning are the beginning of its tokens, but for a few at the cut, which are dropped.
    """
    pieces = iter([document]) if isinstance(document, str) else document.pieces()
    text, length = "", sys.maxsize if size is None else 6 * (size + MARGIN)
    while True:
        text, is_complete = _extend_text(text, pieces, length)
        head = text if is_complete else text[: _cut_position(text, length)]
        check_unicode(head, name)
        ids = _encode(tokenizer, head) if head else []
        if is_complete or (size is not None and len(ids) >= size + MARGIN):
            return torch.tensor(ids[:size], dtype=torch.int64)
        length *= 2


def check_unicode(text: str, place: str) -> None:
    """Raise InputError if a text cannot be written in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: expected Unicode text; character {error.start} is half of a pair") from None


def _extend_text(text: str, pieces: Iterator[str], length: int) -> tuple[str, bool]:
    """Append pieces to a text until it has `length` characters; also return True if there are no more pieces."""
    parts, total = [text], len(text)
    while total < length:
        piece = next(pieces, None)
        if piece is None:
            return "".join(parts), True
        parts.append(piece)
        total += len(piece)
    return "".join(parts), False


def _cut_position(text: str, length: int) -> int:
    """Return where to cut: at the last white space before `length`, or at `length` if there is none near."""
    low = max(0, length - 1000)
    position = max(text.rfind(" ", low, length), text.rfind("\n", low, length))
    return length if position < 0 else position
