"""Give every document a name, in whichever form a caller passes documents: texts, files, rows, token ids, labels."""

import mimetypes
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posterity.errors import InputError
from posterity.inputs.conversations import find_conversation
from posterity.inputs.documents import TextStream, Tokens, check_ids, default_text, document_kind, refuse_answers
from posterity.inputs.text_sources import open_documents

LONGEST_PATH = 1024  # characters; a longer str is a text
IGNORED = -100  # the label of a token whose prediction has no loss, in transformers
COLUMNS = ("input_ids", "attention_mask", "labels")


def open_files(documents: Any) -> Any:
    """Open the files that `documents` names, so that a wrong one is found early; return anything else as it is.

    None is the default text. A `pathlib.Path` is a file, and so is a str, or each str of a list, that names one. What
    a file holds is read as on the command line (`posterity.inputs.text_sources.open_documents`).

    Raises:
        InputError: There is no such file; it cannot be read.
    """
    if documents is None:
        return [default_text()]
    paths = documents if isinstance(documents, list | tuple) else [documents]
    if paths and all(isinstance(path, os.PathLike) or _exists(path) for path in paths):
        return open_documents([_existing(path) for path in paths])
    if isinstance(documents, str) and _looks_like_path(documents):
        raise InputError(f"expected a text or a file; there is no file {documents}: check the path")
    return documents


def name_documents(documents: Any) -> Iterator[tuple[str, Any]]:
    """Return `(name, document)` for every document; one without a name is `document N`, a single text is `text`.

    A row of a data set gives its field `text`; else its conversation; else its `input_ids`, without the tokens that
    `attention_mask` hides, and with the loss on those whose `labels` are not -100. A mapping of labels to documents
    names each by its label.

    Raises:
        InputError: There is no document; what is there is none; a str in a list that names a file beside texts.
    """
    documents = open_files(documents)
    if isinstance(documents, Mapping):
        return _mapping_documents(documents)
    if isinstance(documents, str | TextStream):
        return iter([("text", documents)])
    if isinstance(documents, Tensor | np.ndarray):
        documents = [documents] if documents.ndim < 2 else documents
    elif isinstance(documents, bytes) or not isinstance(documents, Iterable):
        raise InputError(
            f"expected text or token ids; got {document_kind(documents)}: pass a str, token ids, or a list of them"
        )
    return _item_documents(iter(documents))


def name_texts(documents: Any) -> Iterator[tuple[str, Any]]:
    """Yield documents by name as `name_documents` does; refuse one whose loss is on some of its tokens only."""
    for name, document in name_documents(documents):
        refuse_answers(name, document)
        yield name, document


def refuse_path(text: Any) -> None:
    """Raise InputError for a text that is the name of a file."""
    if isinstance(text, os.PathLike) or (_exists(text) and os.path.isfile(text)):
        raise InputError(
            f"expected a text; got {os.fspath(text)!r}, and a file of that name exists: did you mean what it holds, "
            f'pathlib.Path({os.fspath(text)!r}).read_text() or --text "$(cat {os.fspath(text)})"?'
        )


def _item_documents(items: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    first = list(islice(items, 1))
    if not first:
        raise InputError("expected at least one document; got none: give a text or token ids")
    items = chain(first, items)
    if _is_token_id(first[0]):
        items = iter([list(items)])
    for number, item in enumerate(items):
        name, document = f"document {number}", item
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
            name, document = item
            if isinstance(document, os.PathLike):
                yield from _labelled_documents({name: document})
                continue
        elif isinstance(item, os.PathLike):
            yield from open_documents([_existing(item)])
            continue
        elif _looks_like_path(item) and _exists(item):
            raise InputError(
                f"{name}: expected a text; got {item!r}, and a file of that name exists: did you mean "
                f"pathlib.Path({item!r})? As words, pass ({name!r}, {item!r})"
            )
        yield name, _row_document(document, name) if isinstance(document, Mapping) else document


def _mapping_documents(documents: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Return the documents of a row, of a tokenizer's output for several texts, or of labels."""
    ids = documents.get("input_ids")
    if isinstance(ids, Sequence | Tensor | np.ndarray) and len(ids) and not _is_token_id(ids[0]):
        return name_documents(_split_batch(documents))
    if (document := _row_document(documents, "the row")) is not documents:
        return iter([("text" if isinstance(document, str) else "document 0", document)])
    if not documents or not all(isinstance(label, str) for label in documents):
        raise InputError(f"expected labels with documents; got {document_kind(documents)}: pass texts or token ids")
    return _labelled_documents({label: open_files(value) for label, value in documents.items()})


def _labelled_documents(documents: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for label, value in documents.items():
        try:
            pairs = name_documents(value)
            head = list(islice(pairs, 2))
        except InputError as error:
            raise InputError(f"{label}: {error}") from error
        if len(head) == 1:
            yield label, head[0][1]
        else:
            yield from ((f"{label}: {name}", document) for name, document in chain(head, pairs))


def _split_batch(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a mapping whose fields hold one entry for each of several texts."""
    columns = {name: batch[name] for name in COLUMNS if batch.get(name) is not None}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _row_document(row: Mapping[str, Any], name: str) -> Any:
    """Return the text, the conversation or the token ids of a row of a data set; the row itself if it has none."""
    if isinstance(text := row.get("text"), str):
        return text
    if (conversation := find_conversation(row, name)) is not None:
        return conversation
    return row if row.get("input_ids") is None else _row_tokens(row, name)


def _row_tokens(row: Mapping[str, Any], name: str) -> Tensor | Tokens:
    """Return the token ids of a row without padding, and which of them have a loss if not all."""
    ids = check_ids(name, row["input_ids"])
    mask, labels = (_column(row, field, ids, name) for field in COLUMNS[1:])
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    ids = ids[seen]
    if labels is None:
        return ids
    labels = labels[seen]
    answers = labels != IGNORED
    if not torch.equal(labels[answers], ids[answers]):
        raise InputError(
            f"{name}: expected labels that are the token ids themselves or {IGNORED}, for the model shifts them; got "
            "others: leave the labels out"
        )
    return ids if bool(answers.all()) else Tokens(ids, [], answers)


def _column(row: Mapping[str, Any], field: str, ids: Tensor, name: str) -> Tensor | None:
    """Return a field that has a whole number for each token; None if the row has none."""
    if (values := row.get(field)) is None:
        return None
    try:
        column = torch.as_tensor(values).to("cpu", torch.int64)
    except (TypeError, ValueError, RuntimeError):
        column = ids.new_zeros(0)
    if column.shape != ids.shape:
        raise InputError(f"{name}: expected {len(ids)} numbers in the field {field!r}, one for each token; got others")
    return column


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int | float | np.number) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)


def _looks_like_path(text: Any) -> bool:
    """Return whether a str is one word with the ending of a file's name, or of several names of folders."""
    if not isinstance(text, str) or not 0 < len(text) <= LONGEST_PATH or text.split() != [text]:
        return False
    return bool(mimetypes.guess_type(text)[0]) or text.lower().endswith(".jsonl")


def _exists(text: Any) -> bool:
    """Return whether a str names a file or a folder."""
    if not isinstance(text, str) or not 0 < len(text) <= LONGEST_PATH or "\0" in text or "\n" in text:
        return False
    return os.path.exists(text)


def _existing(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path)
    if "\0" in name or not os.path.exists(name):
        raise InputError(f"expected a file; there is no file {name}: check the path")
    return name
