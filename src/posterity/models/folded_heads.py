"""A model that runs folded for good: some heads pass their own value on, the rest attends as usual.

The weights are those of the model, in an ordinary folder of transformers, which plain transformers loads and runs
unfolded. Which heads are folded stands in `folded.json` beside them. `load_folded`, and whatever else of posterity
loads that folder, writes them into the model's config (`posterity_folded`: heads by the `layer_idx` of their module)
and switches its attention to a function that looks them up there. So the fold lives as long as the model, copies
included, and works with a key/value cache: the newest queries get the newest values. The cache still holds the keys
of folded heads, which nobody reads.

Measuring exchanges the attention function; the operator (hook.py) then finds the folded heads in the config too, as
heads whose mask leaves the self edge only.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterity.errors import InputError
from posterity.models.attach import watching
from posterity.models.interface import FOLDED, folded_heads, register
from posterity.models.language_model import differ, first_device, frozen, language_model, rounding
from posterity.models.masks import WRITTEN, edges_and_bias
from posterity.models.probe import check
from posterity.models.watch import Attending, Layer, Watch
from posterity.ops.attention import attention
from posterity.ops.mask import Mask

Heads = Mapping[int, Sequence[int]]  # query heads by number of the attention layer


def keep_folded(model: PreTrainedModel, heads: Heads) -> None:
    """Let a model run folded from now on.

    Raises:
        InputError: The model cannot be measured; its modules cannot be told apart by `layer_idx`; no such head.
    """
    if check(model).name == WRITTEN:
        raise InputError(f"{type(model).__name__} computes with its mask: fold it inside a `with` of folding")
    modules, ids = attention_modules(model), torch.arange(1, 9, device=first_device(model))[None]
    ids %= model.config.get_text_config().vocab_size
    with torch.no_grad(), folding(model, heads):
        wanted = model(input_ids=ids, use_cache=False).logits
    _switch(model, {str(modules[number].layer_idx): sorted(some) for number, some in heads.items() if len(some)})
    with torch.no_grad():
        given = model(input_ids=ids, use_cache=False).logits
    if differ(wanted, given) > rounding(given.dtype) * wanted.abs().max().item():
        raise InputError(f"{type(model).__name__} cannot run folded: its logits are not those of its folded heads")


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """The attention modules in order, if each can be found by its `layer_idx` in the text model's config.

    Raises:
        InputError: They cannot; the model cannot be measured.
    """
    found = check(model)
    if not found.ok:
        raise InputError(f"this model {found}")
    modules = [model.get_submodule(layer.name) for layer in found.layers]
    numbers = [getattr(module, "layer_idx", None) for module in modules]
    config = model.config.get_text_config(decoder=True)
    if None in numbers or len({*numbers}) < len(numbers) or any(one.config is not config for one in modules):
        raise InputError(
            f"{type(model).__name__} cannot run folded for good: its attention modules have no layer_idx of their own; "
            "use posterity.models.folded_heads.folding inside a `with`"
        )
    return modules


def pass_own_values(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Sequence[int],
    attend: Callable[[Tensor, Tensor, Tensor, list[int]], Tensor],
) -> Tensor:
    """(batch, head, query, dim_v): the own value for these heads; the rest attends, and only the rest is computed.

    Queries stand at the last positions. `attend(query, key, value, rest)` gets the rest's, one key and value a head.
    """
    of, newest = query.shape[1], value[:, :, value.shape[2] - query.shape[2] :]
    output = newest.repeat_interleave(of // value.shape[1], 1)
    rest = [head for head in range(of) if head not in heads]
    if rest:
        shared = [head // (of // value.shape[1]) for head in rest]
        output[:, rest] = attend(query[:, rest], key[:, shared], value[:, shared], rest).to(output.dtype)
    return output


def mask_of(mask: Mask, heads: Sequence[int]) -> Mask:
    """The mask of some heads of a call."""
    rule = mask.allowed
    if rule is None:
        return mask

    def allowed(query: Tensor, key: Tensor) -> Tensor:
        edges = rule(query, key)
        return edges[..., list(heads), :, :] if edges.dim() > 2 and edges.shape[-3] > 1 else edges

    return Mask(allowed, mask.padding)


def _own(model: PreTrainedModel) -> dict[int, list[int]]:
    """The heads that a model passes on already, by number of the attention layer."""
    return {number: folded_heads(module) for number, module in enumerate(attention_modules(model))}


def _switch(model: PreTrainedModel, heads: Mapping[str, Sequence[int]]) -> None:
    register(FOLDED, _folded_attention)
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    setattr(text, FOLDED, {key: list(some) for key, some in heads.items()})
    names = [name for name in config.sub_configs if getattr(config, name, None) is text]
    model.set_attn_implementation({"": config._attn_implementation, names[0]: FOLDED} if names else FOLDED)


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
        return attention(query, key, value, scaling, mask=mask_of(mask, rest), softcap=softcap)

    output = pass_own_values(query, key, value, folded_heads(module), attend)
    return output.transpose(1, 2).contiguous(), None


Head = tuple[int, int]  # number of the attention layer, query head


@contextlib.contextmanager
def folding(model: nn.Module, heads: Mapping[int, Iterable[int]] | Iterable[Head]) -> Iterator[None]:
    """Inside, these heads pass their own value on, and the rest attends as usual; gradients flow.

    Args:
        model: A causal language model of transformers; restored on exit.
        heads: Query heads by number of the attention layer, or pairs (layer, head).

    Raises:
        InputError: No such head; a model that cannot be measured; one with attention sinks, which take a part of the
            weight even where a position sees only itself.
    """
    given: Any = heads
    if isinstance(heads, Mapping):
        given = [(layer, head) for layer, some in heads.items() for head in some]
    pairs: list[Head] = list(given)
    with watching(model) as watch:
        counts = head_counts(model)
        for layer, head in pairs:
            if not 0 <= layer < len(counts) or not 0 <= head < counts[layer]:
                most = f"layers from 0 to {len(counts) - 1} and heads from 0 to {max(counts) - 1}"
                raise InputError(f"expected heads (layer, head), {most}; got ({layer}, {head})")
        with watch.replacing(_Replacement(watch, heads_by_layer(pairs))):
            yield


class _Replacement:
    """The output of an attention call with folded heads; None for a layer that has none."""

    def __init__(self, watch: Watch, heads: Mapping[int, Sequence[int]]):
        self.outer = watch.replacement
        self.heads = {watch.layers[number]: some for number, some in heads.items()}

    def __call__(self, layer: Layer, given: Attending) -> Tensor | None:
        whole = None if self.outer is None else self.outer(layer, given)
        heads = self.heads.get(layer)
        if not heads:
            return whole

        def attend(query: Tensor, key: Tensor, value: Tensor, rest: list[int]) -> Tensor:
            if whole is not None:
                return whole[:, rest]
            return attention(query, key, value, given.scale, mask=mask_of(given.mask, rest), softcap=given.softcap)

        return pass_own_values(given.query, given.key, given.value, heads, attend)


def head_counts(model: nn.Module) -> list[int]:
    """Query heads of every attention layer.

    Raises:
        InputError: Its attention has sinks: then a head that sees only itself does not pass its own value on.
    """
    inner, counts = language_model(model), []

    def note(layer: Layer, given: Attending) -> None:
        if given.sinks is not None:
            raise InputError(
                f"{type(inner).__name__} cannot be folded: its attention has sinks (in {layer}), which take a part of "
                "the weight even where a position sees only itself"
            )
        counts.append(given.query.shape[1])

    ids = torch.zeros(1, 2, dtype=torch.long, device=first_device(inner))
    with watching(inner) as watch, watch.replacing(note), frozen(inner), torch.no_grad():
        inner(input_ids=ids, use_cache=False)
    return counts


def heads_by_layer(heads: Iterable[Head]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for layer, head in sorted({*heads}):
        found.setdefault(layer, []).append(head)
    return found
