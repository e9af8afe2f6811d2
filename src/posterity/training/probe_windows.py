"""The windows that a Monitor measures: of documents, or of the Trainer's evaluation rows, or of its training rows."""

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer

from posterity.errors import InputError
from posterity.inputs.documents import Tokens, document_kind
from posterity.inputs.named_documents import name_documents
from posterity.inputs.windows import Corpus, read_corpus
from posterity.models.language_model import seed_rng

CONTEXT = 128  # tokens of a window, unless rows are shorter
ROWS = 64  # that are read at most to choose the context
IGNORED = -100  # the label of a token whose prediction has no loss, in torch and transformers


def probe_corpus(trainer: Trainer, documents: Any, tokenizer: Any, context: int | None, limit: int) -> Corpus:
    """Cut the probe into windows.

    Args:
        trainer: Whose rows are the probe if `documents` is None.
        documents: As in `posterity.measure`, but no conversations.
        tokenizer: For texts.
        context: Tokens of a window; by default that which `choose_context` returns.
        limit: The largest number of windows.

    Raises:
        InputError: The Trainer has no rows of tokens or text; as `read_corpus`.
    """
    with seed_rng(0):  # rows may be drawn at random
        named = name_documents(trainer_rows(trainer) if documents is None else documents)
        head = list(islice(named, ROWS))
        context = context or choose_context([document for _, document in head], limit)
        return read_corpus(chain(head, named), tokenizer, context, limit)


def trainer_rows(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """Yield name and document of the first rows that the Trainer evaluates on, else of those that it trains on.

    Raises:
        InputError: It has neither, or they hold neither token ids nor text.
    """
    evaluation = trainer.eval_dataset
    if isinstance(evaluation, Mapping):  # several sets by name: the first
        evaluation = next(iter(evaluation.values()), None)
    kind = "training" if evaluation is None else "evaluation"
    rows: Any = trainer.train_dataset if evaluation is None else evaluation
    if rows is None:
        raise InputError("Monitor expects a Trainer with rows to measure; this one has none: pass documents=...")
    for number, row in enumerate(islice(iter(rows), ROWS)):
        if not isinstance(row, Mapping) or not {"input_ids", "text"} & set(row):
            raise InputError(
                f"Monitor expects the {kind} rows of the Trainer to hold input_ids or text; got "
                f"{document_kind(row)}: pass documents=..."
            )
        yield f"{kind} row {number}", row_tokens(row) if "input_ids" in row else row


def row_tokens(row: Mapping[str, Any]) -> Tokens:
    """Return the token ids of a row without its padding; labels of -100 mark tokens whose prediction has no loss."""
    ids = torch.as_tensor(row["input_ids"])
    real = torch.as_tensor(row.get("attention_mask", torch.ones_like(ids))).bool()
    labels = row.get("labels")
    answers = None if labels is None else (torch.as_tensor(labels) != IGNORED)[real]
    return Tokens(ids[real], [], None if answers is None or answers.all() else answers)


def choose_context(documents: list[Any], limit: int) -> int:
    """Return the length of windows, 128 or as short as a row of token ids, with which `limit` windows hold most tokens.

    It is 128 where a document is text.
    """
    counts = [count for document in documents if (count := _token_count(document)) is not None]
    if len(counts) < len(documents):
        return CONTEXT
    contexts = sorted({min(count, CONTEXT) for count in counts if count >= 2}, reverse=True)
    return max(contexts, key=lambda context: context * min(limit, sum(n // context for n in counts)), default=CONTEXT)


def _token_count(document: Any) -> int | None:
    """Return the number of token ids; None for anything else, which `read_corpus` reads or refuses."""
    if isinstance(document, Tokens):
        return len(document.ids)
    return len(document) if isinstance(document, Tensor | np.ndarray | list | tuple | range) else None
