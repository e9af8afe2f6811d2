"""Horizons on what mixes positions beside attention: linear attention, state spaces, convolutions.

transformers' mixing modules call a handful of kernels by the same names in all modelling files. Each has a formula here
of the same output, whose gradient at every input is multiplied by rate^lag. The forward pass keeps the model's own
kernel, and so does a backward pass over all lags; under a discount the gradient goes through the formula instead.

A kernel is known by its name alone. Whether the formula is right for it, and whether every path is covered, is measured
for each model (`horizon_check`).
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.activations import ACT2FN

from posterity.errors import InputError
from posterity.models.language_model import replace_forwards
from posterity.ops.precision import working_dtype
from posterity.ops.recurrence import discounted_convolution, discounted_recurrence

Rate = Callable[[], float]  # of the backward pass that asks
Formula = Callable[..., Tensor]  # of a rate and the arguments of the kernel


def _convolution(
    rate: float,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """Causal convolution of every channel, (batch, channel, position)."""
    dtype = working_dtype(weight.dtype)
    bias = bias if bias is None else bias.to(dtype)
    output = discounted_convolution(rate, hidden_states.to(dtype), weight.to(dtype), bias)
    return output if activation is None else ACT2FN[activation](output)


def _delta_rule(
    rate: float, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *_args: Any,
    use_qk_l2norm_in_kernel: bool = False, **_: Any,
) -> Tensor:  # fmt: skip
    """Gated delta rule, (batch, position, head, dim); `g` is the log of a decay by head, or by channel of the key."""
    heads, dtype = value.shape[2], working_dtype(query.dtype)
    query, key = (x.to(dtype).repeat_interleave(heads // x.shape[2], 2) for x in (query, key))
    value, g, beta = (x.to(dtype) for x in (value, g, beta))
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query = query * query.shape[-1] ** -0.5
    return discounted_recurrence(rate, query, key, value, g.unsqueeze(-1) if g.dim() == 3 else g, beta)


def _state_space(
    rate: float, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *_args: Any,
    D: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")), **_: Any,
) -> Tensor:  # fmt: skip
    """State space of Mamba 2, (batch, position, head, dim)."""
    heads, dtype = hidden_states.shape[2], working_dtype(hidden_states.dtype)
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit).to(dtype).unsqueeze(-1)
    B, C = (x.to(dtype).repeat_interleave(heads // x.shape[2], 2) for x in (B, C))
    x = hidden_states.to(dtype)
    output = discounted_recurrence(rate, C, B, x * dt, A.to(dtype).unsqueeze(-1) * dt, None)
    return output if D is None else output + D.to(dtype).unsqueeze(-1) * x


def _selective_scan(
    rate: float, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *_args: Any,
    D: Tensor | None = None, z: Tensor | None = None, delta_bias: Tensor | None = None,
    delta_softplus: bool = False, **_: Any,
) -> Tensor:  # fmt: skip
    """State space of Mamba, (batch, channel, position); every channel is a head."""
    dtype = working_dtype(hidden_states.dtype)
    dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype).unsqueeze(-1)
    dt = (F.softplus(dt) if delta_softplus else dt).to(dtype)
    x, (B, C) = hidden_states.to(dtype), (x.to(dtype).mT.unsqueeze(2).expand(-1, -1, dt.shape[1], -1) for x in (B, C))
    value, log_decay = (x * dt).mT.unsqueeze(-1), A.to(dtype) * dt.mT.unsqueeze(-1)
    output = discounted_recurrence(rate, C, B, value, log_decay, None).squeeze(-1).mT
    output = output if D is None else output + D.to(dtype).unsqueeze(-1) * x
    return output if z is None else output * F.silu(z.to(dtype))


_FORMULAS: Mapping[str, Formula] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _state_space,
    "mamba_selective_scan": _selective_scan,
}
# Computes a whole module at once where it is installed; for None the module goes on with its parts.
_FUSED = "mamba2_split_conv1d_scan_combined"


def find_mixers(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules whose forward() calls a kernel with a formula."""
    return tuple(module for module in model.modules() if _kernels(module))


