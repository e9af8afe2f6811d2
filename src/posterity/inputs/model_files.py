"""Check a model's files before transformers reads them: no pickles, no code, no sizes that the weights do not back."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posterity.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"  # of a peft adapter, in place of a model's config.json
TO_SAFETENSORS = (
    "load it once with AutoModelForCausalLM.from_pretrained(..., use_safetensors=False) where you trust the file, "
    "then save_pretrained(folder)"
)
PICKLE_PATTERNS = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl")
AXIS_SIZES = {  # entries of a config that are lengths of array axes
    "head_dim", "hidden_size", "intermediate_size", "moe_intermediate_size", "n_embd", "n_head", "n_inner",
    "num_attention_heads", "num_key_value_heads", "vocab_size",
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes in a safetensors file, as its library allows


def check_model_folder(folder: Path) -> None:
    """Check that a folder can be a model's.

    Raises:
        InputError: It holds no config or no safetensors weights, or these are not what their names say.
    """
    if not folder.is_dir():
        raise InputError(
            f"expected a model (hub id, folder or .gguf file); {folder} is another kind of file: "
            "the model comes first and the texts after it ('default' is the embedded model)"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"expected a model folder; {folder} has no config.json: name the folder that holds one")
    if not any(folder.glob("*.safetensors")):
        if any(True for pattern in PICKLE_PATTERNS for _ in folder.glob(pattern)):
            raise InputError(f"expected safetensors weights; {folder} has pickled ones: {TO_SAFETENSORS}")
        raise InputError(f"expected weights beside config.json; {folder} has no *.safetensors file: add it")
    check_config(read_json(folder / "config.json"), folder / "config.json", *_count_weights(folder))


def check_config(config: dict[str, Any], place: object, arrays: int | None = None, size: int = 0) -> None:
    """Refuse a config that names code of the hub, or sizes beyond the weights: transformers would allocate them first.

    Args:
        config: The JSON object.
        place: Its file, for the message.
        arrays: The number of arrays in the weights; None if it is not known, and then no size is checked.
        size: The bytes of the weights.

    Raises:
        InputError: It does.
    """
    for name, value in _config_entries(config):
        if name.endswith(("attn_implementation", "experts_implementation")) and "/" in json.dumps(value):
            raise InputError(
                f"{place} names code of the hub as its {name.strip('_')} ({value!r}): read that code, and if you trust "
                "it load the model yourself and pass it to posterity.measure"
            )
        if arrays is None or isinstance(value, bool) or not isinstance(value, int):
            continue
        if name in AXIS_SIZES and value > size:
            raise InputError(f"{place}: its {name} is {value}, and its weights are only {size} bytes: get them again")
        if _is_layer_count(name):
            if value < 1 and name in ("num_hidden_layers", "n_layer", "num_layers"):
                raise InputError(f"{place}: expected {name} of at least 1; got {value}: mend it")
            if value > arrays:
                raise InputError(
                    f"{place}: its {name} is {value}, and its weights are only {arrays} arrays: get the complete files"
                )


def check_index(index: Any, place: object) -> list[str]:
    """Return the names of the weight files that an index lists.

    Raises:
        InputError: It lists anything but safetensors files beside it.
    """
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise InputError(f"{place}: expected the weight_map of an index of weights; it has none: get the file again")
    for file in files.values():
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise InputError(f"{place}: expected safetensors files beside it; it names {file!r}: {TO_SAFETENSORS}")
    return sorted(set(files.values()))


def read_json(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file. InputError for anything else."""
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"expected a file that can be read; {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not a valid JSON file ({error}): get it again") from error
    if not isinstance(data, dict):
        raise InputError(f"{file}: expected a JSON object; got {type(data).__name__}: get it again")
    return data


def _count_weights(folder: Path) -> tuple[int | None, int]:
    """Return the number of arrays in the weights (None where transformers will not find any) and their bytes."""
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not os.path.lexists(folder / files[0]):
        if not os.path.lexists(index):
            return None, 0
        files = check_index(read_json(index), index)
    return sum(count_arrays(folder / file) for file in files), sum((folder / file).stat().st_size for file in files)


def count_arrays(file: Path) -> int:
    """Return the number of arrays that the header of a safetensors file lists."""
    damaged = f"cannot load {file.parent}: its weights are damaged (the header of {file.name}): get the files again"
    try:
        with open(file, "rb") as stream:
            size, start = os.fstat(stream.fileno()).st_size, stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                if start[:1] == b"\x80" or start.startswith(b"PK\x03\x04"):
                    raise InputError(f"expected safetensors weights; {file} is a pickle by its form: {TO_SAFETENSORS}")
                raise InputError(damaged)
            header = json.loads(stream.read(length))
    except OSError as error:
        raise InputError(f"expected weights that can be read; {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(damaged) from error
    if not isinstance(header, dict):
        raise InputError(damaged)
    return len(header)


def _config_entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield names and values of a config and of the configs in it."""
    for name, value in config.items():
        yield name, value
        if isinstance(value, dict):
            yield from _config_entries(value)


def _is_layer_count(name: str) -> bool:
    return name in ("n_layer", "n_layers", "num_layers") or (name.startswith("num_") and name.endswith("_layers"))
