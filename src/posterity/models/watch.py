"""The watch over the attention modules of a model: their inputs, their calls, their backward passes."""

import contextlib
import threading
from collections import Counter, UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import Cache

from posterity.decomposition.weight_gradients import LayerProjections, ProjectionTrace
from posterity.errors import InputError
from posterity.models.interception import AttentionCall, intercept
from posterity.models.masks import in_backward
from posterity.models.projection_calls import AttentionInputs, ProjectionCalls
from posterity.models.recompute import Recomputation
from posterity.models.shared_streams import SharingCalls, StreamOwners
from posterity.models.state_horizon import Rate, discount_states
from posterity.ops.attention import Backward, OutputTape, attention
from posterity.ops.horizon_rules import Full, Rule, discount_rate


@dataclass(frozen=True)
class Layer:
    """One attention call of the model: the module that makes it, and which of its calls it is."""

    name: str
    call: int

    def __str__(self) -> str:
        """Return the module's name, with the number of the call from the second on."""
        return self.name if self.call == 0 else f"{self.name}#{self.call}"


class Observer(Protocol):
    """Gets every finished backward pass of a layer, and the ways from its streams to its weights."""

    def __call__(self, layer: Layer, back: Backward, projections: LayerProjections) -> None:
        """Account for a backward pass."""
        ...


def _late_backward() -> InputError:
    return InputError("the backward pass came after the `with` had ended: call .backward() inside it")


Rules = tuple[Rule, Rule]  # the horizon of keys and of values
Replacement = Callable[[Layer, AttentionCall], Tensor | None]


@dataclass(eq=False)
class Cut:
    """A horizon in force: for some layers and for keys, values or both."""

    rule: Rule
    kind: str  # "kv" or "hidden"
    streams: frozenset[str]
    layers: frozenset[Layer]
    calls: int = 0  # differentiable attention calls under this horizon
    active: bool = True


@dataclass(frozen=True)
class Override:
    """Rules and observer for backward passes that run again over recorded forward passes."""

    rules: Rules
    observe: Observer


class _Checkpointed(threading.local):
    """The checkpointed layer that runs in this thread; the backward pass on a GPU has a thread of its own."""

    tape: OutputTape | None = None