@contextlib.contextmanager
def discount_states(model: nn.Module, start_pass: Callable[[], Rate]) -> Iterator[None]:
    """Within the block, put the kernels of forward passes under a horizon.

    Args:
        model: Its modules are restored on exit.
        start_pass: Called in each call of a kernel that has a gradient; returns what says the rate of a backward pass
            through it.
    """
    forwards = {}
    for mixer in find_mixers(model):
        kernels = {name: _discount(kernel, _FORMULAS[name], start_pass) for name, kernel in _kernels(mixer).items()}
        kernels[_FUSED] = lambda *_, **__: None
        forward = _with_globals(type(mixer).forward, kernels).__get__(mixer)
        forwards[mixer] = torch.compiler.disable(forward)  # the compiler writes into the globals that it expects
    with replace_forwards(forwards):
        yield


def _kernels(module: nn.Module) -> dict[str, Callable]:
    """Return the kernels that a module's forward() calls by name; none if that was replaced."""
    forward = inspect.unwrap(type(module).forward)
    if "forward" in vars(module) or not isinstance(forward, FunctionType):
        return {}
    names = _FORMULAS.keys() & set(forward.__code__.co_names) & forward.__globals__.keys()
    return {name: forward.__globals__[name] for name in names}


def _with_globals(function: FunctionType, names: Mapping[str, Any]) -> FunctionType:
    """Copy a function, and what its decorators wrap, with other globals of these names."""
    wrapped, closure = getattr(function, "__wrapped__", None), function.__closure__
    if wrapped is not None and closure is not None:
        inner = _with_globals(wrapped, names)
        closure = tuple(CellType(inner) if cell.cell_contents is wrapped else cell for cell in closure)
    copy = FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__, closure
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _discount(kernel: Callable, formula: Formula, start_pass: Callable[[], Rate]) -> Callable:
    """Return a kernel whose backward pass goes through its formula where a rate below 1 is in force."""

    def run(*args: Any, **kwargs: Any) -> Any:
        result = kernel(*args, **kwargs)
        output, *others = result if isinstance(result, tuple) else (result,)
        if not output.requires_grad:
            return result
        for name in ("initial_state", "initial_states", "cu_seqlens", "seq_idx"):
            if kwargs.get(name) is not None:
                raise InputError(
                    "a horizon on a state expects one document from its beginning; got "
                    f"{'packed documents' if name in ('cu_seqlens', 'seq_idx') else 'a state of earlier tokens'}: "
                    "pass whole documents, one a row, without a cache"
                )
        leaves, spec = tree_flatten((args, kwargs))

        def run_formula(rate: float, tensors: tuple[Tensor, ...]) -> Tensor:
            iterator = iter(tensors)
            inputs = [next(iterator) if isinstance(x, Tensor) else x for x in leaves]
            formula_args, formula_kwargs = tree_unflatten(inputs, spec)
            return formula(rate, *formula_args, **formula_kwargs)

        tensors = [x for x in leaves if isinstance(x, Tensor)]
        output = _Discounted.apply(output, run_formula, start_pass(), *tensors)
        return (output, *others) if isinstance(result, tuple) else output

    return run


class _Discounted(torch.autograd.Function):
    """The output of a kernel. Its gradient goes to the kernel, or through the formula to the kernel's inputs."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, run_formula: Callable, rate: Rate, *tensors: Tensor) -> Tensor:
        ctx.run_formula, ctx.rate = run_formula, rate
        ctx.save_for_backward(*tensors)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rate, needed = ctx.rate(), ctx.needs_input_grad[3:]
        if rate == 1:
            return grads[0], None, None, *(None for _ in needed)
        tensors = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            output = ctx.run_formula(rate, tensors)
        inputs = [x for x in tensors if x.requires_grad]
        by_input = iter(torch.autograd.grad(output, inputs, grads[0].to(output.dtype)))
        return None, None, None, *(next(by_input) if need else None for need in needed)
