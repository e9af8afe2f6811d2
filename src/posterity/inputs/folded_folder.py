"""The folder of a model that runs folded: written together with `folded.json` or not at all, checked, and applied."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from posterity.atomic_files import write_whole
from posterity.errors import InputError
from posterity.models.folded_heads import Heads, _own, attention_modules, keep_folded
from posterity.models.interface import FOLDED
from posterity.models.language_model import language_model
from posterity.models.transformers_logging import quiet

FILE = "folded.json"


VERSION = 1


def save_folded(model: nn.Module, tokenizer: Any, heads: Heads, folder: Path, known: Mapping[str, Any]) -> None:
    """Write a folder of transformers and `folded.json`, together or not at all.

    Args:
        model: The model; if it runs folded itself, its own folded heads are written too.
        tokenizer: Its tokenizer, or None.
        heads: What is folded.
        folder: A new folder, an empty one, or that of a folded model, whose place is taken.
        known: What else is kept in `folded.json`: losses, budget, text.

    Raises:
        InputError: The folder holds something else; it cannot be written; the model cannot be folded for good.
    """
    inner = language_model(model)
    target = checked_folder(folder)
    every = {number: sorted({*heads.get(number, ()), *own}) for number, own in _own(inner).items()}
    data = {"version": VERSION, "heads": {str(number): some for number, some in every.items() if some}, **known}
    config = inner.config.get_text_config(decoder=True)
    before = getattr(config, FOLDED, None)
    try:
        with quiet(), tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as work:
            made = Path(work) / "model"
            vars(config).pop(FOLDED, None)  # the folder's config is the plain model's
            inner.save_pretrained(made)
            if tokenizer is not None:
                tokenizer.save_pretrained(made)
            write_whole(made / FILE, json.dumps(data, indent=1).encode())
            if target.exists():
                os.rename(target, Path(work) / "old")
            os.rename(made, target)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{folder}: expected to write a model there; {reason}: choose another folder") from error
    finally:
        if before is not None:
            setattr(config, FOLDED, before)


def checked_folder(folder: str | os.PathLike[str]) -> Path:
    """Say before the work whether a folded model can be written to a folder; returns its real path."""
    if "\0" in os.fspath(folder):
        raise InputError(f"{folder}: expected a folder that can be made: a name holds no zero byte; choose another")
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise InputError(f"{folder}: expected a folder for the folded model; it is a file: choose another")
    if target.is_dir() and any(target.iterdir()) and not (target / FILE).is_file():
        raise InputError(f"{folder}: expected a new folder or that of a folded model, but it holds something else")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: expected a folder that can be made, but {target.parent} is none to write in")
    return target


def run_as_saved(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Let a model that was just loaded run folded, if its folder says so.

    Raises:
        InputError: `folded.json` is damaged or of another version; the heads do not fit the model.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        config = model.config.get_text_config(decoder=True)
        if given := vars(config).pop(FOLDED, None):  # saved again by transformers; it does not run folded yet
            try:
                numbers = {module.layer_idx: number for number, module in enumerate(attention_modules(model))}
                keep_folded(model, {numbers[layer]: some for layer, some in _listed(given).items()})
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{folder}: its {FOLDED} in config.json is damaged: fold it again") from error
        return
    try:
        data = json.loads(file.read_text())
        version = data["version"]
        heads = _listed(data["heads"]) if version == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: expected the heads of a folded model, but it is damaged: fold it again") from error
    if version != VERSION:
        raise InputError(f"{file} is of version {version}; this is posterity for version {VERSION}: fold it again")
    keep_folded(model, heads)


def _listed(named: Any) -> dict[int, list[int]]:
    """Heads by number of the layer, as JSON holds them. ValueError or TypeError for anything else."""
    if not isinstance(named, dict):
        raise TypeError("expected heads by layer")
    heads = {int(number): list(some) for number, some in named.items()}
    every = [*heads, *(head for some in heads.values() for head in some)]
    if len(heads) < len(named) or any(type(one) is not int or one < 0 for one in every):
        raise ValueError("expected whole numbers of layers and heads")
    return heads
