"""Modules whose backward pass is not the derivative of their forward pass, found with finite differences.

A fused kernel can be right forward and wrong backward. Every gradient that is measured would then be that of the
kernel. So one module of each kind is run again on what it got in a forward pass of the probe, and its gradient along
a few random directions is compared with central differences of its forward pass in float64 (in its own precision where
it knows no float64, or is large).
"""

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Cache, PreTrainedModel

from posterity.models.language_model import rounding

DIRECTIONS = 3
ROWS = 8  # of each parameter that are changed, and of the batch, which is 1
LARGEST = 2**26  # numbers: beyond, a copy of the parameters in float64 would be too large
# Step of a difference relative to the numbers that it changes: truncation and rounding both stay below `rounding`.
STEPS = {torch.float64: 2e-3, torch.float32: 1e-2}
STEP_HALF_PRECISION = 1e-1
# What differences tell apart, relative to the gradient: some models compute norms in float32 whatever they get.
RESOLUTION = 1e-3


class _ModuleError(Exception):
    """A module fails when it is run by itself: it may need what another one left behind, or know no float64."""


@dataclass(frozen=True, eq=False)
class _Call:
    """A module and the input that it got; `differentiable`: which of its tensors carry a gradient."""

    module: nn.Module
    inputs: list[Any]
    structure: Any  # of args and kwargs
    differentiable: list[bool]

    @cached_property  # asked for in every run
    def parameters(self) -> dict[str, Tensor]:
        """Its parameters that have gradients; packed ones do not."""
        parts = self.module.named_parameters()
        return {name: x for name, x in parts if x.is_floating_point() and type(x) in (Tensor, nn.Parameter)}

    def run(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return the outputs for other inputs and parameters, in the order of `start`.

        Raises:
            _ModuleError: The module's own code fails.
        """
        values = iter(tensors)
        inputs = [next(values) if flag else x for x, flag in zip(self.inputs, self.differentiable, strict=True)]
        parameters = dict(zip(self.parameters, values, strict=True))
        if dtype is not None:
            inputs = [_cast(x, dtype) for x in inputs]
            parameters |= {name: _cast(x, dtype) for name, x in self.module.named_buffers()}
        try:
            args, kwargs = tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in inputs], self.structure)
            output = torch.func.functional_call(self.module, parameters, args, kwargs)
        except Exception as error:  # whatever it is
            raise _ModuleError from error
        return [x for x in tree_flatten(output)[0] if isinstance(x, Tensor) and x.is_floating_point()]

    def start(self) -> list[Tensor]:
        """Return the inputs and parameters that have gradients, as leaves."""
        inputs = [x for x, flag in zip(self.inputs, self.differentiable, strict=True) if flag]
        return [x.detach().clone().requires_grad_() for x in (*inputs, *self.parameters.values())]


def find_wrong_gradients(model: PreTrainedModel, rows: Sequence[Tensor]) -> tuple[str, ...]:
    """Return the innermost modules whose gradient disagrees with finite differences, "Class (name), off by 50 %".

    Modules of torch itself are tried as parts of others only. Kinds that cannot be run by themselves, and forward
    passes that are no smooth function (of rounded numbers), are left out.

    Args:
        model: In evaluation mode.
        rows: Tokens, (1, position); a module must disagree on all of them, for a router that is undecided between two
            experts has a kink.
    """
    names, errors = _one_of_each_kind(model), {}
    with torch.enable_grad():
        for row in rows:
            errors = {}
            for name, call in _record_calls(model, names, row).items():
                with contextlib.suppress(_ModuleError):
                    errors[name] = _gradient_error(call)
            errors = {name: error for name, error in errors.items() if error > max(RESOLUTION, rounding(model.dtype))}
            names = list(errors)
    innermost = [name for name in errors if not any(inside.startswith(f"{name}.") for inside in errors)]
    return tuple(
        f"{type(model.get_submodule(name)).__name__} ({name}), off by {100 * errors[name]:.2g} %" for name in innermost
    )


def describe_wrong_gradients(names: Sequence[str]) -> str:
    """Say in one line that these modules were found."""
    return (
        f"the backward pass is not the derivative of the forward pass in {', '.join(names)}: every gradient behind it "
        "is affected (run the model without that kernel, or know why)"
    )


def _record_calls(model: PreTrainedModel, names: Sequence[str], row: Tensor) -> dict[str, _Call]:
    """Return the first call of each of some modules in a forward pass, by its name."""
    calls: dict[str, _Call] = {}
    if not names:
        return calls

    def recorder(name: str) -> Callable:
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if name not in calls:
                inputs, structure = tree_flatten((args, {key: _plain(x) for key, x in kwargs.items()}))
                flags = [isinstance(x, Tensor) and x.requires_grad for x in inputs]
                inputs = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
                calls[name] = _Call(module, inputs, structure, flags)

        return record

    def start_graph(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        return output.detach().requires_grad_().clone()  # some models scale it in place

    with contextlib.ExitStack() as stack:
        hooks = [model.get_submodule(n).register_forward_pre_hook(recorder(n), with_kwargs=True) for n in names]
        for hook in (*hooks, model.get_input_embeddings().register_forward_hook(start_graph)):
            stack.callback(hook.remove)
        model(input_ids=row, use_cache=False)
    return calls


def _one_of_each_kind(model: PreTrainedModel) -> list[str]:
    """Return the name of the first module of each kind, those around the embeddings and torch's own left out."""
    names: dict[Hashable, str] = {}
    embeddings = set(model.get_input_embeddings().modules())
    for name, module in model.named_modules():
        if embeddings & set(module.modules()) or not name:
            continue
        changed = "forward" in vars(module) or module._backward_hooks or module._forward_hooks
        if type(module).__module__.startswith("torch.nn.") and not changed:
            continue
        role = ".".join(part for part in name.split(".") if not part.isdecimal())
        shapes = tuple((x.shape, x.dtype, x.device) for x in module.parameters())
        names.setdefault((role, type(module), name if changed else None, shapes), name)
    return list(names.values())


def _plain(x: Any) -> Any:
    """Return an argument without a cache, and a user's dictionary as a plain one, which a second run may write to."""
    return None if isinstance(x, Cache) else dict(x) if hasattr(x, "keys") else x


def _gradient_error(call: _Call) -> float:
    """Return how far the gradient is from finite differences, relative to its size; 0 if that cannot be said.

    The median over a few random directions: in one of them a router may choose another expert on the way. A first look
    along one direction clears most modules.

    Raises:
        _ModuleError: The module cannot be run by itself.
    """
    start = call.start()
    outputs = call.run(start)
    outputs_have_graph = any(x.requires_grad for x in outputs)
    if not any(call.differentiable) or not outputs_have_graph or any(not x.dim() for x in start):
        return 0.0
    dtype, exact = _widest_run(call, start, outputs)
    generator = torch.Generator().manual_seed(0)
    weights = [_random(x, generator) * _equal_rows(x, y) for x, y in zip(outputs, exact, strict=True)]
    grads = torch.autograd.grad(_inner(outputs, weights), start, allow_unused=True)
    grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(start, grads, strict=True)]
    point = _cast_all(start, torch.float64)
    slopes = _Slopes(call, point, grads, weights, dtype, generator)
    if slopes.error(precise=False) < max(RESOLUTION, rounding(outputs[0].dtype)) / 4:
        return 0.0
    return sorted(slopes.error() for _ in range(DIRECTIONS))[DIRECTIONS // 2]


@dataclass(frozen=True, eq=False)
class _Slopes:
    """A weighted sum of a module's outputs, along random directions from a point in float64."""

    call: _Call
    point: Sequence[Tensor]
    grads: Sequence[Tensor]
    weights: Sequence[Tensor]
    dtype: torch.dtype  # of the runs
    generator: torch.Generator

    def error(self, precise: bool = True) -> float:
        """Return the error of the gradient along the next direction; 0 where it is not smooth enough to tell.

        `precise`: by differences over three distances, so that kinks are seen and errors of second order cancel.
        """
        direction = [_random(x[:ROWS], self.generator) * x[:ROWS].square().mean().sqrt() for x in self.point]
        step = STEPS.get(self.dtype, STEP_HALF_PRECISION)
        fine = coarse = narrow = self._slope(direction, step)
        if precise:
            coarse, narrow = self._slope(direction, 2 * step), self._slope(direction, step / 16)
        slope = (4 * fine - coarse) / 3  # Richardson
        grads = [grad[:ROWS] for grad in self.grads]
        # What a sum of as many terms of random signs is like: an error in any of them counts by its size.
        terms = [(v * grad.double()).square().sum().cpu() for v, grad in zip(direction, grads, strict=True)]
        size = torch.maximum(torch.stack(terms).sum().sqrt(), slope.abs()).clamp(min=1e-300)
        error = (_inner(grads, direction) - slope).abs()
        roughness = torch.maximum((fine - coarse).abs(), (fine - narrow).abs())
        return (error / size).item() if error > 10 * roughness else 0.0

    def _slope(self, direction: Sequence[Tensor], step: float) -> Tensor:
        return (self._value(direction, step) - self._value(direction, -step)) / (2 * step)

    @torch.no_grad()
    def _value(self, direction: Sequence[Tensor], distance: float) -> Tensor:
        origin = [x[:ROWS].clone() for x in self.point]
        for x, v in zip(self.point, direction, strict=True):
            x[:ROWS] += distance * v
        value = _inner(self.call.run(_cast_all(self.point, self.dtype), self.dtype), self.weights)
        for x, x0 in zip(self.point, origin, strict=True):
            x[:ROWS] = x0
        return value


@torch.no_grad()
def _widest_run(
    call: _Call, start: Sequence[Tensor], outputs: Sequence[Tensor]
) -> tuple[torch.dtype, Sequence[Tensor]]:
    """Return float64 and the outputs in it; of a large module, or a kernel that knows no float64, its own."""
    if sum(x.numel() for x in start) <= LARGEST:
        try:
            wide = call.run(_cast_all(start, torch.float64), torch.float64)
        except _ModuleError:
            return outputs[0].dtype, outputs
        if all(x.dtype == torch.float64 for x in wide):
            return torch.float64, wide
    return outputs[0].dtype, outputs


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [_cast(x.detach(), dtype) for x in tensors]


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two lists of tensors, in float64."""
    return torch.stack([(x.double() * y.double()).sum().cpu() for x, y in zip(left, right, strict=True)]).sum()


def _random(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs, of the shape of a tensor."""
    signs = torch.randint(0, 2, x.shape, generator=generator, dtype=torch.int8)
    return (2 * signs - 1).to(x.device, torch.float64)


def _equal_rows(x: Tensor, y: Tensor) -> Tensor:
    """Return 1 for rows equal to rounding, 0 for others: in another precision a router may choose other experts."""
    difference = (x.detach().double() - y.double()).norm(dim=-1, keepdim=True)
    return (difference <= rounding(x.dtype) * y.double().norm(dim=-1, keepdim=True)).double()
