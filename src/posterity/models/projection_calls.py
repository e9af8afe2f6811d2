"""Calls of plain projections in attention modules: their inputs, and their outputs in the graph.

From them the gradients of W_Q, W_K and W_V come without running a module again (decomposition/weight_gradients.py).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from posterity.decomposition.projections import find_projections
from posterity.decomposition.weight_gradients import ProjectionTrace, TracedProjection

_PLAIN = (nn.Linear, Conv1D)  # and no class derived from them, which may compute something else


@dataclass(frozen=True)
class ProjectionCall:
    """One call of a plain projection with a gradient."""

    projection: nn.Module
    input: Tensor  # without its graph
    version: int  # of the input: it counts changes in place
    output: GradientEdge


@dataclass(frozen=True)
class AttentionInputs:
    """What one attention call got: the projections that its module called before, and query, key and value."""

    module: nn.Module
    calls: tuple[ProjectionCall, ...]
    batch: int
    streams: tuple[tuple[GradientEdge, torch.dtype] | None, ...]

    def trace(self) -> ProjectionTrace | None:
        """Return how weights reach query, key and value; None unless all projections of the module are plain ones.

        Parameters are numbered as a recomputation numbers them (`Recomputation.project`).
        """
        weights = find_projections(self.module)
        if not weights.dense or weights.adapters or weights.replaceable or weights.packed:
            return None
        if any(isinstance(x, DTensor) for x in weights.dense.values()):
            return None
        numbers = {id(x): number for number, x in enumerate(weights.dense.values())}
        traced = []
        for call in self.calls:
            weight, bias = call.projection.weight, call.projection.bias
            by_document = call.input.dim() > 2 and len(call.input) == self.batch
            if id(weight) not in numbers or not by_document or call.input._version != call.version:
                return None
            number = None if bias is None else numbers.get(id(bias))
            transposed = isinstance(call.projection, Conv1D)
            traced.append(TracedProjection(call.input, call.output, numbers[id(weight)], number, transposed))
        return ProjectionTrace(traced, self.streams) if traced else None


class ProjectionCalls:
    """The calls of plain projections inside each attention module, while it runs."""

    def __init__(self, modules: Iterable[nn.Module]):
        """Start with the attention modules, none of them entered."""
        self._calls: dict[nn.Module, list[ProjectionCall]] = {module: [] for module in modules}

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record the calls of the block."""
        hooks = []
        for module, calls in self._calls.items():
            hooks.append(module.register_forward_pre_hook(_eraser(calls)))
            hooks.append(module.register_forward_hook(_eraser(calls)))
            for child in module.modules():
                if type(child) in _PLAIN:
                    hooks.append(child.register_forward_hook(_recorder(calls)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for calls in self._calls.values():
                calls.clear()

    def enter_attention(self, module: nn.Module, streams: tuple[Tensor, Tensor, Tensor]) -> AttentionInputs:
        """Return what has been recorded of a module that now calls attention."""
        edges = tuple((get_gradient_edge(x), x.dtype) if x.requires_grad else None for x in streams)
        return AttentionInputs(module, tuple(self._calls[module]), len(streams[0]), edges)


def _eraser(calls: list[ProjectionCall]) -> Callable[..., None]:
    def erase(*_: object) -> None:
        if not torch.compiler.is_compiling():
            calls.clear()

    return erase


def _recorder(calls: list[ProjectionCall]) -> Callable[..., None]:
    def record(projection: nn.Module, args: tuple, output: Tensor) -> None:
        # Compiled code has no graph of its own operations; a call with keywords has no `args`.
        if not torch.compiler.is_compiling() and args and isinstance(output, Tensor) and output.requires_grad:
            calls.append(ProjectionCall(projection, args[0].detach(), args[0]._version, get_gradient_edge(output)))

    return record
