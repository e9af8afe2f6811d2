"""Cut texts or token ids into windows of exactly `context` tokens; pack short documents into windows of at most that.

A document is cut into windows that follow one another without overlap; what is left at its end is left out, and no
window spans two documents unless they are packed. Texts are read in order and only as far as the requested number of
windows needs.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from posterity.errors import InputError
from posterity.inputs.documents import TokenReader, Tokens, refuse_conversation
from posterity.inputs.named_documents import name_documents
from posterity.inputs.packing import SHORTEST, PackedRows, document_numbers
from posterity.results.formatting import left_out_text


@dataclass(frozen=True, eq=False)
class Window:
    """One input of the model: token ids, the name of their document, and the window's number in it.

    Attributes:
        answers: The tokens whose prediction has a loss; None: all.
        added: How many of its tokens the tokenizer has put in front.
        lengths: Tokens of each document, if several are packed into the window, which is named after the first.
    """

    ids: Int64[Tensor, "context"]
    text: str
    index: int
    answers: Bool[Tensor, "context"] | None = None
    added: int = 0
    lengths: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Tokens."""
        return len(self.ids)

    @property
    def has_loss(self) -> bool:
        """Whether any token is predicted whose prediction counts."""
        return self.size >= SHORTEST and (self.answers is None or bool(self.answers[1:].any()))

    @classmethod
    def pack(cls, windows: "Sequence[Window]") -> "Window":
        """Join windows of several documents; one alone stays what it is."""
        if len(windows) == 1:
            return windows[0]
        answers = None
        if any(window.answers is not None for window in windows):
            marks = (torch.ones(x.size, dtype=torch.bool) if x.answers is None else x.answers for x in windows)
            answers = torch.cat(list(marks))
        return cls(
            torch.cat([window.ids for window in windows]), f"{windows[0].text} and {len(windows) - 1} more",
            windows[0].index, answers, sum(window.added for window in windows), tuple(x.size for x in windows),
        )  # fmt: skip