class Watch:
    """Interceptor of the attention calls of one model, which reports their backward passes to observers."""

    def __init__(self, model: nn.Module, layers: tuple[Layer, ...], other_paths: tuple[str, ...], entries: Mapping):
        """`entries`: attention calls in one forward() of each module whose forward() runs several times in a pass."""
        self.model = model
        self.names = {model.get_submodule(layer.name): layer.name for layer in layers}
        self.layers, self.other_paths, self.entries = layers, other_paths, entries
        self.uncut_paths = other_paths  # those that no horizon reaches
        self.right_only = False  # whether padding on the left reaches the tokens after it
        self.wrong_gradients: tuple[str, ...] = ()  # modules whose backward pass is not the derivative of the forward
        self.observers: list[Observer] = []
        self.cuts: list[Cut] = []
        self.inputs: dict[nn.Module, tuple[tuple, dict]] = {}
        self.calls: Counter[str] = Counter()
        self.owners = StreamOwners()
        self.without_gradient: set[Layer] = set()  # called while gradients are on, with inputs that require none
        self.override: Override | None = None
        self.replacement: Replacement | None = None
        self._projection_calls: ProjectionCalls | None = None
        self._layers_run_again = False  # in the backward passes of this forward pass
        self._checkpointed = _Checkpointed()
        self._recomputations: dict[Layer, Recomputation] = {}  # of the checkpointed layers that have run again

    @contextlib.contextmanager
    def install(self) -> Iterator[None]:
        """Watch the model for the length of the block."""
        save_input: Callable = torch.compiler.disable(self._save_input)  # type: ignore[assignment]
        hooks = [module.register_forward_pre_hook(save_input, with_kwargs=True) for module in self.names]
        hooks.append(self.model.register_forward_pre_hook(lambda *_: self._start_forward()))
        try:
            with intercept(self.names, self):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def report_to(self, observe: Observer) -> Iterator[None]:
        """Report the backward passes of the block to `observe` too."""
        self.observers.append(observe)
        try:
            yield
        finally:
            self.observers.remove(observe)

    @contextlib.contextmanager
    def record_projections(self) -> Iterator[None]:
        """Record the calls of projections in the forward passes of the block, so that no module has to run again."""
        before, self._projection_calls = self._projection_calls, ProjectionCalls(self.names)
        try:
            with self._projection_calls.record():
                yield
        finally:
            self._projection_calls = before

    @contextlib.contextmanager
    def override_rules(self, rules: Rules, observe: Observer) -> Iterator[None]:
        """Within the block, send backward passes through recorded forward passes by `rules` in every layer.

        They are reported to `observe` only.
        """
        self.override = Override(rules, observe)
        try:
            yield
        finally:
            self.override = None

    @contextlib.contextmanager
    def discount_states(self) -> Iterator[None]:
        """Put the paths outside attention of the forward passes of the block under the rules in force too."""
        with discount_states(self.model, self._state_rate):
            yield

    @contextlib.contextmanager
    def replace_outputs(self, replacement: Replacement) -> Iterator[None]:
        """Give every attention call of the block the output of `replacement`, or its own output for None."""
        before, self.replacement = self.replacement, replacement
        try:
            yield
        finally:
            self.replacement = before

    @contextlib.contextmanager
    def suspend_cuts(self) -> Iterator[None]:
        """Put no horizon in force within the block."""
        cuts, self.cuts = self.cuts, []
        try:
            yield
        finally:
            self.cuts = cuts

    @contextlib.contextmanager
    def run_checkpointed(self, tape: OutputTape, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Within the block, these attention modules run, or run again in a backward pass; only `tape` is kept of it."""
        before, self._checkpointed.tape = self._checkpointed.tape, tape
        try:
            yield
        finally:
            self._checkpointed.tape = before
            for module in modules:
                self.inputs.pop(module, None)

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the output of an attention call: a replacement, or attention with its backward pass observed."""
        mask, bias = call.edges
        if self.right_only and mask.padding is not None and not mask.padding[:, 0].all():
            raise InputError(
                "in this model what stands at padding reaches the tokens after it, whatever it is: put the padding on "
                "the right"
            )
        passes = self._register(call)
        if self.replacement is not None:
            if bias is not None:
                raise InputError(f"{passes.layer} adds a bias to the scores, which this measurement does not know")
            output = self.replacement(passes.layer, call)
            if output is not None:
                return output
        return attention(
            call.query, call.key, call.value, call.scale, mask=mask, softcap=call.softcap, sinks=call.sinks, bias=bias,
            horizon=passes.rules, detached=passes.detached, observe=passes.report, tape=self._checkpointed.tape,
        )  # fmt: skip

    def take_recomputation(self, layer: Layer) -> Recomputation | None:
        """Return that of a checkpointed layer that has just run again, and forget it."""
        return self._recomputations.pop(layer, None)

    def is_next(self, layer: Layer) -> bool:
        """Return whether this layer's call comes first in the next forward() of its module."""
        calls = self.entries.get(layer.name)
        return calls is None or self.calls[layer.name] == layer.call - layer.call % calls

    def _start_forward(self) -> None:
        """Count calls from 0, and forget the tensors of the forward pass before."""
        self.calls.clear()
        self.owners.clear()
        # By transformers' checkpointing, which each pass through a part of the graph would set off.
        self._layers_run_again = self.model.training and any(
            getattr(module, "gradient_checkpointing", False) for module in self.model.modules()
        )

    def _save_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Save the input of a module, without its graph and without its cache; count its calls from 0."""

        def copy(x: Any) -> Any:
            if isinstance(x, UserDict):  # keys and values for other layers, which a recomputation may write to
                return {name: tree_map(copy, part) for name, part in x.items()}
            return None if isinstance(x, Cache) else x.detach() if isinstance(x, Tensor) else x

        name = self.names[module]
        if name not in self.entries:
            self.calls[name] = 0
        elif in_backward():
            raise InputError(
                f"{name} is entered several times in one pass, which gradient checkpointing does not do in order: "
                "call model.gradient_checkpointing_disable()"
            )
        self.inputs[module] = tree_map(copy, (args, kwargs), is_leaf=lambda x: isinstance(x, Cache))

    def _state_rate(self) -> Rate:
        """Return what says the rate of a backward pass through the states of this forward pass."""
        cuts = list(self.cuts)

        def rate() -> float:
            rules = [cut.rule for cut in cuts] if self.override is None else list(self.override.rules)
            if self.override is None and not all(cut.active for cut in cuts):
                raise _late_backward()
            return discount_rate(rules[0]) if rules else 1.0

        return rate

    def _register(self, call: AttentionCall) -> "_BackwardPasses":
        """Count a call, and prepare for its backward passes."""
        name = self.names[call.module]
        layer = Layer(name, self.calls[name])
        self.calls[name] += 1
        # A module whose forward is called past its hooks has left no input: nothing can be run again then.
        args, kwargs = self.inputs.get(call.module, ((), {}))
        index = layer.call % self.entries.get(name, layer.call + 1)
        passes = _BackwardPasses(self, layer, Recomputation(call.module, args, kwargs, index))
        streams = call.query, call.key, call.value
        checkpointed = self._checkpointed.tape is not None
        runs_again = checkpointed and in_backward()
        if torch.is_grad_enabled() and any(x.requires_grad for x in streams):
            passes.put_cuts_in_force(streams)
            if not runs_again:
                passes.sharing = self.owners.register(layer, streams, passes.open_sharing)
            if self._projection_calls is not None and not (checkpointed or self._layers_run_again):
                passes.inputs = self._projection_calls.enter_attention(call.module, streams)
        elif torch.is_grad_enabled():
            self.without_gradient.add(layer)
        if checkpointed:  # the input comes again, with the backward pass
            if runs_again:
                self._recomputations[layer] = passes.recomputation
            del passes.recomputation
        return passes


class _BackwardPasses:
    """What holds for the backward passes through one attention call."""

    def __init__(self, watch: Watch, layer: Layer, recomputation: Recomputation):
        self.watch, self.layer = watch, layer
        self.recomputation = recomputation  # none where the layer is checkpointed
        self.observers = list(watch.observers)
        self.cuts = {
            stream: cut for cut in watch.cuts if layer in cut.layers for stream in cut.streams
        }  # those of one stream are equal
        self.detached: tuple[Tensor | None, Tensor | None] = (None, None)
        self.sharing: SharingCalls | None = None  # with other calls
        self.inputs: AttentionInputs | None = None  # where projections are recorded

    def put_cuts_in_force(self, streams: tuple[Tensor, Tensor, Tensor]) -> None:
        """Count the call for its horizons; make the key and value anew that a cut of the hidden state needs."""
        for cut in self.cuts.values():
            cut.calls += 1
        hidden = [stream in self.cuts and self.cuts[stream].kind == "hidden" for stream in ("key", "value")]
        if any(hidden):
            key, value = self.recomputation.detach_input(streams)
            self.detached = key if hidden[0] else None, value if hidden[1] else None

    def rules(self) -> Rules:
        """Return the horizon of keys and of values.

        Raises:
            InputError: The backward pass came after the `with` of the horizon.
        """
        if self.watch.override is not None:
            return self.watch.override.rules
        if not all(cut.active for cut in self.cuts.values()):
            raise _late_backward()
        key, value = (self.cuts[stream].rule if stream in self.cuts else Full() for stream in ("key", "value"))
        return key, value

    def open_sharing(self) -> SharingCalls:
        """Return what this call shares with later ones, which it owns."""
        self.sharing = self.sharing or SharingCalls(self.layer)
        return self.sharing

    def report(self, back: Backward) -> None:
        """Report a finished backward pass to the observers, if need be together with those of calls that share."""
        if self.sharing is None:
            self._report(back)
        else:
            self.sharing.finish(self.layer, back, self._report)

    def _report(self, back: Backward) -> None:
        recomputation = self.watch.take_recomputation(self.layer) or self.recomputation

        def trace() -> ProjectionTrace | None:
            # Where calls share a stream, the graph of some has been run through before all have reported.
            return None if self.inputs is None or self.sharing is not None else self.inputs.trace()

        projections = LayerProjections(partial(recomputation.project, back), trace)
        if self.watch.override is not None:
            self.watch.override.observe(self.layer, back, projections)
            return
        for observe in self.observers:
            if observe not in self.watch.observers:
                raise _late_backward()
            observe(self.layer, back, projections)
