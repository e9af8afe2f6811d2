"""The provenance of a result: the model, the machine, the versions."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version

import torch
from torch import nn

from posterity._version import __version__
from posterity.models.language_model import input_device, language_model


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
        "parameters": sum(parameter.numel() for parameter in inner.parameters()),
        "dtype": str(inner.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch_version": version("torch"),
        "transformers_version": version("transformers"),
        "python_version": platform.python_version(),
        "platform": platform.platform(terse=True),
    }
