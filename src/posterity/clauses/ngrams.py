"""Recurring n-grams of a text: the same tokens with several different futures."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def recurring_ngrams(
    documents: list[Tensor], length: int, future: int, most: int, draws: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Find the n-grams that have the most different futures, each future counted once: copies of text are none.

    Occurrences of one n-gram stand apart by its length and that of a future, and n-grams that overlap with a selected
    one are left out, so that no piece of text counts twice. Among equals, and of more than `draws` futures, chance
    decides.

    Args:
        documents: Token ids of each, (position,).
        length: Tokens of an n-gram.
        future: Tokens of a future.
        most: How many n-grams.
        draws: How many futures of one n-gram.
        generator: Decides among equals.

    Returns:
        At most `most` pairs: the n-gram, (length,), and two or more futures, (occurrence, future).
    """
    ngrams: list[tuple[Tensor, Tensor]] = []
    text, starts = _join(documents, length + future)
    used = np.zeros(len(text), dtype=bool)
    for candidates in _occurrences(text, starts, length, future, generator):
        occurrences = [candidates[0]]
        for start in candidates[1:]:
            if start >= occurrences[-1] + length + future:
                occurrences.append(start)
        positions = np.add.outer(occurrences, np.arange(length))
        if len(occurrences) < 2 or used[positions].any():
            continue
        used[positions] = True
        order = torch.randperm(len(occurrences), generator=generator)[:draws].tolist()
        ends = [occurrences[index] + length for index in order]
        futures = np.stack([text[end : end + future] for end in ends])
        ngram = text[occurrences[0] : occurrences[0] + length].copy()
        ngrams.append((torch.from_numpy(ngram), torch.from_numpy(futures)))
        if len(ngrams) == most:
            break
    return ngrams


def _join(documents: list[Tensor], span: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all tokens in a row, and every start of `span` tokens that lie in one document."""
    ends = np.cumsum([len(document) for document in documents])
    starts = [np.arange(end - len(document), end - span + 1) for document, end in zip(documents, ends, strict=True)]
    return torch.cat(documents).numpy(), np.concatenate(starts)


def _occurrences(
    text: np.ndarray, starts: np.ndarray, length: int, future: int, generator: torch.Generator
) -> Iterator[np.ndarray]:
    """Yield, for each n-gram with several futures, the first start of each future, in order; most futures first."""
    if not len(starts):
        return
    spans = np.lib.stride_tricks.sliding_window_view(text, length + future)[starts]
    starts = starts[np.sort(np.unique(spans, axis=0, return_index=True)[1])]
    ngrams = np.lib.stride_tricks.sliding_window_view(text, length)[starts]
    _, number, counts = np.unique(ngrams, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(number, kind="stable")
    bounds = np.concatenate(([0], np.cumsum(counts)))
    recurring = np.flatnonzero(counts > 1)
    recurring = recurring[torch.randperm(len(recurring), generator=generator).numpy()]
    for index in recurring[np.argsort(-counts[recurring], kind="stable")]:
        yield starts[order[bounds[index] : bounds[index + 1]]]
