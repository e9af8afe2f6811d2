"""Models with folded heads: some heads pass their own value on, the rest attends as usual.

`fold_heads` folds them for the length of a `with`. `fold_permanently` folds them as long as the model lives: the heads
are written into the model's config (`posterity_folded`: heads by the `layer_idx` of their module), and its attention is
switched to a function that looks them up there. So the fold goes with copies of the model, and works with a key/value
cache: the newest queries get the newest values. The cache still holds the keys of folded heads, which nobody reads. The
weights stay those of the model; `inputs.folded_folder` writes and reads the folder of a folded model.

Measuring exchanges the attention function; the operator (`interface`) then finds the folded heads in the config too, as
heads whose mask leaves the self edge only.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterity.errors import InputError
from posterity.models.attach import first_calls, watch_model
from posterity.models.interception import AttentionCall
from posterity.models.interface import register
from posterity.models.language_model import input_device, language_model, max_difference, rounding
from posterity.models.masks import EXPLICIT, FOLDED, edges_and_bias, self_only_heads
from posterity.models.probe import check
from posterity.models.watch import Layer, Watch
from posterity.ops.attention import attention
from posterity.ops.heads import repeat_heads
from posterity.ops.mask import Mask

Heads = Mapping[int, Sequence[int]]  # query heads by number of the attention layer
HeadIndex = tuple[int, int]  # number of the attention layer, query head
Attend = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]  # query, key, value and the numbers of some heads


@contextlib.contextmanager
def fold_heads(model: nn.Module, heads: Mapping[int, Iterable[int]] | Iterable[HeadIndex]) -> Iterator[None]:
    """Let these heads pass their own value on within the block; the rest attends as usual, and gradients flow.

    Args:
        model: A causal language model of transformers; restored on exit.
        heads: Query heads by number of the attention layer, or pairs (layer, head).

    Raises:
        InputError: No such head; a model that cannot be measured; one with attention sinks, which take a part of the
            weight even where a position sees only itself.
    """
    pairs: list[Any] = list(heads)
    if isinstance(heads, Mapping):
        pairs = [(layer, head) for layer, numbers in heads.items() for head in numbers]
    with watch_model(model) as watch:
        counts = foldable_head_counts(model)
        for layer, head in pairs:
            if not 0 <= layer < len(counts) or not 0 <= head < counts[layer]:
                most = f"layers from 0 to {len(counts) - 1} and heads from 0 to {max(counts) - 1}"
                raise InputError(f"expected heads (layer, head), {most}; got ({layer}, {head})")
        with watch.replace_outputs(_FoldedOutput(watch, heads_by_layer(pairs))):
            yield


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
    _switch(model, {str(modules[number].layer_idx): sorted(folded) for number, folded in heads.items() if len(folded)})
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    if max_difference(expected, logits) > rounding(logits.dtype) * expected.abs().max().item():
        raise InputError(f"{type(model).__name__} cannot run folded: its logits are not those of its folded heads")


def foldable_head_counts(model: nn.Module) -> list[int]:
    """Return the number of query heads of every attention layer of a model that can be folded.

    Raises:
        InputError: Its attention has sinks: then a head that sees only itself does not pass its own value on.
    """
    calls = first_calls(model)
    for layer, call in calls:
        if call.sinks is not None:
            raise InputError(
                f"{type(language_model(model)).__name__} cannot be folded: its attention has sinks (in {layer}), which "
                "take a part of the weight even where a position sees only itself"
            )
    return [call.query.shape[1] for _, call in calls]


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """Return the attention modules in order, if each can be found by its `layer_idx` in the text model's config.

    Raises:
        InputError: They cannot; the model cannot be measured.
    """
    result = check(model)
    if not result.ok:
        raise InputError(f"this model {result}")
    modules = [model.get_submodule(layer.name) for layer in result.layers]
    indices = [getattr(module, "layer_idx", None) for module in modules]
    config = model.config.get_text_config(decoder=True)
    if None in indices or len({*indices}) < len(indices) or any(module.config is not config for module in modules):
        raise InputError(
            f"{type(model).__name__} cannot run folded for good: its attention modules have no layer_idx of their own; "
            "use posterity.models.folded_heads.fold_heads inside a `with`"
        )
    return modules


def folded_heads_by_layer(model: PreTrainedModel) -> dict[int, list[int]]:
    """Return the heads that a model runs folded, by number of the attention layer."""
    return {number: self_only_heads(module) for number, module in enumerate(attention_modules(model))}


def heads_by_layer(heads: Iterable[HeadIndex]) -> dict[int, list[int]]:
    """Group pairs (layer, head) by layer, both in order."""
    groups: dict[int, list[int]] = {}
    for layer, head in sorted({*heads}):
        groups.setdefault(layer, []).append(head)
    return groups


class _FoldedOutput:
    """Replacement of the output of attention calls with folded heads, around the replacement of an outer `with`."""

    def __init__(self, watch: Watch, heads: Mapping[int, Sequence[int]]):
        self.outer = watch.replacement
        self.heads = {watch.layers[number]: folded for number, folded in heads.items()}

    def __call__(self, layer: Layer, call: AttentionCall) -> Tensor | None:
        output = None if self.outer is None else self.outer(layer, call)
        heads = self.heads.get(layer)
        if not heads:
            return output

        def attend(query: Tensor, key: Tensor, value: Tensor, rest: list[int]) -> Tensor:
            if output is not None:
                return output[:, rest]
            return attention(query, key, value, call.scale, mask=mask_of_heads(call.mask, rest), softcap=call.softcap)

        return pass_own_values(call.query, call.key, call.value, heads, attend)


def pass_own_values(query: Tensor, key: Tensor, value: Tensor, heads: Sequence[int], attend: Attend) -> Tensor:
    """Return (batch, head, query, dim_v): the own value for these heads; the rest attends, and only it is computed.

    Queries stand at the last positions. `attend(query, key, value, rest)` gets the rest's, one key and value a head.
    """
    count, newest = query.shape[1], value[:, :, value.shape[2] - query.shape[2] :]
    output = repeat_heads(newest, count)
    rest = [head for head in range(count) if head not in heads]
    if rest:
        groups = [head // (count // value.shape[1]) for head in rest]
        output[:, rest] = attend(query[:, rest], key[:, groups], value[:, groups], rest).to(output.dtype)
    return output


def mask_of_heads(mask: Mask, heads: Sequence[int]) -> Mask:
    """Return the mask of some heads of a call."""
    rule = mask.allowed
    if rule is None:
        return mask

    def allowed(query: Tensor, key: Tensor) -> Tensor:
        edges = rule(query, key)
        return edges[..., list(heads), :, :] if edges.dim() > 2 and edges.shape[-3] > 1 else edges

    return Mask(allowed, mask.padding)


def _switch(model: PreTrainedModel, heads: Mapping[str, Sequence[int]]) -> None:
    """Write folded heads into the text model's config, and switch its attention to the function that reads them."""
    register(FOLDED, _folded_attention)
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    setattr(text, FOLDED, {index: list(folded) for index, folded in heads.items()})
    parts = [part for part in config.sub_configs if getattr(config, part, None) is text]
    model.set_attn_implementation({"": config._attn_implementation, parts[0]: FOLDED} if parts else FOLDED)


@torch.compiler.disable
def _folded_attention(
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
    if dropout:
        raise InputError("a folded model attends without dropout: set attention_dropout to 0, or call model.eval()")
    mask, bias = edges_and_bias(module, query, key, attention_mask, is_causal, kwargs)
    if bias is not None:
        raise InputError("its attention adds a bias to the scores, which a folded model does not know")

    def attend(query: Tensor, key: Tensor, value: Tensor, rest: list[int]) -> Tensor:
        return attention(query, key, value, scaling, mask=mask_of_heads(mask, rest), softcap=softcap)

    output = pass_own_values(query, key, value, self_only_heads(module), attend)
    return output.transpose(1, 2).contiguous(), None
