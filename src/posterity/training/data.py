"""The rows of a training run: a built-in task's, or windows of text, to train on and to judge by."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from posterity.inputs import text_sources as sources
from posterity.inputs import windows as corpus
from posterity.training.settings import Settings

HELD_OUT = 0.1  # every tenth of many texts; of few texts the end of each
HELD_OUT_ROWS = 512  # of a task
HELD_OUT_SEED = 1_000_003  # the same rows for all runs of a task
VOCABULARY = 1024  # of the tokenizer made for a model from scratch


@dataclass(frozen=True)
class Data:
    """Rows to train on and rows to judge by: `input_ids` and `labels` each."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    vocabulary: int
    context: int
    tokenizer: Any = None
    skipped: sources.Skipped | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of all rows."""
        state = hashlib.sha256()
        for rows in (*self.train, *self.held_out):
            state.update(str((rows.dtype, rows.shape)).encode())
            state.update(rows.contiguous().numpy().tobytes())
        return state.hexdigest()


class Rows(Dataset):
    """Rows as the Trainer wants them."""

    def __init__(self, inputs: Tensor, labels: Tensor):
        """Keep them; nothing is copied."""
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        """How many."""
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row."""
        return {"input_ids": self.inputs[index], "labels": self.labels[index]}


def prepare(settings: Settings, tokenizer: Any = None) -> Data:
    """The rows of a run. A model from scratch on text gets a tokenizer made from the part that is trained on.

    Raises:
        InputError: As `posterity.corpus`; a text with fewer tokens than one window in either part.
    """
    if settings.task_name is not None:
        task = settings.make_task()
        train, held_out = (
            task.inputs(rows, seed)
            for rows, seed in ((settings.steps * settings.batch, settings.seed), (HELD_OUT_ROWS, HELD_OUT_SEED))
        )
        rows = ((train, task.labels(train)), (held_out, task.labels(held_out)))
        return Data(*rows, getattr(task, "vocabulary", 64), task.length)
    named = () if settings.data == ("text",) else settings.data
    skipped = sources.Skipped() if settings.skip_broken else None
    texts = [(name, _read(document)) for name, document in sources.documents(named, skipped=skipped)]
    first, last = _split(texts)
    tokenizer = tokenizer or _tokenizer([text for _, text in first])
    rows = []
    for part in (first, last):
        ids = torch.stack([window.ids for window in corpus.windows(part, tokenizer, settings.context)])
        rows.append((ids, ids))
    return Data(rows[0], rows[1], len(tokenizer), settings.context, tokenizer, skipped)


def _split(texts: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What is trained on and what is held out: of many texts every tenth, of few the last tenth of each."""
    every = round(1 / HELD_OUT)
    if len(texts) >= every:
        last = texts[every - 1 :: every]
        return [one for index, one in enumerate(texts) if index % every != every - 1], last
    ends = [round(len(text) * (1 - HELD_OUT)) for _, text in texts]
    first = [(name, text[:end]) for (name, text), end in zip(texts, ends, strict=True)]
    return first, [(name, text[end:]) for (name, text), end in zip(texts, ends, strict=True)]


def _read(document: Any) -> str:
    return "".join(document.pieces()) if isinstance(document, corpus.Stream) else document


def _tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer made from these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)
