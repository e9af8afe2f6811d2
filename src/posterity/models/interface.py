"""What transformers calls: the attention function and the mask function, and the switch of a model to them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from posterity.errors import InputError
from posterity.models.masks import WRITTEN, edges_and_bias, mask_function, written_mask
from posterity.models.recompute import capturing
from posterity.models.watch import Attending, Recorder, Watch, watches
from posterity.ops.attention import attention

NAME = "posterity"


FOLDED = "posterity_folded"  # of a config: which heads pass their own value on (folded.py), by `layer_idx`


def register(name: str = NAME, function: Callable | None = None) -> None:
    """Make the operator (or a function around it) known to transformers; a model uses it only when switched to it."""
    AttentionInterface.register(name, function or _attention_function)
    AttentionMaskInterface.register(name, written_mask if name == WRITTEN else mask_function)


@torch.compiler.disable
def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention for transformers: (batch, head, position, dim) in, (batch, position, head, dim) out."""
    if dropout:
        raise InputError(
            f"expected no attention dropout, got {dropout} in training mode, which makes the edges random: "
            "set attention_dropout (attn_pdrop in GPT-2) of the config to 0, or call model.eval()"
        )
    if (capture := capturing(module)) is not None:
        bias = kwargs.get("position_bias")
        return capture(query, key, value, attention_mask if bias is None else bias), None
    if (sinks := kwargs.pop("sinks", None)) is not None:  # one for each query: (batch, head, query, 1)
        s_aux = sinks.squeeze(-1)
    mask, bias = edges_and_bias(module, query, key, attention_mask, is_causal, kwargs)
    if folded := folded_heads(module):
        mask = mask.self_only(folded, query.shape[1])
    watch = watches.get(module)
    if isinstance(watch, Recorder) and watch.cut:
        watch.passed(module, (query, key, value), bias)
        return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[3]), None
    if not isinstance(watch, Watch):
        if watch is not None:
            watch.called(module, query, key)
        output = attention(query, key, value, scaling, mask=mask, softcap=softcap, sinks=s_aux, bias=bias)
        return output.transpose(1, 2).contiguous(), None
    if watch.right_only and mask.padding is not None and not mask.padding[:, 0].all():
        raise InputError(
            "in this model what stands at padding reaches the tokens after it, whatever it is: put the padding on the "
            "right"
        )
    call = watch.called(module, query, key, value)
    if watch.replacement is not None:
        if bias is not None:
            raise InputError(f"{call.layer} adds a bias to the scores, which this measurement does not know")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        replaced = watch.replacement(call.layer, Attending(query, key, value, scale, mask, softcap, s_aux))
        if replaced is not None:
            return replaced.transpose(1, 2).contiguous(), None
    output = attention(
        query, key, value, scaling, mask=mask, softcap=softcap, sinks=s_aux, bias=bias,
        horizon=call.rules, detached=call.detached, observe=call.report,
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def folded_heads(module: nn.Module) -> list[int]:
    """The heads of a module that pass their own value on, in a model that runs folded."""
    folded = getattr(getattr(module, "config", None), FOLDED, None)
    return folded.get(str(getattr(module, "layer_idx", None)), []) if folded else []


SENSES = ("vision", "image", "audio", "speech")  # in the names of sub-configs


@contextlib.contextmanager
def switched(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Route the text model's attention calls to the operator's function; restore every config afterwards."""
    register(name)
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    for config in list(configs.values()):
        parts = (getattr(config, name, None) for name in config.sub_configs)
        configs |= {id(part): part for part in parts if part is not None}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    text = model.config.get_text_config(decoder=True)
    parts = [
        part for part in model.config.sub_configs if isinstance(getattr(model.config, part, None), PreTrainedConfig)
    ]
    if text is model.config:  # all but the towers that see and hear
        wanted = dict.fromkeys(["", *(part for part in parts if not any(sense in part for sense in SENSES))], name)
    else:
        own = next((part for part in parts if getattr(model.config, part) is text), None)
        wanted = name if own is None else {"": model.config._attn_implementation, own: name}
    try:
        model.set_attn_implementation(wanted)
        if text._attn_implementation != name:
            raise InputError(f"{type(model).__name__} does not let its attention be exchanged")
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
