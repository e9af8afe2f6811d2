"""The language model inside what a user hands over: its device, its modes, its rounding."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterity.errors import InputError


def language_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers such as torch.compile's or DDP's.

    Raises:
        InputError: There is none, or it is no causal language model by its own account.
    """
    inside = model.modules() if isinstance(model, nn.Module) else ()
    found = next((module for module in inside if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise InputError(
            f"expected a causal language model of transformers; got {type(model).__name__}: load it with "
            "AutoModelForCausalLM.from_pretrained"
        )
    if found.config.is_encoder_decoder:
        raise InputError(
            f"{type(found).__name__} is an encoder-decoder; only decoders with causal attention are measured"
        )
    if found.get_output_embeddings() is None:
        raise InputError(f"{type(found).__name__} has no language-model head; load it with AutoModelForCausalLM")
    return found


def first_device(model: PreTrainedModel) -> torch.device:
    """Where the model wants its tokens."""
    return next(model.get_input_embeddings().parameters()).device


# What reordered sums move, relative to the largest number; models compute norms and softmax in float32 at most.
ROUNDING = {torch.float16: 2e-2, torch.bfloat16: 5e-2}


ROUNDING_FLOAT32 = 2e-4


def rounding(dtype: torch.dtype) -> float:
    """How far two ways to compute the same may differ, relative to the largest number."""
    return ROUNDING.get(dtype, ROUNDING_FLOAT32)


def differ(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference."""
    return (one.float() - other.float()).abs().max().item()


@contextlib.contextmanager
def frozen(model: PreTrainedModel, parameters: bool = False) -> Iterator[None]:
    """Evaluation mode; gradients flow through the activations, and to `parameters` only if asked; then as before."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    def start_here(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.requires_grad_().clone() if torch.is_grad_enabled() else output  # some models scale it in place

    hook = model.get_input_embeddings().register_forward_hook(start_here)
    try:
        model.eval().requires_grad_(parameters)
        for parameter, _, _ in wanted:
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        for module, mode in modes:
            module.training = mode
        for parameter, want, grad in wanted:
            parameter.requires_grad_(want)
            parameter.grad = grad


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, random numbers begin with a seed; outside, none has been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def holder(model: nn.Module, name: str) -> nn.Module:
    """The layer around an attention module; the module itself if it stands in a list."""
    around = model.get_submodule(name.rpartition(".")[0])
    return model.get_submodule(name) if isinstance(around, nn.ModuleList) else around
