"""The language model inside what a user hands over: its device, its modes, its rounding."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from posterity.decomposition.projections import is_packed
from posterity.errors import InputError
from posterity.models.weight_layout import reshard

# What reordered sums move, relative to the largest number; models compute norms and softmax in float32 at most.
ROUNDING = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
ROUNDING_FLOAT32 = 2e-4
_LIMITS = ("max_position_embeddings", "max_target_positions", "n_positions", "max_seq_len", "max_sequence_length")


def language_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside wrappers such as torch.compile's or DDP's.

    Raises:
        InputError: There is none, it is no causal language model by its own account, or a wrapper puts a learned prompt
            in front of every text.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    inner = None
    for module in modules:
        if isinstance(module, PreTrainedModel):
            inner = module
            break
        _refuse_prompts(module)
    if inner is None:
        raise InputError(
            f"expected a causal language model of transformers; got {type(model).__name__}: load it with "
            "AutoModelForCausalLM.from_pretrained, or take posterity.load_model(name).model"
        )
    if inner.config.is_encoder_decoder:
        raise InputError(
            f"{type(inner).__name__} is an encoder-decoder; only decoders with causal attention are measured"
        )
    if inner.get_output_embeddings() is None:
        raise InputError(f"{type(inner).__name__} has no language-model head; load it with AutoModelForCausalLM")
    return inner


def _refuse_prompts(wrapper: nn.Module) -> None:
    """Raise InputError for a model of peft that learns a prompt: virtual tokens, or keys and values of no token."""
    config: Any = getattr(wrapper, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise InputError(
            f"{type(wrapper).__name__} with {kind} puts a learned prompt in front of every text, whose positions have "
            "no tokens and no losses, so that it is not measured: measure the base model by itself, or another adapter"
        )


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that the model takes its tokens on.

    Raises:
        InputError: Its weights hold no numbers, and nothing brings them when they are needed.
    """
    embeddings = model.get_input_embeddings()
    device = next(embeddings.parameters()).device
    if device.type != "meta":
        return device
    hook = getattr(embeddings, "_hf_hook", None)  # accelerate's, which brings offloaded weights
    device = next((x.execution_device for x in getattr(hook, "hooks", [hook]) if hasattr(x, "execution_device")), None)
    if device is None:
        raise InputError(
            "expected a model with weights; its embeddings are on the meta device, without numbers: load it"
        )
    return torch.device(device)


def max_tokens(model: PreTrainedModel) -> int:
    """Return how many tokens the model reads at most by its config; `check_context` tries whether it reads more."""
    config = model.config.get_text_config(decoder=True)
    limits = (getattr(config, name, None) for name in _LIMITS)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), sys.maxsize)


def randomize_weights(model: nn.Module, seed: int) -> PreTrainedModel:
    """Return a model of the same config with random weights, on the same device and in the same precision."""
    inner = language_model(model)
    with seed_rng(seed):
        control = AutoModelForCausalLM.from_config(inner.config, dtype=inner.dtype)
    return control.to(input_device(inner)).eval()  # type: ignore[arg-type]


def enclosing_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the layer around an attention module; the module itself if it stands in a list."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return model.get_submodule(name) if isinstance(parent, nn.ModuleList) else parent


def rounding(dtype: torch.dtype) -> float:
    """Return how far two ways to compute the same may differ, relative to the largest number."""
    return ROUNDING.get(dtype, ROUNDING_FLOAT32)


def max_difference(x: Tensor, y: Tensor) -> float:
    """Return the largest absolute difference, in float32."""
    return (x.float() - y.float()).abs().max().item()


@contextlib.contextmanager
def keep_packing(model: nn.Module) -> Iterator[None]:
    """Within the block, let bitsandbytes not pack 4-bit weights anew for CPUs, for good and without a backward pass.

    It does so in the first forward pass of an evaluation without gradients.
    """
    modules: list[Any] = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    try:
        for module in modules:
            module.support_avx512bf16_for_cpu = False
        yield
    finally:
        for module in modules:
            module.support_avx512bf16_for_cpu = True


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, as it is without torch.compile; restore the mode of each module on exit.

    A compiled pass allows one backward pass only, and would be compiled anew for what is hooked here.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        with keep_packing(module), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def freeze_parameters(model: PreTrainedModel, parameters: bool = False) -> Iterator[None]:
    """Let gradients flow through the activations, in evaluation mode, and to `parameters` only if asked.

    Modes, gradients and what requires them are restored on exit.
    """
    reshard(model)
    states = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    def start_graph(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.requires_grad_().clone() if torch.is_grad_enabled() else output  # some models scale it in place

    hook = model.get_input_embeddings().register_forward_hook(start_graph)
    try:
        with evaluation_mode(model), torch.enable_grad():
            for parameter, _, _ in states:
                parameter.requires_grad_(parameters and not is_packed(parameter))
                parameter.grad = None
            yield
    finally:
        hook.remove()
        reshard(model)
        for parameter, requires_grad, grad in states:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextlib.contextmanager
def replace_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Run these functions in place of the modules' forward; restore a forward of the module's own on exit."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


@contextlib.contextmanager
def seed_rng(seed: int) -> Iterator[None]:
    """Seed the RNG inside the block and restore its state on exit."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
