"""The folder of a peft adapter: checked as a model's is, and loaded over the base model that it names.

`adapter_config.json` comes from whoever wrote the adapter: the base that it names is looked up like any name of a
model, and nothing in it may import code.
"""

import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from posterity.errors import InputError, first_line
from posterity.inputs.model_files import ADAPTER_CONFIG, PICKLE_PATTERNS, count_arrays, read_json
from posterity.models.language_model import language_model

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BY_HAND = "load it with peft (PeftModel.from_pretrained(base, adapter)) and pass that model to posterity.measure"
_IMPORTING = ("megatron_config", "adapters")  # entries by which peft imports a module, or reads other folders


@dataclass(frozen=True)
class Adapter:
    """A checked folder with an adapter, the name that the user gave it, and the base model that its config names."""

    folder: Path
    name: str
    base: str
    base_revision: str | None

    def error(self, reason: str, advice: str = BY_HAND) -> InputError:
        """Return the error that names the adapter and its base."""
        return InputError(f"cannot load {self.name}, an adapter over the base model {self.base}: {reason}: {advice}")


def check_adapter_folder(folder: Path, name: str) -> Adapter:
    """Check the files of an adapter before peft reads them.

    Raises:
        InputError: It names no base model, has no safetensors weights, or is not what its names say; peft is missing.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base.strip() or not isinstance(revision, str | None):
        raise InputError(
            f"expected the base model of the adapter {name}; its {ADAPTER_CONFIG} names {base!r}: {BY_HAND}"
        )
    adapter = Adapter(folder, name, base, revision)
    if importlib.util.find_spec("peft") is None:
        raise adapter.error("peft is not installed", f"pip install 'posterity[peft]', or {BY_HAND} elsewhere")
    for entry in _IMPORTING:
        if config.get(entry):
            raise adapter.error(f"its {entry} would let it import code or read other folders")
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        pickled = any(True for pattern in PICKLE_PATTERNS for _ in folder.glob(f"adapter_model{pattern[1:]}"))
        raise adapter.error(f"expected {ADAPTER_WEIGHTS}" + (", and it has pickled weights" if pickled else ""))
    count_arrays(weights)
    size = weights.stat().st_size
    largest = max(_numbers(config), default=0)
    if largest > size:
        raise adapter.error(f"its config has the size {largest}, and its weights are only {size} bytes")
    return adapter


def load_adapter(base: nn.Module, adapter: Adapter, keep_dtype: bool) -> Any:
    """Put an adapter on its base model, which is changed.

    Args:
        base: The base model, on its device.
        adapter: The checked folder.
        keep_dtype: Whether the adapter takes the dtype of the base; else peft makes half precision float32.

    Returns:
        The model of peft.

    Raises:
        InputError: The adapter does not fit, is not complete, or is of a kind that cannot be measured.
    """
    import peft  # an optional library

    try:
        config: Any = peft.PeftConfig.from_pretrained(str(adapter.folder))
        config.inference_mode = True
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
            model = peft.PeftModelForCausalLM(base, config, autocast_adapter_dtype=not keep_dtype)
        language_model(model)
        device = next(base.parameters()).device
        keys = model.load_adapter(
            str(adapter.folder), "default", torch_device=str(device), autocast_adapter_dtype=not keep_dtype
        )
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an adapter that does not fit can fail anywhere inside peft
        raise adapter.error(first_line(error)) from error
    # Beside those of the adapter the file may hold embeddings twice.
    prefix = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    unexpected = [key for key in keys.unexpected_keys if prefix in key]
    for arrays, words in ((keys.missing_keys, "lacks"), (unexpected, "has, and its config has no place for,")):
        if arrays:
            raise adapter.error(f"{ADAPTER_WEIGHTS} {words} {len(arrays)} arrays, such as {min(arrays)}")
    return model.eval()


def fit_vocabulary(base: Any, tokenizer: Any, adapter: Adapter) -> None:
    """Make room for tokens that an adapter adds to its base, as peft does, if the adapter brings their embeddings.

    Raises:
        InputError: It does not: they would be random numbers.
    """
    rows = base.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return
    name = next(name for name, module in base.named_modules() if module is base.get_input_embeddings())
    with safe_open(adapter.folder / ADAPTER_WEIGHTS, "pt") as weights:
        if not any(f".{name}." in f".{key}." for key in weights.keys()):  # noqa: SIM118
            raise adapter.error(f"its tokenizer has {len(tokenizer)} tokens, its base {rows}, and it has no new ones")
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def _numbers(config: Any) -> Iterator[int]:
    """Yield the whole numbers anywhere in a config."""
    if isinstance(config, int) and not isinstance(config, bool):
        yield config
    elif isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _numbers(value)
