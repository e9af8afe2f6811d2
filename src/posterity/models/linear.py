"""Attention that may look only at itself is a linear layer: this one.

A softmax over one edge is 1, so position i gives W_O (its own value, repeated for the query heads that share it) and
the biases. Scores, and with them everything that depends on the position, cancel. No projection is looked up by its
name: the module's own forward pass is run with an attention function that passes the own value on, and its weight is
read off from the identity. What is read off is checked on random inputs, and refused by name if it is not affine.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from posterity.errors import InputError
from posterity.ops.attention import working

NAME = "posterity_self_only"
CHUNK = 256  # columns of the weight in one pass
SCALES = (1.0, 30.0)  # of the random inputs: small ones would not meet a clamp, large ones not the epsilon of a norm
_calls: ContextVar["_Calls"] = ContextVar("_calls")


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
    with _run_alone(attention_module, heads) as layer, torch.no_grad():
        rows, bias = layer.columns()
        for scale in SCALES:
            hidden = scale * _random((2, 5, layer.width), layer)
            given, linear = layer(hidden), hidden @ rows + bias
            if not _close(given, linear, layer.width):
                raise InputError(f"{layer.kind} is not linear, even where each position looks only at itself: "
                                 f"{_blame(layer, hidden)}")  # fmt: skip
    made: Any = nn.utils.skip_init(  # which draws no random numbers
        nn.Linear, *rows.shape, bias=bool(bias.any()), device=rows.device, dtype=rows.dtype
    )
    with torch.no_grad():
        made.weight.copy_(rows.mT)
        if made.bias is not None:
            made.bias.copy_(bias)
    return made


class _Calls:
    """Which heads pass their value on, and how often they were asked."""

    def __init__(self, heads: Sequence[int] | None):
        self.heads, self.number = heads, 0

    def passing(self, number: int, like: Tensor) -> Tensor:
        """1 for the heads that pass their value on, 0 for the others."""
        if self.heads is None:
            return like.new_ones(number)
        for head in self.heads:
            if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < number:
                raise InputError(f"heads expects numbers from 0 to {number - 1}; got {head!r}")
        passing = like.new_zeros(number)
        passing[list(self.heads)] = 1
        return passing


def _pass_own_value(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    s_aux: Any = None,
    sinks: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers: each position gets its own value."""
    if s_aux is not None or sinks is not None or getattr(module, "sinks", None) is not None:
        raise InputError(
            f"{type(module).__name__} is not linear, even where each position looks only at itself: its attention "
            "sinks take a part of the weight that depends on the query and the key"
        )
    calls, heads = _calls.get(), query.shape[1]
    calls.number += 1
    own = value.repeat_interleave(heads // value.shape[1], 1) * calls.passing(heads, value)[:, None, None]
    return own.transpose(1, 2).contiguous(), None


class _Bare(nn.Module):
    """A module without its hooks."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


class _Alone:
    """An attention module as a function of hidden states (batch, position, width)."""

    def __init__(self, module: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype, device: torch.device):
        self.module, self.weights, self.dtype, self.device = module, weights, dtype, device
        self.kind, self.bare = type(module).__name__, _Bare(module)
        self.width, self.rotary = self._tried()

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._run(hidden, self.rotary)

    def _run(self, hidden: Tensor, rotary: int) -> Tensor:
        arguments = _arguments(self.module.forward, hidden, rotary)
        output = torch.func.functional_call(self.bare, self.weights, (hidden,), arguments)
        return output[0] if isinstance(output, tuple) else output

    def _tried(self) -> tuple[int, int]:
        """Width of the hidden state, and one of the rotary embedding that it runs with (0: a complex number)."""
        inputs = (one.in_features for one in self.module.modules() if isinstance(one, nn.Linear))
        widths = dict.fromkeys((self.module.config.get_text_config().hidden_size, *inputs))  # type: ignore[union-attr]
        dim = next((getattr(self.module, name) for name in ("head_dim", "head_size") if hasattr(self.module, name)), 2)
        failed: Exception | None = None
        for width, rotary in product(widths, dict.fromkeys((1, 2, dim, dim // 2, 0))):
            try:
                self._run(torch.zeros(2, 3, width, device=self.device, dtype=self.dtype), rotary)
            except InputError:
                raise
            except Exception as error:
                failed = failed or error
                continue
            if not _calls.get().number:
                raise InputError(_unknown(self.module, "its forward pass never asks transformers for attention"))
            return width, rotary
        reason = f"{type(failed).__name__}: {str(failed).strip().partition(chr(10))[0]}"
        raise InputError(
            f"{self.kind} does not run on hidden states alone, without the rest of its model ({reason})"
        ) from failed

    def columns(self) -> tuple[Tensor, Tensor]:
        """What each number of the hidden state adds to the output, one a row; and the output for zeros."""
        basis = torch.eye(self.width, device=self.device, dtype=self.dtype)
        bias = self(torch.zeros_like(basis[:1, None]))[0, 0]
        return torch.cat([self(some[:, None])[:, 0] - bias for some in basis.split(CHUNK)]), bias


def _arguments(forward: Callable, hidden: Tensor, rotary: int) -> dict[str, Any]:
    """What a forward pass wants beside the hidden state: no rotation, no mask, no cache."""
    length, device = hidden.shape[1], hidden.device
    ones = hidden.new_ones(1, length, rotary)
    turn = (ones, torch.zeros_like(ones)) if rotary else torch.ones(1, length, 1, device=device, dtype=torch.complex64)
    at = torch.arange(length, device=device)
    known = {
        "position_embeddings": turn, "position_ids": at[None], "cache_position": at,
        "use_cache": False, "shared_kv_states": {}, "attention_mask": None,
    }  # fmt: skip
    wanted = [
        one for one in list(inspect.signature(forward).parameters.values())[1:]
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and (one.name in known or one.default is one.empty)
    ]  # fmt: skip
    return {one.name: known.get(one.name) for one in wanted}


@contextmanager
def _run_alone(module: nn.Module, heads: Sequence[int] | None) -> Iterator[_Alone]:
    """Inside, the module is a function of hidden states; its config, shared with others, and its modes come back."""
    config: Any = getattr(module, "config", None)
    floats = [x for x in module.parameters() if x.is_floating_point()] if isinstance(module, nn.Module) else []
    if not floats or not hasattr(config, "_attn_implementation_internal") or any(map(_is_attention, _inside(module))):
        raise InputError(_unknown(module, "expected one such as model.model.layers[0].self_attn"))
    dtype = working(floats[0].dtype)
    named = [*module.named_parameters(), *module.named_buffers()]
    weights = {f"module.{name}": x.detach().to(dtype) if x.is_floating_point() else x for name, x in named}
    modes, before = [(one, one.training) for one in module.modules()], config._attn_implementation_internal
    AttentionInterface.register(NAME, _pass_own_value)
    token = _calls.set(_Calls(heads))
    try:
        module.eval()
        config._attn_implementation_internal = NAME
        yield _Alone(module, weights, dtype, floats[0].device)
    finally:
        config._attn_implementation_internal = before
        _calls.reset(token)
        for one, mode in modes:
            one.training = mode


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    return (one for one in module.modules() if one is not module)


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention")


def _unknown(module: Any, reason: str) -> str:
    return f"{type(module).__name__} is no attention module of transformers: {reason}"


def _blame(layer: _Alone, hidden: Tensor) -> str:
    """The innermost modules on the way from the hidden state to the output that are not affine, in words."""
    met: list[tuple[str, Tensor, bool]] = []

    def note(name: str) -> Callable:
        def noted(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if isinstance(output, Tensor) and args and isinstance(args[0], Tensor) and output.requires_grad:
                affine = _affine(lambda x: module.forward(x, *args[1:], **kwargs), args[0].detach(), layer)
                met.append((f"{type(module).__name__} ({name})", output, affine))

        return noted

    leaves = [(name, one) for name, one in layer.module.named_modules() if name and not list(one.children())]
    hooks = [one.register_forward_hook(note(name), with_kwargs=True) for name, one in leaves]
    try:
        with torch.enable_grad():
            output = layer(hidden.clone().requires_grad_())
            weighted = (output * _random(output.shape, layer)).sum()
            grads = torch.autograd.grad(weighted, [one for _, one, _ in met], allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    reached = [grad is not None and bool(grad.any()) for grad in grads]
    names = [name for (name, _, affine), on in zip(met, reached, strict=True) if on and not affine]
    if names:
        return f"{' and '.join(dict.fromkeys(names))} on the way of its values is not"
    return f"a gate, a clamp or another product of the hidden state with itself in {layer.kind}.forward is not"


def _affine(run: Callable[[Tensor], Tensor], x: Tensor, layer: _Alone) -> bool:
    """Whether f(x) + f(y) = f(x + y) + f(0)."""
    with torch.no_grad():
        y = x.std() * _random(x.shape, layer)
        one, other, both, zero = (run(z) for z in (x, y, x + y, torch.zeros_like(x)))
        return _close(one + other, both + zero, x.shape[-1])


def _close(one: Tensor, other: Tensor, width: int) -> bool:
    """Whether two results of sums over `width` products are the same to rounding."""
    tolerance = 64 * width**0.5 * torch.finfo(one.dtype).eps
    return bool((one - other).abs().max() <= tolerance * one.abs().max())


def _random(shape: Sequence[int], layer: _Alone) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(layer.device, layer.dtype)
