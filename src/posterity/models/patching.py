"""What a model loses when edges of attention are taken away, or keys and values replaced: patched forward passes.

A patch changes one head or all, in one layer or all. The patched heads are computed densely, N x N, which is fine for
windows of up to a few hundred tokens; the other heads keep the output of the operator. A batch holds patches of one
layer, one a row. The layers below it are those of the unpatched pass, so they need not be computed again: each gives
the output that it gave there. Whether a model can be cut like this is found out by trying, layer by layer.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from posterity.errors import InputError
from posterity.models.attach import watching
from posterity.models.language_model import first_device, frozen, holder, language_model
from posterity.models.watch import Attending, Layer, Watch
from posterity.ops.attention import working
from posterity.ops.mask import Mask

NO_SELF, SINK_AND_SELF, SELF_ONLY, OWN_MEAN, LATER_MEAN = (
    "no self",
    "self and first",
    "self only",
    "own mean",
    "later mean",
)
EDGES, MEANS = (NO_SELF, SINK_AND_SELF, SELF_ONLY), (OWN_MEAN, LATER_MEAN)


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
    positions: Int[Tensor, " some"] | None = None  # for the two means: keys that are replaced

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
    """The losses of one window under each patch, in nats, on the CPU: no gradients, but whole forward passes.

    Args:
        subject_model: A causal language model of transformers; restored afterwards.
        ids: The tokens of the window, N; there are N - 1 losses.
        patches: The changes, each on its own; None: no change.
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
    with watching(model) as watch, frozen(model), torch.no_grad():
        _check(patches, len(watch.layers), len(ids))
        passes = _Passes(model, watch, ids)
        found = torch.empty(len(patches), len(ids) - 1, dtype=torch.float64)
        numbers = [-1 if patch is None or patch.layer is None else patch.layer for patch in patches]
        order = sorted(range(len(patches)), key=numbers.__getitem__)
        for layer, group in groupby(order, numbers.__getitem__):
            start = layer if shortcut and layer > 0 and passes.sound(layer) else 0
            rest = list(group)
            while rest:
                rows, rest = rest[:batch], rest[batch:]
                found[rows] = passes.losses([patches[row] for row in rows], start)
                if advance is not None:
                    advance(len(rows), len(rows) * len(ids))
    return found


def head_counts(model: PreTrainedModel, ids: Int[Tensor, " position"]) -> list[int]:
    """Query heads of every attention layer."""
    counts: list[int] = []

    def note(_layer: Layer, given: Attending) -> None:
        counts.append(given.query.shape[1])

    with watching(model) as watch, watch.replacing(note), frozen(language_model(model)), torch.no_grad():
        language_model(model)(input_ids=ids[None].to(first_device(language_model(model))), use_cache=False)
    return counts


def _check(patches: Sequence[Patch | None], layers: int, length: int) -> None:
    for patch in patches:
        if patch is None:
            continue
        if patch.layer is not None and not 0 <= patch.layer < layers:
            raise InputError(f"a patch expects a layer from 0 to {layers - 1}; got {patch.layer}")
        at = patch.positions
        if at is not None and (at.dim() != 1 or not len(at) or at.min() < 0 or at.max() >= length):
            raise InputError(f"a patch expects positions from 0 to {length - 1}; got {at.tolist()}")


class _Passes:
    """Forward passes of one window: the unpatched one, and those with patches."""

    def __init__(self, model: PreTrainedModel, watch: Watch, ids: Tensor):
        self.model, self.watch, self.ids = model, watch, ids.to(first_device(model))
        self.holders = [holder(model, layer.name) for layer in watch.layers]
        self.kept: list[Any] = []  # the output of each holder in the unpatched pass
        self.plain: Tensor | None = None

    def losses(self, patches: Sequence[Patch | None], start: int = 0) -> Float64[Tensor, "patch loss"]:
        """The losses under each patch; layers below `start` are not computed."""
        numbers = iter(range(start, len(self.watch.layers)))

        def replacement(layer: Layer, given: Attending) -> Tensor | None:
            number = next(numbers, None)
            if number is None or self.watch.layers[number].name != layer.name:
                raise InputError(f"the model does not call its attention layers in the same order twice: see {layer}")
            return _replaced(given, {row: patch for row, patch in enumerate(patches) if _meant(patch, number)})

        with self.watch.replacing(replacement), self._skipping(start, len(patches)):
            logits = self.model(input_ids=self.ids.expand(len(patches), -1), use_cache=False).logits[:, :-1]
        if next(numbers, None) is not None:
            raise InputError("the model does not call all of its attention layers again: it cannot be patched")
        targets = self.ids[1:].to(logits.device)
        rows = [nn.functional.cross_entropy(x.to(working(x.dtype)), targets, reduction="none") for x in logits]
        return torch.stack(rows).double().cpu()

    def sound(self, start: int) -> bool:
        """Whether the layers below `start` can be left out: the unpatched losses then come out as they were."""
        if self.plain is None:
            self.plain = self._keep()
        if not self.kept:
            return False
        try:
            again = self.losses([None], start)[0]
        except Exception:  # what a layer finds missing can be anything; then nothing is left out
            return False
        # The same operations on the same numbers: there is hardly any rounding to allow for.
        return bool((again - self.plain).abs().max() <= 16 * self._epsilon() * self.plain.abs().max())

    def _epsilon(self) -> float:
        return torch.finfo(working(self.model.get_input_embeddings().weight.dtype)).eps  # type: ignore[arg-type]

    def _keep(self) -> Tensor:
        """The unpatched losses; `kept` stays empty if the holders are not called one after the other, once each."""
        called: list[tuple[nn.Module, Any]] = []
        hooks = [
            holder.register_forward_hook(lambda module, _, output: called.append((module, output)))
            for holder in dict.fromkeys(self.holders)
        ]
        try:
            losses = self.losses([None])[0]
        finally:
            for hook in hooks:
                hook.remove()
        if [module for module, _ in called] == self.holders:
            self.kept = [tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, output) for _, output in called]
        return losses

    @contextlib.contextmanager
    def _skipping(self, start: int, rows: int) -> Iterator[None]:
        """Inside, the first layers give what they gave in the unpatched pass, for every row."""
        before = [(module, vars(module).get("forward")) for module in self.holders[:start]]
        try:
            for (module, _), kept in zip(before, self.kept, strict=False):
                module.forward = _giving(kept, rows)
            yield
        finally:
            for module, own in before:
                vars(module).pop("forward", None)
                if own is not None:
                    module.forward = own


