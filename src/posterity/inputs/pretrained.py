"""Read weights and tokenizer of a pretrained model with transformers; what it says about broken ones becomes one line.

Weights are read from safetensors only, and a model's own code runs only when that was asked for.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import cached_file

from posterity.errors import InputError, first_line
from posterity.inputs.model_files import TO_SAFETENSORS, check_config, check_index, read_json


def check_architecture(path: str, name: str, **options: Any) -> None:
    """Refuse a model that is no causal language model before its weights are read.

    Args:
        path: A folder or a hub id.
        name: The model's name for messages.
        **options: `revision` and `trust_remote_code` of transformers.
    """
    if not os.path.isdir(path):
        _check_hub_files(path, options["revision"])
    config = AutoConfig.from_pretrained(path, **options)
    if "Regressor" in (config.architectures or ()):
        raise InputError(
            f"expected a causal language model; {name} is a run of the task sines, which reads numbers: "
            "`posterity compare` and posterity.training.myopia read it"
        )
    has_code = options["trust_remote_code"] and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    reason = f"expected a causal language model; {name} is of type {config.model_type}"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{reason}, an encoder-decoder: choose a decoder-only model")
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise InputError(
            f"{reason}, a masked language model whose attention is not causal: choose a decoder-only model"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_code:
        raise InputError(f"{reason}, which predicts no next token: choose a decoder-only model")


def _check_hub_files(path: str, commit: str | None) -> None:
    """Check config and index as `check_model_folder` does, as far as it matters for files downloaded one by one."""
    for name, check in (("config.json", check_config), ("model.safetensors.index.json", check_index)):
        file = cached_file(path, name, revision=commit, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            check(read_json(Path(file)), name)


def load_tokenizer(path: str, name: str, **options: Any) -> Any:
    """Load the tokenizer that lies beside the weights.

    Raises:
        InputError: There is none, or it is broken.
    """
    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # a broken file can fail anywhere inside tokenizers
        if "trust_remote_code" in str(error):
            raise
        raise InputError(
            f"expected a tokenizer with {name}; loading it gives: {first_line(error).removesuffix(' from one of:')}: "
            "put tokenizer.json beside the weights"
        ) from error


def load_weights(path: str, **options: Any) -> Any:
    """Load a model with all of its weights: a missing part would be random numbers.

    Raises:
        InputError: Some are missing.
    """
    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"expected all weights of the model; {path} lacks {len(missing)} of them, such as {missing[0]}: "
            "get the complete files"
        )
    return model


def load_over_devices(path: str, **options: Any) -> Any:
    """Load a model over all devices of this machine.

    Raises:
        InputError: It does not fit; several processes of this machine would each do so.
    """
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise InputError(
            "--device auto spreads one model over all devices of a machine; with several processes on it each would: "
            "start one process a machine, or leave --device out"
        )
    model = load_weights(path, device_map="auto", **options)
    offloaded = [name for name, x in model.named_parameters() if x.is_meta]
    if offloaded:
        raise InputError(
            f"expected a model that fits on the devices of this machine; {len(offloaded)} of its weights, such as "
            f"{offloaded[0]}, do not: choose --dtype bfloat16, or a machine with more memory"
        )
    return model


@contextmanager
def explain_loading_errors(name: str, trust_remote_code: bool) -> Iterator[None]:
    """Turn every exception about a user's model, except a lack of memory, into an InputError of one line."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # files that are not as they should be can fail anywhere inside transformers
        text = str(error)
        if "out of memory" in text.lower() or "can't allocate memory" in text:
            raise
        if "trust_remote_code" in text and not trust_remote_code:
            advice = "it needs Python code of its own: read that code, and if you trust it add --trust-remote-code"
        elif "does not recognize this architecture" in text or "Unrecognized model" in text:
            advice = f"{first_line(error).partition('. ')[0]}: check config.json, or update transformers"
        elif "safetensors" in text and "does not appear to have" in text:
            advice = f"it has no safetensors weights: {TO_SAFETENSORS}"
        elif isinstance(error, SafetensorError):
            advice = f"its weights are damaged ({first_line(error)}): get the files again"
        elif "ignore_mismatched_sizes" in text:
            advice = "its weights have other shapes than its config.json says"
        elif isinstance(error, (OSError, ImportError)):
            advice = first_line(error)
        else:
            advice = f"{' '.join(text.split())[:300] or 'no reason given'} ({type(error).__name__}): check its files"
        raise InputError(f"cannot load {name}: {advice}") from error
