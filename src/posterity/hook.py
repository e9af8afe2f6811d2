"""What transformers calls: the attention function, the mask function, and the watch over a model's attention modules.

This file, models.py and leaks.py are the only ones that know how transformers runs a model.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from posterity.attention import Backward, attention
from posterity.errors import InputError
from posterity.horizon import Full, Rule
from posterity.mask import Mask
from posterity.replay import Replay, capturing
from posterity.weights import Projections

NAME = "posterity"
FOLDED = "posterity_folded"  # of a config: which heads pass their own value on (folded.py), by `layer_idx`
# Tensors that models pass on to every attention function; what they say is in the mask or in queries and keys already.
HARMLESS = {
    "position_ids", "cache_position", "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k", "num_items_in_batch",
    "token_type_ids", "mm_token_type_ids",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One attention call of the model: the module that makes it, and which of its calls it is."""

    name: str
    call: int

    def __str__(self) -> str:
        """The module's name, with the number of the call from the second on."""
        return self.name if self.call == 0 else f"{self.name}#{self.call}"


class Observer(Protocol):
    """Gets every finished backward pass of a layer, and the means to run its projections again."""

    def __call__(self, layer: Layer, back: Backward, project: Callable[[int], Projections]) -> None:
        """`project(document)` makes the projections of one document of the batch anew."""
        ...


@dataclass(frozen=True)
class Attending:
    """What one attention call was given: (batch, head, query, dim), keys and values (batch, group, key, dim)."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    mask: Mask
    softcap: float | None
    sinks: Tensor | None

    def output(self) -> Tensor:
        """What the call gives as it is: (batch, head, query, dim_v)."""
        return attention(
            self.query, self.key, self.value, self.scale, mask=self.mask, softcap=self.softcap, sinks=self.sinks
        )


Replacement = Callable[[Layer, Attending], Tensor | None]


def register(name: str = NAME, function: Callable | None = None) -> None:
    """Make the operator (or a function around it) known to transformers; a model uses it only when switched to it."""
    AttentionInterface.register(name, function or _attention_function)
    AttentionMaskInterface.register(name, _mask_function)


watches: "WeakKeyDictionary[nn.Module, Watch | Recorder]" = WeakKeyDictionary()


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
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention for transformers: (batch, head, position, dim) in, (batch, position, head, dim) out."""
    if dropout:
        raise InputError(
            f"expected no attention dropout, got {dropout} in training mode, which makes the edges random: "
            "set attention_dropout (attn_pdrop in GPT-2) of the config to 0, or call model.eval()"
        )
    if position_bias is not None:
        raise InputError("its attention adds a position bias to the scores, which the operator does not know")
    unknown = [name for name, x in kwargs.items() if isinstance(x, Tensor) and name not in HARMLESS]
    if unknown:
        raise InputError(f"it hands {', '.join(unknown)} to its attention, which the operator does not know")
    mask = as_mask(module, attention_mask, is_causal)
    if folded := folded_heads(module):
        mask = mask.self_only(folded, query.shape[1])
    if (capture := capturing(module)) is not None:
        return capture(query, key, value), None
    watch = watches.get(module)
    if isinstance(watch, Recorder) and watch.cut:
        watch.later += [x[:, :, 1:].detach() for x in (query, key, value)]
        return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[3]), None
    if not isinstance(watch, Watch):
        if watch is not None:
            watch.called(module)
        output = attention(query, key, value, scaling, mask=mask, softcap=softcap, sinks=s_aux)
        return output.transpose(1, 2).contiguous(), None
    call = watch.called(module, query, key, value)
    if watch.replacement is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        replaced = watch.replacement(call.layer, Attending(query, key, value, scale, mask, softcap, s_aux))
        if replaced is not None:
            return replaced.transpose(1, 2).contiguous(), None
    output = attention(
        query, key, value, scaling, mask=mask, softcap=softcap, sinks=s_aux,
        horizon=call.rules, detached=call.detached, observe=call.report,
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


@torch.compiler.disable
def _mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Mask:
    """The mask function of transformers' interface: the rule itself instead of an N x N tensor."""
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length]
        padding = None if padding.all() else padding
    first = kv_length - q_length  # what the operator takes as the position of query 0
    aligned = isinstance(q_offset, int) and q_offset == first + kv_offset
    if mask_function is causal_mask_function and aligned:
        return Mask(padding=padding)
    documents = torch.arange(batch_size, device=device)

    def allowed(query: Tensor, key: Tensor) -> Tensor:
        query, key = query - first + q_offset, key + kv_offset
        if use_vmap:
            edges = _pairwise(mask_function, documents, query, key)
        else:
            edges = mask_function(documents[:, None, None, None], documents[:1, None, None, None], query, key)
        return edges if padding is None else edges & padding[documents[:, None, None, None], key - kv_offset]

    return Mask(allowed, padding)