@dataclass(frozen=True)
class Coverage:
    """How many documents and tokens were read, and how many of these are in no window.

    Tokens are those of the documents; what a tokenizer puts in front of a window is not among them. What is in no
    window because there were windows enough is not counted.
    """

    documents_read: int = 0
    documents_left_out: int = 0
    tokens_read: int = 0
    tokens_left_out: int = 0
    windows_without_answers: int = 0  # left out too
    limit: int | None = None  # windows at which reading ended; None: it went to the end

    def attrs(self) -> dict[str, int]:
        """Return the counts as attributes of a result."""
        return {name: int(value) for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        """Return what was left out in one line; "" if nothing was."""
        return left_out_text(self.attrs())


@dataclass(frozen=True, eq=False)
class Corpus:
    """The windows of some documents, and how much of these they cover."""

    windows: list[Window]
    coverage: Coverage


def cut_windows(documents: Any, tokenizer: Any, context: int, limit: int | None = None) -> list[Window]:
    """Return the windows of `read_corpus`."""
    return read_corpus(documents, tokenizer, context, limit).windows


def read_corpus(
    documents: Any,
    tokenizer: Any,
    context: int,
    limit: int | None = None,
    *,
    pack: bool = False,
    conversations: bool = False,
) -> Corpus:
    """Cut documents into windows of `context` tokens, at most `limit` of them, in order.

    Args:
        documents: a str; token ids (1-D tensor, array or list; a 2-D batch is one document per row); an iterable of
            these; rows of a data set; pairs `(name, document)`; a mapping of labels to documents; files; None for the
            default text (`posterity.inputs.named_documents`). Token ids are taken as they are; with text, every window
            begins with whatever the tokenizer puts in front of a text (such as a BOS token), unless the text itself
            has it there.
        tokenizer: of transformers; may be None when `documents` holds token ids only.
        context: tokens in a window, at least 2.
        limit: the largest number of windows; None means all.
        pack: whether to put documents shorter than the context into windows too, several in one
            (`posterity.inputs.packing`); such a window may have fewer tokens. Longer ones are cut as without.
        conversations: whether a document may be a conversation, or a row of a data set that holds one
            (`posterity.inputs.conversations`); the loss is then on its answers, and a window without any is left out.

    Raises:
        InputError: when there is no window, or a document is neither text nor token ids.
    """
    _check_count("context", context, 2)
    if limit is not None:
        _check_count("limit", limit, 1)
    reader, rows, left_out = TokenReader(tokenizer), PackedRows[Window](context, limit, pack), _LeftOut()
    for number, (name, document) in enumerate(name_documents(documents)):
        if not conversations:
            refuse_conversation(name, document)
        tokens = reader.read(name, document, None if rows.missing is None else rows.missing * context)
        if len(tokens.prefix) >= context:
            raise InputError(
                f"expected a context above the {len(tokens.prefix)} tokens that begin every text; got {context}"
            )
        rest = len(tokens.ids)
        for window in _cut(name, tokens, context, pack):
            rest -= window.size - window.added
            if window.has_loss:
                rows.add(number, window)
            else:
                left_out.add(number, window.size - window.added, without_answers=window.answers is not None)
            if rows.are_complete:
                break
        if rows.are_complete:
            break
        left_out.add(number, rest)
        left_out.longest = max(left_out.longest, len(tokens.ids) + len(tokens.front(0)))
    if not rows.rows:
        advice = ", or pack them: pack=True (--pack)" if conversations and not pack else ""
        raise InputError(left_out.reason(context, pack, advice))
    windows = [Window.pack([window for _, window in row]) for row in rows.rows[:limit]]
    return Corpus(windows, left_out.coverage(rows))


def read_whole_documents(
    documents: Any, tokenizer: Any, context: int, limit: int | None = None
) -> list[tuple[str, list[Window], int]]:
    """Cut each document into windows of `context` tokens by itself; a shorter document is one window.

    Args:
        documents, tokenizer, context: As in `read_corpus`, conversations too.
        limit: The largest number of documents; None means all.

    Returns:
        Name, windows, and tokens in no window, of each document that has a window with a loss.

    Raises:
        InputError: No document has one; a document is neither text nor token ids.
    """
    _check_count("context", context, 2)
    reader, rows = TokenReader(tokenizer), []
    for name, document in islice(name_documents(documents), limit):
        tokens = reader.read(name, document)
        windows = [window for window in _cut(name, tokens, context, pack=True) if window.has_loss]
        if windows:
            rows.append((name, windows, len(tokens.ids) - sum(window.size - window.added for window in windows)))
    if not rows:
        raise InputError(f"expected a document of at least {SHORTEST} tokens with a loss; got none: give other texts")
    return rows


def token_digest(windows: Iterable[Window]) -> str:
    """Return the SHA-256 (hex) of all token ids (int64, little-endian), each window led by its length.

    Where a window has them, its answers and the lengths of its documents follow.
    """
    state = hashlib.sha256()
    for window in windows:
        state.update(len(window.ids).to_bytes(8, "little"))
        state.update(window.ids.cpu().numpy().astype("<i8").tobytes())
        if window.answers is not None:
            state.update(b"answers" + window.answers.numpy().tobytes())
        if window.lengths:
            state.update(f"documents {window.lengths}".encode())
    return state.hexdigest()


def _check_count(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < minimum:
        raise InputError(f"expected {name} to be a whole number of at least {minimum}; got {value!r}")


def _cut(name: str, tokens: Tokens, context: int, pack: bool) -> Iterator[Window]:
    """Yield the full windows of a document; with `pack` also the only one of a document that is shorter."""
    start = index = 0
    while start < len(tokens.ids):
        front = tokens.front(start)
        stop = start + context - len(front)
        if stop > len(tokens.ids):
            if not pack or start > 0 or len(front) + len(tokens.ids) < SHORTEST:
                return
            stop = len(tokens.ids)
        answers = tokens.answers
        if answers is not None:
            answers = torch.cat((answers.new_zeros(len(front)), answers[start:stop]))
        yield Window(torch.cat((front, tokens.ids[start:stop])), name, index, answers, len(front))
        start, index = stop, index + 1


@dataclass(eq=False)
class _LeftOut:
    """The parts of documents that are in no window, by number of the document."""

    parts: list[tuple[int, int, bool]] = field(default_factory=list)
    longest: int = 0  # tokens of a document, with what belongs in front

    def add(self, number: int, tokens: int, without_answers: bool = False) -> None:
        """Note a part of a document, which may be empty."""
        self.parts.append((number, tokens, without_answers))

    def reason(self, context: int, pack: bool, advice: str) -> str:
        """Say why there is no window at all."""
        count = len({number for number, _, _ in self.parts})
        if any(without_answers for _, _, without_answers in self.parts):
            return (
                f"expected an answer in at least one window of {context} tokens; the {count} conversations given have "
                "none: raise `context` (--context) or give other conversations"
            )
        least = SHORTEST if pack else context
        return (
            f"expected at least one document of {least} tokens; the longest of {count} given has {self.longest}: "
            f"give a longer text, or lower `context` (--context){advice}"
        )

    def coverage(self, rows: PackedRows[Window]) -> Coverage:
        """Count what is in the rows that were asked for, and what was left out before the last of their documents."""
        measured = rows.rows[: rows.limit]
        used, parts = document_numbers(measured), self.parts
        if rows.are_complete:
            unused = document_numbers(rows.rows[rows.limit :])
            parts = [part for part in parts if part[0] <= max(used) and part[0] not in unused]
        numbers = {number for number, _, _ in parts} | used
        tokens = sum(window.size - window.added for row in measured for _, window in row)
        tokens_left_out = sum(count for _, count, _ in parts)
        return Coverage(
            len(numbers), len(numbers - used), tokens + tokens_left_out, tokens_left_out,
            sum(without_answers for _, _, without_answers in parts), rows.limit if rows.are_complete else None,
        )  # fmt: skip
