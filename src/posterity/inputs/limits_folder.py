"""The folder of a model with folded heads or local layers: written whole or not at all, with what limits it; applied.

`folded.json` lists the folded heads. `windows.json` lists the windows of local layers: either the config says them
(`layer_types` and `sliding_window`), so that any library runs them, or only this package does.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from posterity.atomic_files import write_atomically
from posterity.errors import InputError, first_line
from posterity.models.folded_heads import Heads
from posterity.models.language_model import language_model
from posterity.models.masks import FOLDED, WINDOWS
from posterity.models.permanent_limits import (
    attention_modules,
    fold_permanently,
    folded_heads_by_layer,
    limit_windows_permanently,
    windows_by_layer,
)
from posterity.models.transformers_logging import silence_transformers
from posterity.models.window_limits import Windows

FOLDED_FILE, WINDOWS_FILE = "folded.json", "windows.json"
VERSION = 1  # of these files
AGAIN = {FOLDED_FILE: "fold it again", WINDOWS_FILE: "write it again"}
SLIDING, FULL = "sliding_attention", "full_attention"  # entries of `layer_types`


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
    files = _limit_files(inner, heads, {})
    files[FOLDED_FILE] = {"version": VERSION, "heads": {}} | files.get(FOLDED_FILE, {}) | dict(attrs)
    _write_folder(inner, tokenizer, folder, files)


def save_local_layers(
    model: nn.Module,
    tokenizer: Any,
    windows: Windows,
    folder: Path,
    attrs: Mapping[str, Any],
    verify: Callable[[Path], bool],
) -> bool:
    """Write a folder of transformers whose layers have these windows, verified before it takes its place.

    Where the config can say the windows, it does (`layer_types`, `sliding_window`), if the folder then passes `verify`:
    in some architectures these entries mean more than windows. Otherwise `windows.json` alone says them.

    Args:
        model: The model; its own folded heads and windows are written too.
        tokenizer: Its tokenizer, or None.
        windows: Tokens that a query sees, its own included, by number of the attention layer.
        folder: A new folder, an empty one, or that of a limited model, whose place is taken.
        attrs: Further entries of `windows.json`.
        verify: Whether the model of a folder runs as it should.

    Returns:
        Whether the config says the windows.

    Raises:
        InputError: The folder holds something else; it cannot be written; the model has adapters, cannot be limited for
            good, or is another after it was loaded again.
    """
    inner = language_model(model)
    settings = None if windows_by_layer(inner) else window_settings(inner, windows)
    if settings is not None:
        files = _limit_files(inner, {}, {})
        files[WINDOWS_FILE] = _windows_entry(windows, in_config=True) | dict(attrs)
        with contextlib.suppress(InputError):  # the other form has the same reason, or none
            if _write_folder(inner, tokenizer, folder, files, settings, verify):
                return True
    files = _limit_files(inner, {}, windows)
    files[WINDOWS_FILE] |= attrs
    if not _write_folder(inner, tokenizer, folder, files, verify=verify):
        raise InputError(
            f"expected the logits of {type(inner).__name__} with these windows after it was written and loaded again; "
            f"got others: {folder} is not written"
        )
    return False


def window_settings(model: PreTrainedModel, windows: Windows) -> dict[str, Any] | None:
    """Return the entries of the text model's config that say these windows; None if it cannot: it has one size."""
    config = model.config.get_text_config(decoder=True)
    types, size = getattr(config, "layer_types", None), getattr(config, "sliding_window", 0)
    if not types or size == 0:
        return None
    numbers = [module.layer_idx for module in attention_modules(model)]
    if any(number >= len(types) or types[number] not in (SLIDING, FULL) for number in numbers):
        return None
    remaining = {size for layer, number in enumerate(numbers) if layer not in windows and types[number] == SLIDING}
    sizes = {*windows.values()} | remaining
    if len(sizes) != 1:
        return None
    local = {numbers[layer] for layer in windows}
    types = [SLIDING if number in local else name for number, name in enumerate(types)]
    switch = {"use_sliding_window": True} if hasattr(config, "use_sliding_window") else {}
    return {"layer_types": types, "sliding_window": sizes.pop(), **switch}


def _limit_files(model: PreTrainedModel, heads: Heads, windows: Windows) -> dict[str, dict[str, Any]]:
    """Return what the files say of a model's own limits and of these, by the name of the file."""
    all_heads = {layer: sorted({*heads.get(layer, ()), *own}) for layer, own in folded_heads_by_layer(model).items()}
    entry = {str(layer): numbers for layer, numbers in all_heads.items() if numbers}
    files = {FOLDED_FILE: {"version": VERSION, "heads": entry}} if entry else {}
    own_windows = windows_by_layer(model)
    smallest = {layer: min(window, own_windows.get(layer, window)) for layer, window in windows.items()}
    if all_windows := own_windows | smallest:
        files[WINDOWS_FILE] = _windows_entry(all_windows, in_config=False)
    return files


def _windows_entry(windows: Windows, in_config: bool) -> dict[str, Any]:
    """Return what `windows.json` says; `in_config`: the config says the windows too."""
    by_layer = {str(layer): window for layer, window in sorted(windows.items())}
    return {"version": VERSION, "windows": by_layer, "in_config": in_config}


