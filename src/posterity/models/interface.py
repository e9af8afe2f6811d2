"""The functions that transformers calls for attention and for its masks, and the switch of a model to them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from posterity.errors import InputError
from posterity.models.interception import AttentionCall, interceptor_of
from posterity.models.masks import EXPLICIT, explicit_mask, mask_function

NAME = "posterity"  # the operator's name in transformers' registries
TOWERS = ("vision", "image", "audio", "speech")  # in the names of the sub-configs of towers


def register(name: str = NAME, function: Callable | None = None) -> None:
    """Make the operator (or a function around it) known to transformers; a model uses it only when switched to it."""
    AttentionInterface.register(name, function or attention_function)
    AttentionMaskInterface.register(name, explicit_mask if name == EXPLICIT else mask_function)


@torch.compiler.disable
def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers: (batch, head, position, dim) in, (batch, position, head, dim) out.

    Further arguments: see `attention_call`.
    """
    if dropout:
        raise InputError(
            f"expected no attention dropout, got {dropout} in training mode, which makes the edges random: "
            "set attention_dropout (attn_pdrop in GPT-2) of the config to 0, or call model.eval()"
        )
    call = attention_call(module, query, key, value, attention_mask, *args, **kwargs)
    interceptor = interceptor_of(module)
    output = call.output() if interceptor is None else interceptor.attend(call)
    return output.transpose(1, 2).contiguous(), None


def attention_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs,
) -> AttentionCall:
    """Describe the arguments of transformers' attention functions.

    `s_aux` is a sink for each head, (head,); `sinks` one for each query, (batch, head, query, 1).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = s_aux if sinks is None else sinks.squeeze(-1)
    return AttentionCall(module, query, key, value, scale, softcap, sinks, attention_mask, is_causal, kwargs)


@contextlib.contextmanager
def switch_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Route the attention calls of the text model to the function registered under a name; restore every config.

    Raises:
        InputError: The model does not let its attention be exchanged.
    """
    register(name)
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    for config in list(configs.values()):
        parts = (getattr(config, part, None) for part in config.sub_configs)
        configs |= {id(part): part for part in parts if part is not None}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        model.set_attn_implementation(_implementations(model, name))
        if model.config.get_text_config(decoder=True)._attn_implementation != name:
            raise InputError(f"{type(model).__name__} does not let its attention be exchanged")
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def _implementations(model: PreTrainedModel, name: str) -> str | dict[str, Any]:
    """Return the attention of each part of a model: the named one for its text, its own for vision and audio towers."""
    text = model.config.get_text_config(decoder=True)
    parts = [
        part for part in model.config.sub_configs if isinstance(getattr(model.config, part, None), PreTrainedConfig)
    ]
    if text is model.config:
        return dict.fromkeys(["", *(part for part in parts if not any(tower in part for tower in TOWERS))], name)
    part = next((part for part in parts if getattr(model.config, part) is text), None)
    return name if part is None else {"": model.config._attn_implementation, part: name}
