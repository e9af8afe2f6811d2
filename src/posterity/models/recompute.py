"""Recompute Q, K and V of an attention module as a differentiable function of its projection weights.

The module runs again on its saved input and stops at its attention call, where its queries, keys and values are taken.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from posterity.decomposition.projections import ProjectionSet, add_zero_matrix, find_projections, zero_leaves
from posterity.decomposition.weight_gradients import Projections
from posterity.errors import InputError
from posterity.models.interception import AttentionCall, intercept
from posterity.models.language_model import max_difference, rounding
from posterity.ops.attention import Backward

_WITHOUT = "measure without the weights (weights=False, --no-weights)"


class Recomputation:
    """One attention call of a module, to be run again up to that call."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict, index: int):
        """`args` and `kwargs`: its input, without a graph; `index`: which of the attention calls of this entry."""
        self.module, self.args, self.kwargs, self.index = module, args, kwargs, index
        tensors = (x for x in (*tree_leaves((args, kwargs)), *module.parameters()) if isinstance(x, Tensor))
        device = next((x.device.type for x in tensors if x.is_floating_point()), "cpu")
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    @torch.enable_grad()
    def project(self, back: Backward, document: int) -> Projections:
        """Query, key and value of one document of the batch, as a function of fresh leaves for the module's weights.

        Raises:
            InputError: The module did not make the same queries, keys and values again.
        """
        batch = len(back.query)

        def select(x: Any) -> Any:
            return x[document, None] if isinstance(x, Tensor) and x.dim() and len(x) == batch > 1 else x

        args, kwargs = self._inputs(select)
        leaves = _Leaves(find_projections(self.module))
        if not leaves.weights.parameters:
            return Projections((back.query[document, None], back.key[document, None], back.value[document, None]), [])
        if any(isinstance(x, DTensor) for x in self.module.parameters()):
            raise InputError(
                f"the processes hold a part each of weights inside {type(self.module).__name__} (a module in it is "
                f"sharded by itself), so that their gradient cannot be split: shard whole layers, or {_WITHOUT}"
            )
        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype, enabled), leaves.insert():
            streams, mask = self._capture(
                lambda: torch.func.functional_call(BareModule(self.module), leaves.by_name, args, kwargs),
                [x[document, None] for x in (back.query, back.key, back.value)],
                f"its weights' gradient cannot be split: {_WITHOUT}",
            )
        projections = leaves.projections(streams)
        every_leaf = [*projections.parameters, *projections.packed, *(leaf for _, leaf in projections.adapters)]
        if _share_leaves(streams, mask, every_leaf):
            raise InputError(
                f"{type(self.module).__name__} makes the bias of its scores with the weights of its queries, keys or "
                f"values too, so that their gradient cannot be split: {_WITHOUT}"
            )
        return projections

    def detach_input(self, streams: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Key and value as a function of the module's own weights, but not of its input.

        Raises:
            InputError: The module did not make the same queries, keys and values again, or got them from another.
        """
        args, kwargs = self._inputs()
        inputs = {x.data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        (_, key, value), _ = self._capture(
            lambda: BareModule(self.module)(*args, **kwargs), streams, 'use a horizon with cut="kv"'
        )
        if key.data_ptr() in inputs:
            raise InputError(
                f"{type(self.module).__name__} reads keys and values that another layer made, so that W_K and W_V "
                'cannot keep what is cut from the hidden state: use a horizon with cut="kv"'
            )
        return key, value

    def _inputs(self, change: Callable[[Any], Any] = lambda x: x) -> tuple[tuple, dict]:
        """Copy the module's inputs into containers that it may write to."""
        return tree_map(change, (self.args, self.kwargs))

    def _capture(
        self, run: Callable[[], Any], streams: Sequence[Tensor], advice: str
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Any]:
        """Query, key and value that `run` hands to attention, which must be those of the forward pass; and its mask."""
        capture = _Capture(self.index)
        try:
            with intercept([self.module], capture, this_thread=True):
                run()
        except (_Captured, TypeError):  # TypeError: called without its input
            pass
        if capture.streams is None or not _are_equal(capture.streams, streams):
            raise InputError(
                f"{type(self.module).__name__} does not make the same queries, keys and values when run again, so "
                f"{advice}"
            )
        return capture.streams, capture.mask


class _Leaves:
    """What stands for the weights of one attention module in a recomputation, to be differentiated by."""

    def __init__(self, weights: ProjectionSet):
        """Make a leaf for each parameter that is not packed.

        Raises:
            InputError: A parameter of an adapter is elsewhere until it is used.
        """
        if any(x.is_meta for x in weights.adapters.values()):
            raise InputError(f"expected adapters in memory; these are offloaded: load the model whole, or {_WITHOUT}")
        self.weights = weights
        self.dense = {name: weight.detach().requires_grad_() for name, weight in weights.dense.items()}
        self.adapters = {name: weight.detach().requires_grad_() for name, weight in weights.adapters.items()}
        self.by_name = {f"module.{name}": leaf for name, leaf in (self.dense | self.adapters).items()}
        self.beside: dict[nn.Module, tuple[Tensor, ...]] = {}  # a zero matrix, perhaps a bias
        self.packed: dict[nn.Module, Tensor] = {}  # a zero

    @contextlib.contextmanager
    def insert(self) -> Iterator[None]:
        """Within the block, add zeros to the outputs of the modules whose own weights are no leaves."""
        hooks = [
            *(module.register_forward_hook(self._add_matrix) for module in self.weights.replaceable),
            *(module.register_forward_hook(self._add_zero) for module in self.weights.packed),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def projections(self, streams: tuple[Tensor, Tensor, Tensor]) -> Projections:
        """Return the leaves with the streams that were computed from them."""
        matrices = [leaf for module in self.weights.replaceable for leaf in self.beside.get(module, ())]
        adapters = list(zip(self.weights.adapters.values(), self.adapters.values(), strict=True))
        return Projections(streams, [*self.dense.values(), *matrices], adapters, list(self.packed.values()))

    def _add_matrix(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        base = self.weights.replaceable[module]
        if module not in self.beside:
            self.beside[module] = zero_leaves(args[0], base)
        return output + add_zero_matrix(args[0], base, self.beside[module]).to(output.dtype)

    def _add_zero(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if module not in self.packed:
            self.packed[module] = output.new_zeros(()).requires_grad_()
        return output + self.packed[module]


def _share_leaves(streams: Sequence[Tensor], mask: Any, leaves: Sequence[Tensor]) -> bool:
    """Return whether a mask with a gradient and the streams depend on the same leaves."""
    if not isinstance(mask, Tensor) or not mask.requires_grad:
        return False
    grads = []
    for outputs in ([x for x in streams if x.requires_grad], [mask]):
        total = torch.stack([x.sum() for x in outputs]).sum()
        grads.append(torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True))
    return any(x is not None and y is not None for x, y in zip(*grads, strict=True))


def _are_equal(recomputed: Sequence[Tensor], originals: Sequence[Tensor]) -> bool:
    """Return whether shapes are equal, and values to rounding."""
    if any(x.shape != y.shape for x, y in zip(recomputed, originals, strict=True)):
        return False
    error = max(max_difference(x, y) / (y.abs().max().item() or 1) for x, y in zip(recomputed, originals, strict=True))
    return error < rounding(originals[0].dtype)


class BareModule(nn.Module):
    """A module without its hooks; the names of its parameters begin with `module.`."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward past its hooks."""
        return self.module.forward(*args, **kwargs)


class _Capture:
    """Keeps the arguments of one attention call of a module, and ends its run there."""

    def __init__(self, index: int):
        self.calls_before = index
        self.streams: tuple[Tensor, Tensor, Tensor] | None = None
        self.mask: Any = None

    def attend(self, call: AttentionCall) -> Tensor:
        """Capture one call; the calls before it get zeros (streams that depend on them are found to be unequal)."""
        if self.calls_before == 0:
            bias = call.options.get("position_bias")
            self.streams = call.query, call.key, call.value
            self.mask = call.attention_mask if bias is None else bias
            raise _Captured
        self.calls_before -= 1
        return call.zero_output()


class _Captured(Exception):
    """Ends a recomputation."""