def _giving(kept: Any, rows: int) -> Callable[..., Any]:
    """A forward that computes nothing; every call gets a copy of its own, which the model may change in place."""

    def expand(x: Any) -> Any:
        return x.expand(rows, *x.shape[1:]).clone() if isinstance(x, Tensor) and x.dim() and len(x) == 1 else x

    return lambda *_args, **_kwargs: tree_map(expand, kept)


def _meant(patch: Patch | None, layer: int) -> bool:
    return patch is not None and patch.layer in (None, layer)


def _replaced(given: Attending, patches: dict[int, Any]) -> Float[Tensor, "batch head query dim_v"] | None:
    """The output of one attention call with the patched heads of some rows; None if there are no patches."""
    if not patches:
        return None
    output, heads, edges = given.output(), given.query.shape[1], dense_edges(given.mask, given.query)
    for row, patch in patches.items():
        if patch.head is not None and not 0 <= patch.head < heads:
            raise InputError(f"a patch expects a head from 0 to {heads - 1}; got {patch.head}")
        some = torch.arange(heads)[slice(None) if patch.head is None else slice(patch.head, patch.head + 1)]
        some = some.to(output.device)
        output[row, some] = _dense(given, row, some, edges[row, some], patch).to(output.dtype)
    return output


def dense_edges(mask: Mask, query: Float[Tensor, "batch head query dim"]) -> Bool[Tensor, "batch head query key"]:
    """The edges that a mask allows, as they are: N x N."""
    batch, heads, length = query.shape[:3]
    shape = (1, 1) if mask.plain else (batch, heads)
    edges = query.new_zeros(*shape, length, length)
    for _, tiles in mask.tiles(length, length, query.device):
        for tile in tiles:
            mask.fill_(edges[:, :, tile.rows, tile.columns].fill_(1.0), tile, 0.0)
    return edges.bool().expand(batch, heads, length, length)


def _dense(
    given: Attending, row: int, heads: Int[Tensor, " head"], edges: Bool[Tensor, "head query key"], patch: Patch
) -> Float[Tensor, "head query dim_v"]:
    """Attention of some heads of one row under a patch, with everything of size N x N held."""
    shared = heads // (given.query.shape[1] // given.key.shape[1])
    query, key, value = given.query[row, heads], given.key[row, shared], given.value[row, shared]
    query, key, value = (x.to(working(x.dtype)) for x in (query, key, value))
    length = query.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=query.device)
    replaced = torch.zeros_like(own)
    if patch.positions is not None:
        replaced[:, patch.positions.to(own.device)] = True
        replaced &= own if patch.kind == OWN_MEAN else ~own  # later ones: no edge leads to a later key
    kept = _remaining(edges, own, patch.kind)
    mean_key, mean_value = key.mean(1, keepdim=True), value.mean(1, keepdim=True)
    score = given.scale * torch.where(replaced, query @ mean_key.mT, query @ key.mT)
    if given.softcap:
        score = given.softcap * torch.tanh(score / given.softcap)
    score = score.masked_fill(~kept, -torch.inf)
    if given.sinks is not None:
        sinks = given.sinks[heads, None, None].to(score.dtype)
        score = torch.cat((score, sinks.expand(-1, length, 1)), -1)
    weight = torch.softmax(score, -1)[..., :length].masked_fill(~kept, 0)  # a query without edges gives 0
    return weight.masked_fill(replaced, 0) @ value + (weight * replaced).sum(-1, keepdim=True) * mean_value


def _remaining(
    edges: Bool[Tensor, "head query key"], own: Bool[Tensor, "query key"], kind: str
) -> Bool[Tensor, "head query key"]:
    """The edges that a patch leaves."""
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
