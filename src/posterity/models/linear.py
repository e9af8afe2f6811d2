"""Attention that may look only at itself is a linear layer: this one.

A softmax over one edge is 1, so position i gives W_O (its own value, repeated for the query heads that share it) and
the biases. Scores, and with them everything that depends on the position, cancel. No projection is looked up by its
name: the module's own forward pass is run with its attention calls intercepted, and its weight is read off from the
identity. What is read off is checked on random inputs, and refused by name if it is not affine.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from posterity.errors import InputError, first_line
from posterity.models.interception import AttentionCall, intercept
from posterity.models.interface import attention_function
from posterity.models.language_model import evaluation_mode
from posterity.models.recompute import BareModule
from posterity.ops.heads import repeat_heads
from posterity.ops.precision import working_dtype

NAME = "posterity_self_only"
CHUNK = 256  # columns of the weight in one pass
SCALES = (1.0, 30.0)  # of the random inputs: small ones would not meet a clamp, large ones not the epsilon of a norm


def as_linear(attention_module: nn.Module, heads: Sequence[int] | None = None) -> nn.Linear:
    """Return the linear layer that an attention module is when each position may look only at itself.

    Args:
        attention_module: An attention module of a transformers model, such as `model.model.layers[3].self_attn`. Its
            config is as before afterwards, errors included.
        heads: Only these query heads pass their value on, the others give zero; the bias of the output projection is
            in the layer in any case. All by default.

    Returns:
        A layer from the module's hidden state to its output, in the module's dtype (float32 for half precision), on
        its device; without a bias if that is zero.

    Raises:
        InputError: It is no attention module of transformers; it has no such head; or it is not linear: the reason
            names what is not (a norm on the values, a gate, a sink).
    """
    with _self_only_module(attention_module, heads) as layer, torch.no_grad():
        rows, bias = layer.columns()
        for scale in SCALES:
            hidden = scale * _random((2, 5, layer.width), layer)
            output, affine = layer(hidden), hidden @ rows + bias
            if not _is_close(output, affine, layer.width):
                raise InputError(f"{layer.kind} is not linear, even where each position looks only at itself: "
                                 f"{_blame(layer, hidden)}")  # fmt: skip
    linear: Any = nn.utils.skip_init(  # which draws no random numbers
        nn.Linear, *rows.shape, bias=bool(bias.any()), device=rows.device, dtype=rows.dtype
    )
    with torch.no_grad():
        linear.weight.copy_(rows.mT)
        if linear.bias is not None:
            linear.bias.copy_(bias)
    return linear


class _SelfOnlyAttention:
    """Interceptor that gives each position its own value, in the heads that pass theirs on, and counts its calls."""

    def __init__(self, heads: Sequence[int] | None):
        self.heads, self.calls = heads, 0

    def attend(self, call: AttentionCall) -> Tensor:
        """Return each position's own value; the module's mask is not looked at."""
        if call.sinks is not None or getattr(call.module, "sinks", None) is not None:
            raise InputError(
                f"{type(call.module).__name__} is not linear, even where each position looks only at itself: its "
                "attention sinks take a part of the weight that depends on the query and the key"
            )
        self.calls += 1
        heads = call.query.shape[1]
        return repeat_heads(call.value, heads) * self._factors(heads, call.value)[:, None, None]

    def _factors(self, number: int, like: Tensor) -> Tensor:
        """Return 1 for the heads that pass their value on, 0 for the others."""
        if self.heads is None:
            return like.new_ones(number)
        for head in self.heads:
            if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < number:
                raise InputError(f"heads expects numbers from 0 to {number - 1}; got {head!r}")
        factors = like.new_zeros(number)
        factors[list(self.heads)] = 1
        return factors


class _SelfOnlyModule:
    """An attention module, run by itself, as a function of hidden states (batch, position, width)."""

    def __init__(self, module: nn.Module, attention: _SelfOnlyAttention, weights: dict[str, Tensor]):
        """`weights`: parameters and buffers by their name in a `BareModule`; the inputs are of their dtype."""
        self.module, self.attention, self.weights = module, attention, weights
        first = next(weight for weight in weights.values() if weight.is_floating_point())
        self.dtype, self.device = first.dtype, first.device
        self.kind, self.bare = type(module).__name__, BareModule(module)
        self.width, self.rotary = self._try_inputs()

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._run(hidden, self.rotary)

    def _run(self, hidden: Tensor, rotary: int) -> Tensor:
        arguments = _arguments(self.module.forward, hidden, rotary)
        output = torch.func.functional_call(self.bare, self.weights, (hidden,), arguments)
        return output[0] if isinstance(output, tuple) else output

    def _try_inputs(self) -> tuple[int, int]:
        """Find widths that the module takes: of the hidden state, and of the rotary embedding (0: a complex number)."""
        inputs = (part.in_features for part in self.module.modules() if isinstance(part, nn.Linear))
        widths = dict.fromkeys((self.module.config.get_text_config().hidden_size, *inputs))  # type: ignore[union-attr]
        dim = next((getattr(self.module, name) for name in ("head_dim", "head_size") if hasattr(self.module, name)), 2)
        failure: Exception | None = None
        for width, rotary in product(widths, dict.fromkeys((1, 2, dim, dim // 2, 0))):
            try:
                self._run(torch.zeros(2, 3, width, device=self.device, dtype=self.dtype), rotary)
            except InputError:
                raise
            except Exception as error:
                failure = failure or error
                continue
            if not self.attention.calls:
                raise InputError(_not_attention(self.module, "its forward pass never asks transformers for attention"))
            return width, rotary
        assert failure is not None
        raise InputError(
            f"{self.kind} does not run on hidden states alone, without the rest of its model "
            f"({first_line(failure, typed=True)})"
        ) from failure

    def columns(self) -> tuple[Tensor, Tensor]:
        """Return what each number of the hidden state adds to the output, one a row; and the output for zeros."""
        basis = torch.eye(self.width, device=self.device, dtype=self.dtype)
        bias = self(torch.zeros_like(basis[:1, None]))[0, 0]
        return torch.cat([self(rows[:, None])[:, 0] - bias for rows in basis.split(CHUNK)]), bias


def _arguments(forward: Callable, hidden: Tensor, rotary: int) -> dict[str, Any]:
    """Return the arguments that a forward pass takes beside the hidden state: no rotation, no mask, no cache."""
    length, device = hidden.shape[1], hidden.device
    ones = hidden.new_ones(1, length, rotary)
    turn = (ones, torch.zeros_like(ones)) if rotary else torch.ones(1, length, 1, device=device, dtype=torch.complex64)
    position = torch.arange(length, device=device)
    values = {
        "position_embeddings": turn, "position_ids": position[None], "cache_position": position,
        "use_cache": False, "shared_kv_states": {}, "attention_mask": None,
    }  # fmt: skip
    parameters = [
        parameter for parameter in list(inspect.signature(forward).parameters.values())[1:]
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and (parameter.name in values or parameter.default is parameter.empty)
    ]  # fmt: skip
    return {parameter.name: values.get(parameter.name) for parameter in parameters}


@contextmanager
def _self_only_module(module: nn.Module, heads: Sequence[int] | None) -> Iterator[_SelfOnlyModule]:
    """Run a module as a function of hidden states; restore its config, shared with others, and its modes on exit."""
    config: Any = getattr(module, "config", None)
    floats = [x for x in module.parameters() if x.is_floating_point()] if isinstance(module, nn.Module) else []
    if not floats or not hasattr(config, "_attn_implementation_internal") or any(map(_is_attention, _parts(module))):
        raise InputError(_not_attention(module, "expected one such as model.model.layers[0].self_attn"))
    dtype, tensors = working_dtype(floats[0].dtype), [*module.named_parameters(), *module.named_buffers()]
    weights = {f"module.{name}": x.detach().to(dtype) if x.is_floating_point() else x for name, x in tensors}
    before, attention = config._attn_implementation_internal, _SelfOnlyAttention(heads)
    AttentionInterface.register(NAME, attention_function)
    with evaluation_mode(module), intercept(module.modules(), attention, this_thread=True):
        try:
            config._attn_implementation_internal = NAME
            yield _SelfOnlyModule(module, attention, weights)
        finally:
            config._attn_implementation_internal = before


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if part is not module)


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention")


def _not_attention(module: Any, reason: str) -> str:
    return f"{type(module).__name__} is no attention module of transformers: {reason}"


def _blame(layer: _SelfOnlyModule, hidden: Tensor) -> str:
    """Describe the innermost modules on the way from the hidden state to the output that are not affine."""
    calls: list[tuple[str, Tensor, bool]] = []  # module, output, whether it is affine

    def recorder(name: str) -> Callable:
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if isinstance(output, Tensor) and args and isinstance(args[0], Tensor) and output.requires_grad:
                affine = _is_affine(lambda x: module.forward(x, *args[1:], **kwargs), args[0].detach(), layer)
                calls.append((f"{type(module).__name__} ({name})", output, affine))

        return record

    leaves = [(name, part) for name, part in layer.module.named_modules() if name and not list(part.children())]
    hooks = [part.register_forward_hook(recorder(name), with_kwargs=True) for name, part in leaves]
    try:
        with torch.enable_grad():
            output = layer(hidden.clone().requires_grad_())
            weighted = (output * _random(output.shape, layer)).sum()
            grads = torch.autograd.grad(weighted, [output for _, output, _ in calls], allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    on_the_way = [grad is not None and bool(grad.any()) for grad in grads]
    names = [name for (name, _, affine), passed in zip(calls, on_the_way, strict=True) if passed and not affine]
    if names:
        return f"{' and '.join(dict.fromkeys(names))} on the way of its values is not"
    return f"a gate, a clamp or another product of the hidden state with itself in {layer.kind}.forward is not"


def _is_affine(run: Callable[[Tensor], Tensor], x: Tensor, layer: _SelfOnlyModule) -> bool:
    """Return whether f(x) + f(y) = f(x + y) + f(0)."""
    with torch.no_grad():
        y = x.std() * _random(x.shape, layer)
        first, second, both, zero = (run(z) for z in (x, y, x + y, torch.zeros_like(x)))
        return _is_close(first + second, both + zero, x.shape[-1])


def _is_close(x: Tensor, y: Tensor, width: int) -> bool:
    """Return whether two results of sums over `width` products are the same to rounding."""
    tolerance = 64 * width**0.5 * torch.finfo(x.dtype).eps
    return bool((x - y).abs().max() <= tolerance * x.abs().max())


def _random(shape: Sequence[int], layer: _SelfOnlyModule) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(layer.device, layer.dtype)
