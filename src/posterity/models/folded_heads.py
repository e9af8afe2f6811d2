"""Heads that pass their own value on for the length of a `with`, while the rest attends as usual.

`permanent_limits` folds them as long as a model lives.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from posterity.errors import InputError
from posterity.models.attach import first_calls, watch_model
from posterity.models.interception import AttentionCall
from posterity.models.language_model import language_model
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
