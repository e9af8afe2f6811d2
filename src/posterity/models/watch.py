"""What transformers calls: the attention function, the mask function, and the watch over a model's attention modules.

This file, edges.py, models.py and leaks.py are the only ones that know how transformers runs a model.
"""

import contextlib
from collections import Counter, UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import Cache, PreTrainedModel

from posterity.decomposition.weight_gradients import Projections
from posterity.errors import InputError
from posterity.models.masks import in_backward
from posterity.models.recompute import Replay
from posterity.ops.attention import Backward, attention
from posterity.ops.horizon_rules import Full, Rule
from posterity.ops.mask import Mask


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


watches: "WeakKeyDictionary[nn.Module, Watch | Recorder]" = WeakKeyDictionary()


class Recorder:
    """Notes which modules call attention, in order; with `cut`, attention passes nothing on."""

    def __init__(self, model: PreTrainedModel, cut: bool = False):
        self.names = {module: name for name, module in model.named_modules()}
        self.cut = cut
        self.layers: list[Layer] = []  # all calls
        self.reached: list[Layer] = []  # those that are not under the model's own torch.no_grad()
        self.entries: Counter[str] = Counter()  # how often each module was entered
        # With `cut`, what depends on the first token here reaches later positions past attention:
        self.later: list[Tensor] = []  # queries, keys and values of all calls, the first position left out
        self.biases: dict[str, Tensor] = {}  # what is added to the scores of later queries

    def called(self, module: nn.Module, query: Tensor, key: Tensor) -> None:
        """Note one attention call."""
        name = self.names[module]
        if query.shape[2] != key.shape[2]:
            raise InputError(
                f"{type(module).__name__} ({name}) attends from {query.shape[2]} positions to {key.shape[2]} keys: "
                "only attention among the positions of one sequence is measured"
            )
        self.layers.append(Layer(name, sum(layer.name == name for layer in self.layers)))
        if torch.is_grad_enabled():
            self.reached.append(self.layers[-1])

    def passed(self, module: nn.Module, streams: tuple[Tensor, ...], bias: Tensor | None) -> None:
        """Note what a call that is cut was given."""
        self.later += [x[:, :, 1:].detach() for x in streams]
        if bias is not None:
            self.biases[self.names[module]] = bias.detach()[:, :, 1:]

    def __enter__(self) -> "Recorder":
        def entered(module: nn.Module, _args: tuple) -> None:
            self.entries[self.names[module]] += 1

        self.outer = {module: watches.get(module) for module in self.names}
        self.hooks = [module.register_forward_pre_hook(entered) for module in self.names]
        watches.update(dict.fromkeys(self.names, self))
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()
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

    def __init__(self, model: nn.Module, layers: tuple[Layer, ...], other_paths: tuple[str, ...], entries: Mapping):
        """`entries`: how many calls one entry of a module makes, for modules that one pass enters several times."""
        self.model = model
        self.names = {model.get_submodule(layer.name): layer.name for layer in layers}
        self.layers, self.other_paths, self.entries = layers, other_paths, entries
        self.right_only = False  # whether padding on the left reaches the tokens after it
        self.observers: list[Observer] = []
        self.cuts: list[Cut] = []
        self.inputs: dict[nn.Module, tuple[tuple, dict]] = {}
        self.calls: Counter[str] = Counter()
        self.again: tuple[tuple[Rule, Rule], Observer] | None = None
        self.replacement: Replacement | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Watch from here to the end of the `with`."""
        enter: Callable = torch.compiler.disable(self._entered)  # type: ignore[assignment]
        hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in self.names]
        hooks.append(self.model.register_forward_pre_hook(lambda *_: self.calls.clear()))
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
            if isinstance(x, UserDict):  # keys and values for other layers; a copy, which a replay may write to
                return {name: tree_map(keep, part) for name, part in x.items()}
            return None if isinstance(x, Cache) else x.detach() if isinstance(x, Tensor) else x

        name = self.names[module]
        if name not in self.entries:
            self.calls[name] = 0
        elif in_backward():
            raise InputError(
                f"{name} is entered several times in one pass, which gradient checkpointing does not do in order: "
                "call model.gradient_checkpointing_disable()"
            )
        self.inputs[module] = tree_map(keep, (args, kwargs), is_leaf=lambda x: isinstance(x, Cache))

    def comes(self, layer: Layer) -> bool:
        """Whether the next entry of a layer's module makes this call of it."""
        each = self.entries.get(layer.name)
        return each is None or self.calls[layer.name] == layer.call - layer.call % each

    def called(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> "_Call":
        """Note an attention call; what is returned is asked in its backward passes."""
        name = self.names[module]
        layer = Layer(name, self.calls[name])
        self.calls[name] += 1
        # A module whose forward is called past its hooks has left no input: nothing can be run again then.
        args, kwargs = self.inputs.get(module, ((), {}))
        call = _Call(self, layer, Replay(module, args, kwargs, layer.call % self.entries.get(name, layer.call + 1)))
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