def _write_folder(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    files: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any] | None = None,
    verify: Callable[[Path], bool] | None = None,
) -> bool:
    """Write a folder of transformers with these JSON files; put it in its place if it passes `verify`; return whether.

    `settings` are entries of the text model's config.
    """
    if getattr(model, "peft_config", None):
        raise InputError("a folder of a limited model has no place for adapters: merge them first (merge_and_unload())")
    target = check_folder(folder)
    config = vars(model.config.get_text_config(decoder=True))
    before = dict(config)
    for name in (FOLDED, WINDOWS):  # the files say them
        config.pop(name, None)
    config.update(settings or {})
    try:
        with silence_transformers(), tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as work:
            source = Path(work) / "model"
            model.save_pretrained(source)
            if tokenizer is not None:
                tokenizer.save_pretrained(source)
            for name, data in files.items():
                write_atomically(source / name, json.dumps(data, indent=1).encode())
            if verify is not None and not verify(source):
                return False
            if target.exists():
                os.rename(target, Path(work) / "old")
            os.rename(source, target)
    except OSError as error:
        reason = first_line(error)
        raise InputError(f"{folder}: expected to write a model there; {reason}: choose another folder") from error
    finally:
        config.clear()
        config.update(before)
    return True


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the real path of a folder, or raise InputError if no limited model can be written there."""
    if "\0" in os.fspath(folder):
        raise InputError(f"{folder}: expected a folder that can be made: a name holds no zero byte; choose another")
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise InputError(f"{folder}: expected a folder for the model; it is a file: choose another")
    limited = any((target / name).is_file() for name in (FOLDED_FILE, WINDOWS_FILE))
    if target.is_dir() and any(target.iterdir()) and not limited:
        raise InputError(
            f"{folder}: expected a new folder, or that of a model that fold or windows wrote, but it holds something "
            "else"
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: expected a folder that can be made, but {target.parent} is none to write in")
    return target


def apply_limits(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Let a model that was just loaded from a folder run with the folded heads and the windows that the folder says.

    Raises:
        InputError: A file is damaged or of another version; the heads or layers do not fit the model.
    """
    text = model.config.get_text_config(decoder=True)
    entries = {name: vars(text).pop(name, None) for name in (FOLDED, WINDOWS)}  # of one that transformers saved again
    heads = _read_limits(Path(folder) / FOLDED_FILE, _heads_of_file)
    windows = _read_limits(Path(folder) / WINDOWS_FILE, _windows_of_file)
    try:
        if heads is None and entries[FOLDED]:
            heads = _by_number(model, _parse_heads(entries[FOLDED]))
        if windows is None and entries[WINDOWS]:
            windows = _by_number(model, _parse_windows(entries[WINDOWS]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder}: its limits in config.json are damaged: write it again") from error
    if heads:
        fold_permanently(model, heads)
    if windows:
        limit_windows_permanently(model, windows)


def _by_number(model: PreTrainedModel, entry: Mapping[int, Any]) -> dict[int, Any]:
    """Return what a config says by `layer_idx` by the number of the attention layer. KeyError for no such layer."""
    layers = {module.layer_idx: layer for layer, module in enumerate(attention_modules(model))}
    return {layers[index]: limit for index, limit in entry.items()}


def _read_limits(file: Path, parse: Callable[[Mapping[str, Any]], dict[int, Any]]) -> dict[int, Any] | None:
    """Return the limits that a file says, by number of the layer; None if there is no such file."""
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text())
        version = data["version"]
        limits = parse(data) if version == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file}: expected the limits of a model's attention, but it is damaged: {AGAIN[file.name]}"
        ) from error
    if version != VERSION:
        raise InputError(f"{file} is of version {version}; this is posterity for version {VERSION}: {AGAIN[file.name]}")
    return limits


def _heads_of_file(data: Mapping[str, Any]) -> dict[int, list[int]]:
    return _parse_heads(data["heads"])


def _windows_of_file(data: Mapping[str, Any]) -> dict[int, int]:
    """Return the windows that the file alone says: none if the config says them."""
    windows = _parse_windows(data["windows"])
    if type(data["in_config"]) is not bool:
        raise TypeError("expected true or false")
    return {} if data["in_config"] else windows


def _parse_windows(entry: Any) -> dict[int, int]:
    """Return windows by number of the layer from their JSON form. ValueError or TypeError for anything else."""
    if not isinstance(entry, dict):
        raise TypeError("expected windows by layer")
    windows = {int(layer): window for layer, window in entry.items()}
    if len(windows) < len(entry) or any(type(size) is not int or size < 1 for size in windows.values()):
        raise ValueError("expected whole numbers of layers and tokens")
    return windows


def _parse_heads(entry: Any) -> dict[int, list[int]]:
    """Return heads by number of the layer from their JSON form. ValueError or TypeError for anything else."""
    if not isinstance(entry, dict):
        raise TypeError("expected heads by layer")
    heads = {int(layer): list(numbers) for layer, numbers in entry.items()}
    values = [*heads, *(head for numbers in heads.values() for head in numbers)]
    if len(heads) < len(entry) or any(type(value) is not int or value < 0 for value in values):
        raise ValueError("expected whole numbers of layers and heads")
    return heads
