"""The folder of a model with permanently folded heads: written together with `folded.json` or not at all; applied."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from posterity.atomic_files import write_atomically
from posterity.errors import InputError, first_line
from posterity.models.folded_heads import Heads, attention_modules, fold_permanently, folded_heads_by_layer
from posterity.models.language_model import language_model
from posterity.models.masks import FOLDED
from posterity.models.transformers_logging import silence_transformers

FOLDED_FILE = "folded.json"
VERSION = 1  # of that file


def save_folded(model: nn.Module, tokenizer: Any, heads: Heads, folder: Path, attrs: Mapping[str, Any]) -> None:
    """Write a folder of transformers and `folded.json`, together or not at all.

    Args:
        model: The model; if it runs folded itself, its own folded heads are written too.
        tokenizer: Its tokenizer, or None.
        heads: The heads to fold, by number of the attention layer.
        folder: A new folder, an empty one, or that of a folded model, whose place is taken.
        attrs: Further entries of `folded.json`: losses, budget, text.

    Raises:
        InputError: The folder holds something else; it cannot be written; the model has adapters, or cannot be folded
            for good.
    """
    inner = language_model(model)
    if getattr(inner, "peft_config", None):
        raise InputError("a folder of a folded model has no place for adapters: merge them first (merge_and_unload())")
    target = check_folder(folder)
    all_heads = {layer: sorted({*heads.get(layer, ()), *own}) for layer, own in folded_heads_by_layer(inner).items()}
    data = {"version": VERSION, "heads": {str(layer): numbers for layer, numbers in all_heads.items() if numbers}}
    config = inner.config.get_text_config(decoder=True)
    folded = getattr(config, FOLDED, None)
    try:
        with silence_transformers(), tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as work:
            source = Path(work) / "model"
            vars(config).pop(FOLDED, None)  # the folder's config is the plain model's
            inner.save_pretrained(source)
            if tokenizer is not None:
                tokenizer.save_pretrained(source)
            write_atomically(source / FOLDED_FILE, json.dumps({**data, **attrs}, indent=1).encode())
            if target.exists():
                os.rename(target, Path(work) / "old")
            os.rename(source, target)
    except OSError as error:
        reason = first_line(error)
        raise InputError(f"{folder}: expected to write a model there; {reason}: choose another folder") from error
    finally:
        if folded is not None:
            setattr(config, FOLDED, folded)


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the real path of a folder, or raise InputError if no folded model can be written there."""
    if "\0" in os.fspath(folder):
        raise InputError(f"{folder}: expected a folder that can be made: a name holds no zero byte; choose another")
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise InputError(f"{folder}: expected a folder for the folded model; it is a file: choose another")
    if target.is_dir() and any(target.iterdir()) and not (target / FOLDED_FILE).is_file():
        raise InputError(f"{folder}: expected a new folder or that of a folded model, but it holds something else")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: expected a folder that can be made, but {target.parent} is none to write in")
    return target


def apply_folded_heads(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Let a model that was just loaded from a folder run folded, if the folder says so.

    Raises:
        InputError: `folded.json` is damaged or of another version; the heads do not fit the model.
    """
    file = Path(folder) / FOLDED_FILE
    if not file.is_file():
        _apply_config_heads(model, folder)
        return
    try:
        data = json.loads(file.read_text())
        version = data["version"]
        heads = _parse_heads(data["heads"]) if version == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: expected the heads of a folded model, but it is damaged: fold it again") from error
    if version != VERSION:
        raise InputError(f"{file} is of version {version}; this is posterity for version {VERSION}: fold it again")
    fold_permanently(model, heads)


def _apply_config_heads(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Apply the heads in the config of a folded model that transformers has saved again; they are by `layer_idx`."""
    entry = vars(model.config.get_text_config(decoder=True)).pop(FOLDED, None)
    if not entry:
        return
    try:
        layers = {module.layer_idx: layer for layer, module in enumerate(attention_modules(model))}
        fold_permanently(model, {layers[index]: numbers for index, numbers in _parse_heads(entry).items()})
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder}: its {FOLDED} in config.json is damaged: fold it again") from error


def _parse_heads(entry: Any) -> dict[int, list[int]]:
    """Return heads by number of the layer from their JSON form. ValueError or TypeError for anything else."""
    if not isinstance(entry, dict):
        raise TypeError("expected heads by layer")
    heads = {int(layer): list(numbers) for layer, numbers in entry.items()}
    values = [*heads, *(head for numbers in heads.values() for head in numbers)]
    if len(heads) < len(entry) or any(type(value) is not int or value < 0 for value in values):
        raise ValueError("expected whole numbers of layers and heads")
    return heads
