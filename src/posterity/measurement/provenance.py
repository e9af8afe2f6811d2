"""The provenance of a result: the model, the machine, the versions."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version

import torch
from torch import nn

from posterity._version import __version__
from posterity.models.language_model import input_device, language_model
from posterity.models.packed_weights import packing_kinds


def provenance(model: nn.Module) -> dict[str, object]:
    """Return the attributes of a result that follow from the model and the machine."""
    inner = language_model(model)
    device = input_device(inner)
    return {
        "posterity_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": inner.config._name_or_path or type(inner).__name__,
        "revision": getattr(inner.config, "_commit_hash", None) or "",
        "architecture": type(inner).__name__,
        "base_model": _base_model(inner),
        "adapters": _adapters(inner),
        "parameters": inner.num_parameters(),
        "packed_weights": ", ".join(packing_kinds(inner)),
        "dtype": str(inner.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch_version": version("torch"),
        "transformers_version": version("transformers"),
        "python_version": platform.python_version(),
        "platform": platform.platform(terse=True),
    }


def _adapters(model: nn.Module) -> str:
    """Return names and kinds of the adapters that peft has put into a model; "" for none."""
    configs = getattr(model, "peft_config", None) or {}
    return ", ".join(f"{name} ({getattr(x.peft_type, 'value', x.peft_type)})" for name, x in configs.items())


def _base_model(model: nn.Module) -> str:
    """Return the base models that the adapters name; "" without adapters."""
    configs = getattr(model, "peft_config", None) or {}
    return ", ".join(dict.fromkeys(str(x.base_model_name_or_path or "") for x in configs.values()))