def _pairwise(mask_function: Callable, documents: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A rule that takes single indices only, for all documents and pairs."""
    query, key = torch.broadcast_tensors(query, key)
    pairs = torch.vmap(lambda q, k, b: mask_function(b, b.new_zeros(()), q, k), in_dims=(0, 0, None))
    with TransformGetItemToIndex():
        edges = torch.vmap(pairs, in_dims=(None, None, 0))(query.flatten(), key.flatten(), documents)
    return edges.view(len(documents), 1, *query.shape)


def folded_heads(module: nn.Module) -> list[int]:
    """The heads of a module that pass their own value on, in a model that runs folded."""
    folded = getattr(getattr(module, "config", None), FOLDED, None)
    return folded.get(str(getattr(module, "layer_idx", None)), []) if folded else []


def as_mask(module: nn.Module, given: Any, is_causal: bool | None) -> Mask:
    """What a model hands over as its mask: ours, nothing, or a 4D tensor that the user made."""
    if isinstance(given, Mask):
        return given
    if given is None:
        if not (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
            raise InputError(f"{type(module).__name__} attends in both directions; only causal attention is measured")
        return Mask()
    if not isinstance(given, Tensor) or given.dim() != 4:
        raise InputError(f"its attention mask is a {type(given).__name__} the operator does not know")
    if given.dtype != torch.bool:
        hidden = given <= torch.finfo(given.dtype).min / 2
        if given.requires_grad or (given.masked_fill(hidden, 0) != 0).any():
            raise InputError(
                "its attention mask adds a bias to the scores; only masks that allow (0) or forbid (-inf, or "
                "torch.finfo(dtype).min) are measured: pass a bool mask"
            )
        given = ~hidden
    heads, length = torch.arange(given.shape[1], device=given.device), given.shape[2]
    documents = torch.arange(len(given), device=given.device)[:, None, None, None]
    first = given.shape[3] - length
    return Mask(lambda query, key: given[documents, heads[:, None, None], (query - first).clamp(max=length - 1), key])


class Recorder:
    """Notes which modules call attention, in order; with `cut`, attention passes nothing on."""

    def __init__(self, model: PreTrainedModel, cut: bool = False):
        self.names = {module: name for name, module in model.named_modules()}
        self.cut = cut
        self.layers: list[Layer] = []
        self.later: list[Tensor] = []  # with `cut`: queries, keys and values of all calls, the first position left out

    def called(self, module: nn.Module) -> None:
        """Note one attention call."""
        name = self.names[module]
        self.layers.append(Layer(name, sum(layer.name == name for layer in self.layers)))

    def __enter__(self) -> "Recorder":
        self.outer = {module: watches.get(module) for module in self.names}
        watches.update(dict.fromkeys(self.names, self))
        return self

    def __exit__(self, *error) -> None:
        for module, watch in self.outer.items():
            if watch is None:
                watches.pop(module, None)
            else:
                watches[module] = watch


@dataclass(eq=False)
class Cut:
    """A horizon in force: for some layers and for keys, values or both."""

    rule: Rule
    where: str  # "kv" or "hidden"
    streams: frozenset[str]
    layers: frozenset[Layer]
    met: int = 0  # calls with gradients that it was in force for
    closed: bool = False


class Watch:
    """Watches the attention modules of one model: their inputs, their calls, their backward passes."""

    def __init__(self, modules: dict[str, nn.Module], layers: tuple[Layer, ...], other_paths: tuple[str, ...]):
        self.names = {module: name for name, module in modules.items()}
        self.layers, self.other_paths = layers, other_paths
        self.observers: list[Observer] = []
        self.cuts: list[Cut] = []
        self.inputs: dict[nn.Module, tuple[tuple, dict]] = {}
        self.calls: Counter[nn.Module] = Counter()
        self.again: tuple[tuple[Rule, Rule], Observer] | None = None
        self.replacement: Replacement | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Watch from here to the end of the `with`."""
        enter: Callable = torch.compiler.disable(self._entered)  # type: ignore[assignment]
        hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in self.names]
        watches.update(dict.fromkeys(self.names, self))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in self.names:
                watches.pop(module, None)

    @contextlib.contextmanager
    def reporting(self, observe: Observer) -> Iterator[None]:
        """Inside, backward passes are reported to `observe` too."""
        self.observers.append(observe)
        try:
            yield
        finally:
            self.observers.remove(observe)

    @contextlib.contextmanager
    def sending(self, rules: tuple[Rule, Rule], observe: Observer) -> Iterator[None]:
        """Inside, backward passes of earlier forward passes obey these rules everywhere; only `observe` gets them."""
        self.again = (rules, observe)
        try:
            yield
        finally:
            self.again = None

    @contextlib.contextmanager
    def replacing(self, replacement: Replacement) -> Iterator[None]:
        """Inside, an attention call gives what `replacement` returns for it, or its own output for None."""
        before, self.replacement = self.replacement, replacement
        try:
            yield
        finally:
            self.replacement = before

    @contextlib.contextmanager
    def without_cuts(self) -> Iterator[None]:
        """Inside, no horizon is in force."""
        cuts, self.cuts = self.cuts, []
        try:
            yield
        finally:
            self.cuts = cuts

    def _entered(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Keep the input of a module, without its graph and without its cache; count its calls from 0."""

        def keep(x: Any) -> Any:
            return None if isinstance(x, Cache) else x.detach() if isinstance(x, Tensor) else x

        self.calls[module] = 0
        self.inputs[module] = tree_map(keep, (args, kwargs), is_leaf=lambda x: isinstance(x, Cache))

    def called(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> "_Call":
        """Note an attention call; what is returned is asked in its backward passes."""
        layer = Layer(self.names[module], self.calls[module])
        self.calls[module] += 1
        # A module whose forward is called past its hooks has left no input: nothing can be run again then.
        args, kwargs = self.inputs.get(module, ((), {}))
        call = _Call(self, layer, Replay(module, args, kwargs, layer.call))
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            for cut in call.cuts.values():
                cut.met += 1
            apart = [stream in call.cuts and call.cuts[stream].where == "hidden" for stream in ("key", "value")]
            if any(apart):
                made = call.replay.detached((query, key, value))
                call.detached = made[0] if apart[0] else None, made[1] if apart[1] else None
        return call


class _Call:
    """One attention call: what holds for its backward passes."""

    def __init__(self, watch: Watch, layer: Layer, replay: "Replay"):
        self.watch, self.layer, self.replay = watch, layer, replay
        self.observers = list(watch.observers)
        self.cuts = {
            stream: cut for cut in watch.cuts if layer in cut.layers for stream in cut.streams
        }  # those of one stream are equal
        self.detached: tuple[Tensor | None, Tensor | None] = (None, None)

    def rules(self) -> tuple[Rule, Rule]:
        """The horizon of keys and of values.

        Raises:
            InputError: The backward pass came after the `with` of the horizon.
        """
        if self.watch.again is not None:
            return self.watch.again[0]
        if any(cut.closed for cut in self.cuts.values()):
            raise InputError("the backward pass came after the `with` had ended: call .backward() inside it")
        key, value = (self.cuts[stream].rule if stream in self.cuts else Full() for stream in ("key", "value"))
        return key, value

    def report(self, back: Backward) -> None:
        """Hand a finished backward pass to those who watch."""

        def project(document: int) -> Projections:
            return self.replay.project(back, document)

        if self.watch.again is not None:
            self.watch.again[1](self.layer, back, project)
            return
        for observe in self.observers:
            if observe not in self.watch.observers:
                raise InputError("the backward pass came after the `with` had ended: call .backward() inside it")
            observe(self.layer, back, project)
