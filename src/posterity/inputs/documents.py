"""Documents in the forms that a caller may pass, and their tokens: texts, streams of text, conversations, token ids."""

import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from posterity.errors import InputError
from posterity.inputs.conversations import Completion, Conversation, answer_tokens
from posterity.inputs.tokenization import encode_text, special_prefix

MARGIN = 64  # tokens dropped before a cut in a text: cutting at white space can change the few tokens before it


@dataclass(frozen=True, eq=False)
class TextStream:
    """A long text that is read in pieces; each call of `pieces` starts again at its beginning (a pipe cannot)."""

    pieces: Callable[[], Iterator[str]]


def default_text() -> tuple[str, str]:
    """Return name and text of the default: the language topics of Python's own help, real English and Python."""
    from pydoc_data.topics import topics  # here, for it is slow to import

    return f"pydoc topics of Python {platform.python_version()}", "\n\n".join(topics[key] for key in sorted(topics))


def document_kind(value: Any) -> str:
    """Return the type of a value, and a mapping's fields, for messages."""
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the fields {', '.join(map(str, value))}"
    return type(value).__name__


def check_ids(name: str, document: Any, size: int | None = None) -> Int64[Tensor, "tokens"]:
    """Check token ids and return the first `size` of them."""
    if not isinstance(document, Tensor | np.ndarray | list | tuple | range):
        advice = ": call the field text, input_ids or messages" if isinstance(document, Mapping) else ""
        raise InputError(f"{name}: expected text or token ids; got {document_kind(document)}{advice}")
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


# Tokens


@dataclass(frozen=True, eq=False)
class Tokens:
    """The token ids of a document as it stands, and what belongs in front of its windows, which it may have itself."""

    ids: Int64[Tensor, "tokens"]
    prefix: list[int]
    answers: Bool[Tensor, "tokens"] | None = None  # the tokens whose prediction is asked for; None: all

    def has_prefix(self, start: int) -> bool:
        """Return whether the tokens from `start` on are the prefix already."""
        return self.ids[start : start + len(self.prefix)].tolist() == self.prefix

    def front(self, start: int) -> Int64[Tensor, "prefix"]:
        """Return what belongs in front of a window that begins at `start`: the prefix, unless it is there."""
        return self.ids.new_tensor([] if self.has_prefix(start) else self.prefix)


@dataclass
class TokenReader:
    """Turns documents into tokens, with one tokenizer; it is asked only for texts."""

    tokenizer: Any

    def read(self, name: str, document: Any, size: int | None = None) -> Tokens:
        """Return the first `size` tokens of a document, all for None."""
        if isinstance(document, Conversation | Completion):
            return self._read_answers(name, document)
        if isinstance(document, Tokens):
            return replace(document, ids=check_ids(name, document.ids))
        if not isinstance(document, str | TextStream):
            return Tokens(check_ids(name, document, size), [])
        prefix = self.prefix  # refuses what is no tokenizer
        return Tokens(_text_ids(name, document, self.tokenizer, size), prefix)

    def _read_answers(self, name: str, document: Conversation | Completion) -> Tokens:
        """Return all tokens of a conversation; what begins it is up to the chat template."""
        prefix = self.prefix
        ids, answers = answer_tokens(document, self.tokenizer, name)
        tokens = Tokens(torch.tensor(ids, dtype=torch.int64), prefix, torch.tensor(answers, dtype=torch.bool))
        return tokens if isinstance(document, Completion) or tokens.has_prefix(0) else replace(tokens, prefix=[])

    @cached_property
    def prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts in front of a text."""
        return special_prefix(self.tokenizer)


def document_ids(document: Any, tokenizer: Any) -> Int64[Tensor, "tokens"]:
    """Return all token ids of one document; those of a text begin with the tokenizer's special tokens, once."""
    refuse_answers("the text", document)
    tokens = TokenReader(tokenizer).read("the text", document)
    return torch.cat((tokens.front(0), tokens.ids))


def refuse_answers(name: str, document: Any) -> None:
    """Raise InputError for a document whose loss is on some of its tokens only."""
    refuse_conversation(name, document)
    if isinstance(document, Tokens) and document.answers is not None:
        raise InputError(
            f"{name}: expected token ids; got labels with -100, whose loss is on the other tokens only, which only "
            "`measure` takes: leave the labels out"
        )


def refuse_conversation(name: str, document: Any) -> None:
    """Raise InputError for a document whose loss is on its answers only."""
    if isinstance(document, Conversation | Completion):
        raise InputError(
            f"{name}: expected text or token ids; got a conversation, whose loss is on its answers only, which only "
            "`measure` takes: name a field that holds text (--field)"
        )


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
        ids = encode_text(tokenizer, head) if head else []
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
