"""A look at the files of a model before transformers believes them: no pickles, no code, no sizes without numbers."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posterity.errors import InputError

TO_SAFETENSORS = (
    "load it once with AutoModelForCausalLM.from_pretrained(..., use_safetensors=False) where you trust the file, "
    "then save_pretrained(folder)"
)
PICKLED = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "head_dim",
    "n_embd",
    "n_inner",
}  # of axes of arrays
SIZES |= {"num_attention_heads", "num_key_value_heads", "n_head"}
LONGEST_HEADER = 100_000_000  # of a safetensors file, as its library allows


def checked(folder: Path) -> str:
    """The path of a folder that can be a model's.

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
        if any(True for pattern in PICKLED for _ in folder.glob(pattern)):
            raise InputError(f"expected safetensors weights; {folder} has pickled ones: {TO_SAFETENSORS}")
        raise InputError(f"expected weights beside config.json; {folder} has no *.safetensors file: add it")
    check_config(read_json(folder / "config.json"), folder / "config.json", *_weights(folder))
    return str(folder)


def check_config(config: dict[str, Any], place: object, arrays: int | None = None, size: int = 0) -> None:
    """Refuse a config that names code of the hub, or sizes beyond the weights: transformers would make them first.

    Args:
        config: As JSON holds it.
        place: Its file, for the message.
        arrays: How many arrays the weights are; None if nobody knows, and then no number is looked at.
        size: How many bytes they are.

    Raises:
        InputError: It does.
    """
    for name, value in _entries(config):
        if name.endswith(("attn_implementation", "experts_implementation")) and "/" in json.dumps(value):
            raise InputError(
                f"{place} names code of the hub as its {name.strip('_')} ({value!r}): read that code, and if you trust "
                "it load the model yourself and pass it to posterity.measure"
            )
        if arrays is None or isinstance(value, bool) or not isinstance(value, int):
            continue
        if name in SIZES and value > size:
            raise InputError(f"{place}: its {name} is {value}, and its weights are only {size} bytes: get them again")
        if _counts_layers(name):
            if value < 1 and name in ("num_hidden_layers", "n_layer", "num_layers"):
                raise InputError(f"{place}: expected {name} of at least 1; got {value}: mend it")
            if value > arrays:
                raise InputError(
                    f"{place}: its {name} is {value}, and its weights are only {arrays} arrays: get the complete files"
                )


def check_index(index: Any, place: object) -> list[str]:
    """The names of the weight files that an index names.

    Raises:
        InputError: It names what is no safetensors file beside it.
    """
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise InputError(f"{place}: expected the weight_map of an index of weights; it has none: get the file again")
    for file in files.values():
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise InputError(f"{place}: expected safetensors files beside it; it names {file!r}: {TO_SAFETENSORS}")
    return sorted(set(files.values()))


def _weights(folder: Path) -> tuple[int | None, int]:
    """How many arrays the weights hold (None where transformers will not find any), and how many bytes."""
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not os.path.lexists(folder / files[0]):
        if not os.path.lexists(index):
            return None, 0
        files = check_index(read_json(index), index)
    return sum(_arrays_in(folder / file) for file in files), sum((folder / file).stat().st_size for file in files)


def _arrays_in(file: Path) -> int:
    """The number of arrays that the header of a safetensors file lists."""
    damaged = f"cannot load {file.parent}: its weights are damaged (the header of {file.name}): get the files again"
    try:
        with open(file, "rb") as stream:
            size, begin = os.fstat(stream.fileno()).st_size, stream.read(8)
            length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                if begin[:1] == b"\x80" or begin.startswith(b"PK\x03\x04"):
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


def read_json(file: Path) -> Any:
    """The JSON object in a file. InputError for anything else."""
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"expected a file that can be read; {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not a valid JSON file ({error}): get it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: expected a JSON object; got {type(found).__name__}: get it again")
    return found


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a config and of the configs in it."""
    for name, value in config.items():
        yield name, value
        if isinstance(value, dict):
            yield from _entries(value)


def _counts_layers(name: str) -> bool:
    return name in ("n_layer", "n_layers", "num_layers") or (name.startswith("num_") and name.endswith("_layers"))
