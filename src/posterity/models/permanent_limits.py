"""Models whose attention is limited as long as they live: folded heads, and windows of local layers.

The limits are written into the model's config (`posterity_folded`: heads, `posterity_windows`: a window, by the
`layer_idx` of the module), and its attention is switched to a function that looks them up there. So they go with copies
of the model, and work with a key/value cache: the newest queries get the newest values. The cache still holds keys that
nobody reads. The weights stay those of the model; `inputs.limits_folder` writes and reads the folder.

Measuring exchanges the attention function; the operator (`interface`) then finds the limits in the config, as masks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterity.errors import InputError
from posterity.models.folded_heads import Heads, fold_heads, mask_of_heads, pass_own_values
from posterity.models.interface import attention_function, register
from posterity.models.language_model import input_device, max_difference, rounding
from posterity.models.masks import EXPLICIT, FOLDED, WINDOWS, edges_and_bias, self_only_heads, window_of_layer
from posterity.models.probe import Check, check
from posterity.models.window_limits import Windows, check_windows
from posterity.ops.attention import attention


def fold_permanently(model: PreTrainedModel, heads: Heads) -> None:
    """Let a model run folded from now on.

    Raises:
        InputError: The model cannot be measured; its modules cannot be told apart by `layer_idx`; no such head.
    """
    if check(model).name == EXPLICIT:
        raise InputError(f"{type(model).__name__} computes with its mask: fold it inside a `with` of fold_heads")
    modules, ids = attention_modules(model), torch.arange(1, 9, device=input_device(model))[None]
    ids %= model.config.get_text_config().vocab_size
    with torch.no_grad(), fold_heads(model, heads):
        expected = model(input_ids=ids, use_cache=False).logits
    entry = {str(modules[number].layer_idx): sorted(folded) for number, folded in heads.items() if len(folded)}
    _switch(model, FOLDED, entry)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    if max_difference(expected, logits) > rounding(logits.dtype) * expected.abs().max().item():
        raise InputError(f"{type(model).__name__} cannot run folded: its logits are not those of its folded heads")


def limit_windows_permanently(model: PreTrainedModel, windows: Windows) -> None:
    """Let some layers of a model look back no further than a window from now on.

    Raises:
        InputError: The model cannot be measured; its modules cannot be told apart by `layer_idx`; no such layer.
    """
    if check(model).name == EXPLICIT:
        raise InputError(f"{type(model).__name__} computes with its mask: limit it inside a `with` of limit_windows")
    modules = attention_modules(model)
    check_windows(windows, len(modules))
    _switch(model, WINDOWS, {str(modules[number].layer_idx): window for number, window in sorted(windows.items())})


def attention_modules(model: PreTrainedModel, result: Check | None = None) -> list[Any]:
    """Return the attention modules in order, if each can be found by its `layer_idx` in the text model's config.

    `result`: what `check` says of the model, if it is known already.

    Raises:
        InputError: They cannot; the model cannot be measured.
    """
    result = result or check(model)
    if not result.ok:
        raise InputError(f"this model {result}")
    modules = [model.get_submodule(layer.name) for layer in result.layers]
    indices = [getattr(module, "layer_idx", None) for module in modules]
    config = model.config.get_text_config(decoder=True)
    if None in indices or len({*indices}) < len(indices) or any(module.config is not config for module in modules):
        raise InputError(
            f"{type(model).__name__} cannot be limited for good: its attention modules have no layer_idx of their own; "
            "use fold_heads or limit_windows of posterity.models inside a `with`"
        )
    return modules


def folded_heads_by_layer(model: PreTrainedModel) -> dict[int, list[int]]:
    """Return the heads that a model runs folded, by number of the attention layer."""
    return {number: self_only_heads(module) for number, module in enumerate(attention_modules(model))}


def windows_by_layer(model: PreTrainedModel) -> dict[int, int]:
    """Return the windows in a model's config, by number of the attention layer; not those of its architecture."""
    windows = {number: window_of_layer(module) for number, module in enumerate(attention_modules(model))}
    return {number: window for number, window in windows.items() if window is not None}


def _switch(model: PreTrainedModel, name: str, limits: Mapping[str, Any]) -> None:
    """Write limits into the text model's config, and switch its attention to the function that reads them."""
    register(FOLDED, _limited_attention)
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    setattr(text, name, dict(limits))
    parts = [part for part in config.sub_configs if getattr(config, part, None) is text]
    model.set_attn_implementation({"": config._attn_implementation, parts[0]: FOLDED} if parts else FOLDED)
    if text._attn_implementation != FOLDED:
        raise InputError(f"{type(model).__name__} does not let its attention be exchanged")


@torch.compiler.disable
def _limited_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers: (batch, head, position, dim) in, (batch, position, head, dim) out."""
    folded = self_only_heads(module)
    if not folded:
        attend_all: Any = attention_function  # whose decorator hides its parameters
        return attend_all(module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap, **kwargs)
    if dropout:
        raise InputError("a folded model attends without dropout: set attention_dropout to 0, or call model.eval()")
    mask, bias = edges_and_bias(module, query, key, attention_mask, is_causal, kwargs)
    if bias is not None:
        raise InputError("its attention adds a bias to the scores, which a folded model does not know")

    def attend(query: Tensor, key: Tensor, value: Tensor, rest: list[int]) -> Tensor:
        return attention(query, key, value, scaling, mask=mask_of_heads(mask, rest), softcap=softcap)

    output = pass_own_values(query, key, value, folded, attend)
    return output.transpose(1, 2).contiguous(), None
