"""The rows of a training run, for training and held out: from a built-in task, or windows of text."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from posterity.inputs.documents import TextStream, refuse_conversation
from posterity.inputs.text_sources import SkippedLines, open_documents
from posterity.inputs.windows import Coverage, read_corpus
from posterity.training.settings import Settings

HELD_OUT = 0.1  # every tenth of many texts; of few texts the end of each
HELD_OUT_ROWS = 512  # of a task
HELD_OUT_SEED = 1_000_003  # the same rows for all runs of a task
VOCABULARY = 1024  # of the tokenizer trained for a model from scratch
REGRESSOR_VOCABULARY = 64  # of a task without tokens: GPT-2's config asks for one

Texts = list[tuple[str, str]]  # names and texts


@dataclass(frozen=True)
class Data:
    """Training rows and held-out rows, each as inputs and labels of equal length."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    vocabulary: int
    context: int
    tokenizer: Any = None
    skipped: SkippedLines | None = None
    coverage: tuple[Coverage, ...] = ()  # of training rows and held-out rows, for text

    @property
    def digest(self) -> str:
        """SHA-256 of all rows."""
        state = hashlib.sha256()
        for rows in (*self.train, *self.held_out):
            state.update(str((rows.dtype, rows.shape)).encode())
            state.update(rows.contiguous().numpy().tobytes())
        return state.hexdigest()


class Rows(Dataset):
    """Inputs and labels as a torch Dataset for the Trainer."""

    def __init__(self, inputs: Tensor, labels: Tensor):
        """Hold both tensors without a copy; rows are their first axis."""
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one row as the arguments of a model."""
        return {"input_ids": self.inputs[index], "labels": self.labels[index]}


def prepare_data(settings: Settings, tokenizer: Any = None) -> Data:
    """Generate or read the rows of a run.

    Args:
        settings: Of the run.
        tokenizer: For text; by default one is trained on the training part, for a model from scratch.

    Raises:
        InputError: A text cannot be read or tokenized; either part has fewer tokens than one window.
    """
    if settings.task_name is not None:
        task = settings.make_task()
        train, held_out = (
            task.inputs(rows, seed)
            for rows, seed in ((settings.steps * settings.batch, settings.seed), (HELD_OUT_ROWS, HELD_OUT_SEED))
        )
        rows = ((train, task.labels(train)), (held_out, task.labels(held_out)))
        return Data(*rows, getattr(task, "vocabulary", REGRESSOR_VOCABULARY), task.length)
    names = () if settings.data == ("text",) else settings.data
    skipped = SkippedLines() if settings.skip_broken else None
    texts = [(name, _read_text(name, document)) for name, document in open_documents(names, settings.field, skipped)]
    train_texts, held_out_texts = _split_texts(texts)
    tokenizer = tokenizer or _train_tokenizer([text for _, text in train_texts])
    corpora = [read_corpus(part, tokenizer, settings.context) for part in (train_texts, held_out_texts)]
    train, held_out = (torch.stack([window.ids for window in corpus.windows]) for corpus in corpora)
    coverage = tuple(corpus.coverage for corpus in corpora)
    return Data((train, train), (held_out, held_out), len(tokenizer), settings.context, tokenizer, skipped, coverage)


def _split_texts(texts: Texts) -> tuple[Texts, Texts]:
    """Split into a training and a held-out part: of many texts every tenth, of few the last tenth of each."""
    every = round(1 / HELD_OUT)
    if len(texts) >= every:
        held_out = texts[every - 1 :: every]
        return [pair for index, pair in enumerate(texts) if index % every != every - 1], held_out
    ends = [round(len(text) * (1 - HELD_OUT)) for _, text in texts]
    train = [(name, text[:end]) for (name, text), end in zip(texts, ends, strict=True)]
    return train, [(name, text[end:]) for (name, text), end in zip(texts, ends, strict=True)]


def _read_text(name: str, document: Any) -> str:
    refuse_conversation(name, document)
    return "".join(document.pieces()) if isinstance(document, TextStream) else document


def _train_tokenizer(texts: list[str]) -> Any:
    """Train a byte-level BPE tokenizer on these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
