"""Patched forward passes: losses without some edges of attention, or with some keys and values replaced.

A patch changes one head or all, in one layer or all. The patched heads are computed densely, N x N, which is fine for
windows of up to a few hundred tokens; the other heads keep the output of the operator. A batch holds patches of one
layer, one a row. The layers below it are those of the unpatched pass, so they need not be computed again: each gives
the output that it gave there. Whether a model can be cut like this is found out by trying, layer by layer.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from posterity.errors import InputError
from posterity.models.attach import watch_model
from posterity.models.chunked_loss import token_losses
from posterity.models.interception import AttentionCall
from posterity.models.language_model import (
    enclosing_layer,
    freeze_parameters,
    input_device,
    language_model,
    replace_forwards,
)
from posterity.models.watch import Layer, Watch
from posterity.ops.mask import Mask
from posterity.ops.precision import working_dtype

NO_SELF, SINK_AND_SELF, SELF_ONLY = EDGES = ("no self", "self and first", "self only")
OWN_MEAN, LATER_MEAN = MEANS = ("own mean", "later mean")


@dataclass(frozen=True, eq=False)
class Patch:
    """One change of attention.

    Kinds that take edges away (the softmax is over those that remain, and over a learned sink):
        "no self": every query loses its self edge, unless it has no other.
        "self and first": only the self edge and the edge to the first position remain.
        "self only": only the self edge remains.

    Kinds that replace keys and values, at the given positions, by their means over the window (of what attention gets,
    which is after rotary embedding):
        "own mean": the query of the same position sees the mean.
        "later mean": all later queries see the mean.
    """

    kind: str
    layer: int | None = None  # number of the attention layer in watch.layers; None: all layers
    head: int | None = None  # query head; None: all heads
    positions: Int[Tensor, " position"] | None = None  # for the two means: keys that are replaced

    def __post_init__(self):
        """Check the kind, and that positions are given where they are needed."""
        if self.kind not in EDGES + MEANS:
            raise InputError(f"a patch expects one of the kinds {', '.join(EDGES + MEANS)}; got {self.kind!r}")
        if (self.positions is None) == (self.kind in MEANS):
            raise InputError(f"a patch expects positions for its kinds {' and '.join(MEANS)} only; see {self.kind!r}")


def patched_losses(
    subject_model: PreTrainedModel,
    ids: Int[Tensor, " position"],
    patches: Sequence[Patch | None],
    *,
    batch: int = 8,
    advance: Callable[[int, int], None] | None = None,
    shortcut: bool = True,
) -> Float64[Tensor, "patch loss"]:
    """Return the losses of one window under each patch, in nats, on the CPU: no gradients, but whole forward passes.

    Args:
        subject_model: A causal language model of transformers; restored afterwards.
        ids: The tokens of the window, N; there are N - 1 losses.
        patches: The changes, each by itself; None: no change.
        batch: Patches of one layer that run at once.
        advance: `advance(patches, tokens)` is told what is done.
        shortcut: Whether layers below a patch may give their kept output. It is used only where it was found to give
            the unpatched losses, and changes results by rounding at most.

    Raises:
        InputError: The model cannot be measured; a window, layer, head or position that does not exist.
    """
    if ids.dim() != 1 or len(ids) < 2 or batch < 1:
        raise InputError(f"expected a window of 2 tokens and a batch of 1 at least; got {[*ids.shape]} and {batch}")
    model = language_model(subject_model)
    with watch_model(model) as watch, freeze_parameters(model), torch.no_grad():
        _check(patches, len(watch.layers), len(ids))
        passes = _PatchedPasses(model, watch, ids)
        losses = torch.empty(len(patches), len(ids) - 1, dtype=torch.float64)
        layers = [-1 if patch is None or patch.layer is None else patch.layer for patch in patches]
        order = sorted(range(len(patches)), key=layers.__getitem__)
        for layer, group in groupby(order, layers.__getitem__):
            start = layer if shortcut and layer > 0 and passes.can_skip(layer) else 0
            rest = list(group)
            while rest:
                rows, rest = rest[:batch], rest[batch:]
                losses[rows] = passes.losses([patches[row] for row in rows], start)
                if advance is not None:
                    advance(len(rows), len(rows) * len(ids))
    return losses


def _check(patches: Sequence[Patch | None], layers: int, length: int) -> None:
    """Raise InputError unless the layers and positions of all patches exist."""
    for patch in patches:
        if patch is None:
            continue
        if patch.layer is not None and not 0 <= patch.layer < layers:
            raise InputError(f"a patch expects a layer from 0 to {layers - 1}; got {patch.layer}")
        positions = patch.positions
        if positions is not None and (
            positions.dim() != 1 or not len(positions) or positions.min() < 0 or positions.max() >= length
        ):
            raise InputError(f"a patch expects positions from 0 to {length - 1}; got {positions.tolist()}")


class _PatchedPasses:
    """Forward passes of one window: the unpatched one, and those with patches."""

    def __init__(self, model: PreTrainedModel, watch: Watch, ids: Tensor):
        self.model, self.watch, self.ids = model, watch, ids.to(input_device(model))
        self.blocks = [enclosing_layer(model, layer.name) for layer in watch.layers]
        self.outputs: list[Any] = []  # of each block in the unpatched pass
        self.unpatched: Tensor | None = None  # losses

    def losses(self, patches: Sequence[Patch | None], start: int = 0) -> Float64[Tensor, "patch loss"]:
        """Return the losses under each patch; layers below `start` are not computed."""
        numbers = iter(range(start, len(self.watch.layers)))

        def replacement(layer: Layer, call: AttentionCall) -> Tensor | None:
            number = next(numbers, None)
            if number is None or self.watch.layers[number].name != layer.name:
                raise InputError(f"the model does not call its attention layers in the same order twice: see {layer}")
            return _patched_output(call, _patches_of(number, patches))

        with self.watch.replace_outputs(replacement), self._skip_blocks(start, len(patches)):
            logits = self.model(input_ids=self.ids.expand(len(patches), -1), use_cache=False).logits[:, :-1]
        if next(numbers, None) is not None:
            raise InputError("the model does not call all of its attention layers again: it cannot be patched")
        return torch.stack([token_losses(row, self.ids[1:]) for row in logits]).double().cpu()

    def can_skip(self, start: int) -> bool:
        """Return whether the unpatched losses come out as they were when layers below `start` are not computed."""
        if self.unpatched is None:
            self.unpatched = self._run_unpatched()
        if not self.outputs:
            return False
        try:
            losses = self.losses([None], start)[0]
        except Exception:  # what a layer finds missing can be anything; then nothing is left out
            return False
        # The same operations on the same numbers: there is hardly any rounding to allow for.
        return bool((losses - self.unpatched).abs().max() <= 16 * self._epsilon() * self.unpatched.abs().max())

    def _epsilon(self) -> float:
        return torch.finfo(working_dtype(self.model.get_input_embeddings().weight.dtype)).eps  # type: ignore[arg-type]

    def _run_unpatched(self) -> Tensor:
        """Return the losses; `outputs` stay empty if the blocks are not called one after the other, once each."""
        calls: list[tuple[nn.Module, Any]] = []
        hooks = [
            block.register_forward_hook(lambda module, _, output: calls.append((module, output)))
            for block in dict.fromkeys(self.blocks)
        ]
        try:
            losses = self.losses([None])[0]
        finally:
            for hook in hooks:
                hook.remove()
        if [module for module, _ in calls] == self.blocks:
            self.outputs = [
                tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, output) for _, output in calls
            ]
        return losses

    def _skip_blocks(self, start: int, rows: int) -> contextlib.AbstractContextManager[None]:
        """Let the first blocks return what they gave in the unpatched pass, for every row."""
        blocks = zip(self.blocks[:start], self.outputs, strict=False)
        return replace_forwards({block: _forward_returning(output, rows) for block, output in blocks})


def _patches_of(layer: int, patches: Sequence[Patch | None]) -> dict[int, Patch]:
    """Return the patches of one layer, by row."""
    return {row: patch for row, patch in enumerate(patches) if patch is not None and patch.layer in (None, layer)}


def _forward_returning(output: Any, rows: int) -> Callable[..., Any]:
    """Return a forward that computes nothing; each call gives a new copy, which the model may change in place."""

    def expand(x: Any) -> Any:
        return x.expand(rows, *x.shape[1:]).clone() if isinstance(x, Tensor) and x.dim() and len(x) == 1 else x

    return lambda *_args, **_kwargs: tree_map(expand, output)


def _patched_output(call: AttentionCall, patches: dict[int, Patch]) -> Float[Tensor, "batch head query dim_v"] | None:
    """Return the output of one attention call with the patched heads of some rows; None if there are no patches."""
    if not patches:
        return None
    output, count, edges = call.output(), call.query.shape[1], dense_edges(call.mask, call.query)
    for row, patch in patches.items():
        if patch.head is not None and not 0 <= patch.head < count:
            raise InputError(f"a patch expects a head from 0 to {count - 1}; got {patch.head}")
        heads = torch.arange(count)[slice(None) if patch.head is None else slice(patch.head, patch.head + 1)]
        heads = heads.to(output.device)
        output[row, heads] = _dense_attention(call, row, heads, edges[row, heads], patch).to(output.dtype)
    return output


def dense_edges(mask: Mask, query: Float[Tensor, "batch head query dim"]) -> Bool[Tensor, "batch head query key"]:
    """Return the edges that a mask allows, as they are: N x N."""
    batch, heads, length = query.shape[:3]
    shape = (1, 1) if mask.plain else (batch, heads)
    edges = query.new_zeros(*shape, length, length)
    for _, tiles in mask.tiles(length, length, query.device):
        for tile in tiles:
            mask.fill_(edges[:, :, tile.rows, tile.columns].fill_(1.0), tile, 0.0)
    return edges.bool().expand(batch, heads, length, length)


def _dense_attention(
    call: AttentionCall, row: int, heads: Int[Tensor, " head"], edges: Bool[Tensor, "head query key"], patch: Patch
) -> Float[Tensor, "head query dim_v"]:
    """Return attention of some heads of one row under a patch, with everything of size N x N held."""
    groups = heads // (call.query.shape[1] // call.key.shape[1])
    query, key, value = call.query[row, heads], call.key[row, groups], call.value[row, groups]
    query, key, value = (x.to(working_dtype(x.dtype)) for x in (query, key, value))
    length = query.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=query.device)
    replaced = torch.zeros_like(own)
    if patch.positions is not None:
        replaced[:, patch.positions.to(own.device)] = True
        replaced &= own if patch.kind == OWN_MEAN else ~own  # later ones: no edge leads to a later key
    edges = _remaining_edges(edges, own, patch.kind)
    mean_key, mean_value = key.mean(1, keepdim=True), value.mean(1, keepdim=True)
    score = call.scale * torch.where(replaced, query @ mean_key.mT, query @ key.mT)
    if call.softcap:
        score = call.softcap * torch.tanh(score / call.softcap)
    score = score.masked_fill(~edges, -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks[heads, None, None].to(score.dtype)
        score = torch.cat((score, sinks.expand(-1, length, 1)), -1)
    weight = torch.softmax(score, -1)[..., :length].masked_fill(~edges, 0)  # a query without edges gives 0
    return weight.masked_fill(replaced, 0) @ value + (weight * replaced).sum(-1, keepdim=True) * mean_value


def _remaining_edges(
    edges: Bool[Tensor, "head query key"], own: Bool[Tensor, "query key"], kind: str
) -> Bool[Tensor, "head query key"]:
    """Return the edges that a patch leaves."""
    if kind == NO_SELF:
        others = edges & ~own
        return torch.where(others.any(-1, keepdim=True), others, edges)
    if kind == SELF_ONLY:
        return edges & own
    if kind == SINK_AND_SELF:
        own = own.clone()
        own[:, 0] = True
        return edges & own
    return edges
