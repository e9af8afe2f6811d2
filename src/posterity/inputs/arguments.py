"""The model and the documents that a public function is called with: objects, or names as on the command line."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from posterity.errors import InputError
from posterity.inputs.model import LoadedModel, load_model


def split_arguments(tokenizer: Any, documents: Any) -> tuple[Any, Any]:
    """Return tokenizer and documents; where only the second argument came and is no tokenizer, it is the documents.

    Raises:
        InputError: Both are documents.
    """
    if documents is not None and isinstance(tokenizer, str | os.PathLike | list):
        raise InputError(
            f"expected a tokenizer and documents, or documents alone; got {type(tokenizer).__name__} in front of the "
            "documents: pass several files or texts as one list"
        )
    is_tokenizer = callable(tokenizer) or (
        isinstance(tokenizer, Mapping) and bool(tokenizer) and all(callable(value) for value in tokenizer.values())
    )
    return (tokenizer, documents) if is_tokenizer or documents is not None else (None, tokenizer)


def open_model(model: Any, tokenizer: Any) -> LoadedModel:
    """Return a model with its tokenizer; one that is named is loaded, and brings its tokenizer unless there is one.

    A model that came as an object has no name and no revision here: its config knows them.

    Raises:
        InputError: As `load_model`.
    """
    if model is None or isinstance(model, str | os.PathLike):
        model = load_model(model)
    if isinstance(model, LoadedModel):
        return model if tokenizer is None else replace(model, tokenizer=tokenizer)
    return LoadedModel(model, tokenizer, "", "")
