"""Where a result comes from: the model, the machine, the versions."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version

import torch
from torch import nn

import posterity
from posterity.models import language_model


def provenance(model: nn.Module) -> dict[str, object]:
    """Attributes of a result that the model and the machine know by themselves."""
    inner = language_model(model)
    weight = inner.get_input_embeddings().weight
    return {
        "posterity_version": posterity.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": inner.config._name_or_path or type(inner).__name__,
        "revision": getattr(inner.config, "_commit_hash", None) or "",
        "architecture": type(inner).__name__,
        "parameters": sum(parameter.numel() for parameter in inner.parameters()),
        "dtype": str(inner.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else str(weight.device),
        "torch_version": version("torch"),
        "transformers_version": version("transformers"),
        "python_version": platform.python_version(),
        "platform": platform.platform(terse=True),
    }
