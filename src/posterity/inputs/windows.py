"""Cut texts or token ids into windows of exactly `context` tokens.

A document is cut into windows that follow one another without overlap; what is left at its end is left out, and no
window spans two documents. Texts are read in order and only as far as the requested number of windows needs.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from posterity.errors import InputError
from posterity.inputs.documents import TokenReader, Tokens, name_documents
from posterity.results.formatting import left_out_text


@dataclass(frozen=True, eq=False)
class Window:
    """One input of the model: `context` token ids, the name of their document, and the window's number in it."""

    ids: Int64[Tensor, "context"]
    text: str
    index: int


@dataclass
class Coverage:
    """How many documents and tokens were read, and how many of these are in no window.

    Tokens are those of the documents; what a tokenizer puts in front of a window is not among them. What was never
    read, because there were windows enough, is not counted.
    """

    documents_read: int = 0
    documents_left_out: int = 0
    tokens_read: int = 0
    tokens_left_out: int = 0
    limit: int | None = None  # windows at which reading ended; None: it went to the end

    def add(self, tokens: int, tokens_left_out: int) -> None:
        """Count a document."""
        self.documents_read += 1
        self.documents_left_out += tokens == tokens_left_out
        self.tokens_read += tokens
        self.tokens_left_out += tokens_left_out

    def attrs(self) -> dict[str, int]:
        """Return the counts as attributes of a result."""
        return {name: int(value) for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        """Return what was left out in one line; "" if nothing was."""
        return left_out_text(self.attrs())


@dataclass(frozen=True, eq=False)
class Corpus:
    """The windows of some documents, and how much of these they cover."""

    windows: list[Window] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)


def cut_windows(documents: Any, tokenizer: Any, context: int, limit: int | None = None) -> list[Window]:
    """Return the windows of `read_corpus`."""
    return read_corpus(documents, tokenizer, context, limit).windows


def read_corpus(documents: Any, tokenizer: Any, context: int, limit: int | None = None) -> Corpus:
    """Cut documents into windows of `context` tokens, at most `limit` of them, in order.

    Args:
        documents: a str; token ids (1-D tensor, array or list; a 2-D batch is one document per row); an iterable of
            these; or pairs `(name, document)`, such as `posterity.inputs.text_sources.open_documents` gives. Token ids
            are taken as they are; with text, every window begins with whatever the tokenizer puts in front of a text
            (such as a BOS token), unless the text itself has it there.
        tokenizer: of transformers; may be None when `documents` holds token ids only.
        context: tokens in a window, at least 2.
        limit: the largest number of windows; None means all.

    Raises:
        InputError: when there is not one full window, or a document is neither text nor token ids.
    """
    _check_count("context", context, 2)
    if limit is not None:
        _check_count("limit", limit, 1)
    corpus, reader, longest = Corpus(), TokenReader(tokenizer), 0
    for name, document in name_documents(documents):
        remaining = None if limit is None else limit - len(corpus.windows)
        tokens = reader.read(name, document, None if remaining is None else remaining * context)
        if len(tokens.prefix) >= context:
            raise InputError(
                f"expected a context above the {len(tokens.prefix)} tokens that begin every text; got {context}"
            )
        end = 0
        for index, (ids, stop) in enumerate(_cut(tokens, context)):
            if index == remaining:
                break
            corpus.windows.append(Window(ids, name, index))
            end = stop
        if len(corpus.windows) == limit:
            corpus.coverage.add(end, 0)
            corpus.coverage.limit = limit
            return corpus
        corpus.coverage.add(len(tokens.ids), len(tokens.ids) - end)
        longest = max(longest, len(tokens.ids) + (0 if tokens.has_prefix(0) else len(tokens.prefix)))
    if not corpus.windows:
        raise InputError(
            f"expected at least one document of {context} tokens; the longest of {corpus.coverage.documents_read} "
            f"given has {longest}: give a longer text or lower the context (--context)"
        )
    return corpus


def token_digest(windows: Iterable[Window]) -> str:
    """Return the SHA-256 (hex) of all token ids (int64, little-endian), each window led by its length."""
    state = hashlib.sha256()
    for window in windows:
        state.update(len(window.ids).to_bytes(8, "little"))
        state.update(window.ids.cpu().numpy().astype("<i8").tobytes())
    return state.hexdigest()


def _check_count(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < minimum:
        raise InputError(f"expected {name} to be a whole number of at least {minimum}; got {value!r}")


def _cut(tokens: Tokens, context: int) -> Iterator[tuple[Int64[Tensor, "context"], int]]:
    """Yield the ids of each full window, and where it ends in the document."""
    prefix, start = torch.tensor(tokens.prefix, dtype=torch.int64), 0
    while True:
        front = prefix[:0] if tokens.has_prefix(start) else prefix
        stop = start + context - len(front)
        if stop > len(tokens.ids):
            return
        yield torch.cat((front, tokens.ids[start:stop])), stop
        start = stop
