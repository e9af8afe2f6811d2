"""Load a causal language model and its tokenizer from the hub, a folder, a GGUF file or the embedded default."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from posterity.errors import InputError, first_line
from posterity.inputs.adapter_folder import fit_vocabulary, load_adapter
from posterity.inputs.limits_folder import FOLDED_FILE, apply_limits
from posterity.inputs.model_source import find_model
from posterity.inputs.pretrained import (
    check_architecture,
    explain_loading_errors,
    load_over_devices,
    load_tokenizer,
    load_weights,
)
from posterity.models.language_model import randomize_weights
from posterity.models.transformers_logging import silence_transformers

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPE_ALIASES = {  # besides torch's own half, float and double
    "fp64": "float64", "f64": "float64", "fp32": "float32", "f32": "float32", "single": "float32", "fp16": "float16",
    "f16": "float16", "bf16": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode with its tokenizer; `name` and `revision` say which one, `revision` may be empty."""

    model: Any
    tokenizer: Any
    name: str
    revision: str

    @property
    def attrs(self) -> dict[str, str]:
        """Name and revision as attributes of a result; none for a model without a name, whose config has them."""
        return {"model": self.name, "revision": self.revision} if self.name else {}

    def with_random_weights(self, seed: int = 0) -> "LoadedModel":
        """Return a model of the same config with random weights and the same tokenizer: what did training do?"""
        name = f"{self.name}, random weights" if self.name else ""
        return LoadedModel(randomize_weights(self.model, seed), self.tokenizer, name, "")


def load_model(
    name: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer for measuring.

    What comes back can stand wherever a model can: `posterity.measure(posterity.load_model("gpt2", "bf16"))`.

    Args:
        name: a hub id, a folder (that of `fold` or `windows` gives it with its limits), a `.gguf` file, or None or
            "default" for the embedded SmolLM2-135M-Instruct. A hub id or folder of a peft adapter is loaded over the
            base model that it names, which needs peft (`posterity[peft]`).
        dtype: such as "float32", "bf16" or torch.bfloat16; None keeps the type that the weights are stored in.
        device: such as "cpu" or "cuda:1"; None takes the CUDA device of this process, or the CPU when there is none;
            "auto" spreads a model that is larger than one device over all of them.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: let the model's own Python code run.

    Raises:
        InputError: when the model cannot be found, is incomplete, or is no causal language model.
    """
    weights_dtype = parse_dtype(dtype)
    target = None if device == "auto" else select_device(device)
    with silence_transformers():
        source = find_model(None if name is None else os.fspath(name), revision)
        adapter = source.adapter
        if adapter is not None and trust_remote_code:
            raise adapter.error("no code of a base model runs that an adapter names (--trust-remote-code)")
        with explain_loading_errors(source.name if adapter is None else adapter.base, trust_remote_code):
            options = {"revision": source.commit, "trust_remote_code": trust_remote_code}
            check_architecture(source.path, source.name, **options)
            if adapter is not None and (adapter.folder / "tokenizer_config.json").is_file():
                tokenizer = load_tokenizer(str(adapter.folder), source.name)
            else:
                tokenizer = load_tokenizer(source.path, source.name, **options)
            if target is None:
                model = load_over_devices(source.path, dtype=weights_dtype, **options).eval()
            else:
                model = load_weights(source.path, dtype=weights_dtype, **options).to(target).eval()
        apply_limits(model, source.path)
        if adapter is not None:
            fit_vocabulary(model, tokenizer, adapter)
            model = load_adapter(model, adapter, keep_dtype=dtype is not None)
    model.config._name_or_path = source.name  # else the folder that it was read from, such as that of a cache
    return LoadedModel(model, tokenizer, source.name, source.revision)


def load_folded(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Load a model that `posterity fold` wrote; it runs folded for good, and can be measured as it is.

    Raises:
        InputError: The folder holds no folded model, or one that is damaged.
    """
    if not (Path(folder) / FOLDED_FILE).is_file():
        raise InputError(
            f"expected a folder that `posterity fold` wrote; {folder} has no {FOLDED_FILE}: load it as any model"
        )
    return load_model(folder).model


def parse_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    """Return a dtype for weights from its name; "auto", the type they are stored in, for None."""
    if dtype is None or dtype == "auto":
        return "auto"
    name = dtype.lower().removeprefix("torch.") if isinstance(dtype, str) else ""
    weights_dtype = getattr(torch, DTYPE_ALIASES.get(name, name), None) if name else dtype
    if not isinstance(weights_dtype, torch.dtype) or weights_dtype not in DTYPES:
        raise InputError(
            "expected a dtype of float64 (fp64), float32 (fp32), bfloat16 (bf16) or float16 (fp16, half); got "
            f"{dtype}: change --dtype"
        )
    return weights_dtype


def select_device(device: str | torch.device | None) -> torch.device:
    """Return the device of a name; for None the CUDA device of this process, or the CPU when there is none."""
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    devices = ", ".join(available_devices())
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"expected a device that this torch has ({devices}); got {device}: choose another") from error
    try:
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error).partition(". ")[0]
        raise InputError(
            f"expected a device that this torch has ({devices}); {device} gives: {reason}: choose another"
        ) from error
    if target.type == "meta":
        raise InputError(f"expected a device that holds numbers ({devices}); got meta: choose another")
    return target


def available_devices() -> list[str]:
    """Return the names of this machine's devices that this torch can use: cpu, and those of its accelerator."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count()))]
