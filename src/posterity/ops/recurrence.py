"""Paths between positions through a state: recurrences and convolutions whose gradient is discounted by lag.

A gated linear recurrence writes each key and value into a state, and reads it with the query:

    S'_t = exp(g_t) S_{t-1}      u_t = beta_t (v_t - S'_t^T k_t), the delta rule; or v_t without it
    S_t  = S'_t + k_t u_t^T      o_t = S_t^T q_t

Whatever position j writes reaches position i by i - j steps from one state to the next. With the gradient of the state
multiplied by `rate` at each step, and the states themselves unchanged, one backward pass gives every input at j the
gradient of each output at i times rate^(i-j). The taps of a causal convolution are such steps too.
"""

from math import isqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_BLOCK = 2**21  # numbers in the states of a block: they fit a cache (with 2**24, a step takes twice the time on a CPU)


def discounted_recurrence(
    rate: float,
    query: Float[Tensor, "batch position head dim"],
    key: Float[Tensor, "batch position head dim"],
    value: Float[Tensor, "batch position head dim_v"],
    log_decay: Float[Tensor, "batch position head #dim"],
    beta: Float[Tensor, "batch position head"] | None,
) -> Float[Tensor, "batch position head dim_v"]:
    """Return o_t, whose gradient at every input is multiplied by rate^lag; `beta` None: without the delta rule."""
    if beta is not None:
        beta = beta.unsqueeze(-1).transpose(0, 1)
    streams = (x.transpose(0, 1) for x in (query, key, value, log_decay))
    return _Recurrence.apply(rate, *streams, beta).transpose(0, 1)


def discounted_convolution(
    rate: float,
    x: Float[Tensor, "batch channel position"],
    weight: Float[Tensor, "channel tap"],
    bias: Float[Tensor, " channel"] | None,
) -> Float[Tensor, "batch channel position"]:
    """Return a causal convolution of each channel, whose gradient at `x` is multiplied by rate^lag."""
    length = x.shape[-1]
    taps = [
        torch.nn.functional.pad(_Scale.apply(x, rate**lag), (lag, 0))[..., :length] * column.unsqueeze(-1)
        for lag, column in enumerate(reversed(weight.unbind(-1)))
    ]
    output = torch.stack(taps).sum(0)
    return output if bias is None else output + bias.unsqueeze(-1)


class _Scale(torch.autograd.Function):
    """A tensor as it is; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class _Recurrence(torch.autograd.Function):
    """The recurrence; its inputs have the position first: (position, batch, head, dim)."""

    @staticmethod
    def forward(
        ctx: Any, rate: float, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor | None
    ) -> Tensor:
        state = key.new_zeros(*key.shape[1:], value.shape[-1])
        # Kept are the states at the start of every block, N / length of them, and for a while those of one block.
        ctx.rate, ctx.length, ctx.starts = rate, max(1, _BLOCK // state.numel(), isqrt(len(key)) // 2), []
        outputs = []
        for block in _blocks(len(key), ctx.length):
            q, k, v, g, b = _select(block, query, key, value, log_decay, beta)
            ctx.starts.append(state)
            decayed, written, state = _write(state, k, v, g.exp(), b)
            outputs.append(_read(decayed, q) + (q * k).sum(-1, keepdim=True) * written)
        ctx.save_for_backward(query, key, value, log_decay, beta)
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_decay, beta = ctx.saved_tensors
        d_inputs: list[Any] = [None if x is None else torch.empty_like(x) for x in ctx.saved_tensors]
        d_state = torch.zeros_like(ctx.starts[0])  # of the state behind the block
        blocks = _blocks(len(key), ctx.length)
        for block, start in reversed(list(zip(blocks, ctx.starts, strict=True))):
            q, k, v, g, b = _select(block, query, key, value, log_decay, beta)
            d_output, decay = grads[0][block], g.exp()
            decayed, written, _ = _write(start, k, v, decay, b)
            d_states, d_state = _send_back(d_state, q, k, ctx.rate * decay, b, d_output)
            d_written = _read(d_states, k)
            d_value = d_written if b is None else b * d_written
            d_key = _read(d_states.mT, written)
            d_decay = (d_states * decayed).sum(-1)
            if b is not None:
                erased = _read(decayed.mT, d_value)
                d_key, d_decay = d_key - erased, d_decay - k * erased
                d_inputs[4][block] = ((v - _read(decayed, k)) * d_written).sum(-1, keepdim=True)
            d_query = _read(decayed.mT, d_output) + k * (written * d_output).sum(-1, keepdim=True)
            parts = (d_query, d_key, d_value, d_decay.sum_to_size(g.shape))
            for d_input, part in zip(d_inputs[:4], parts, strict=True):
                d_input[block] = part
        return None, *d_inputs


def _blocks(positions: int, length: int) -> list[slice]:
    return [slice(start, start + length) for start in range(0, positions, length)]


def _select(block: slice, *tensors: Tensor | None) -> Any:
    return [None if x is None else x[block] for x in tensors]


def _read(states: Float[Tensor, "*rest dim dim_v"], x: Float[Tensor, "*rest dim"]) -> Float[Tensor, "*rest dim_v"]:
    """Return S^T x."""
    return (x.unsqueeze(-2) @ states).squeeze(-2)


def _write(
    state: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the S' and u of all positions of a block, and its last S."""
    decayed, written = key.new_empty(len(key), *state.shape), torch.empty_like(value)
    for t in range(len(key)):
        torch.mul(state, decay[t].unsqueeze(-1), out=decayed[t])
        written[t] = value[t] if beta is None else beta[t] * (value[t] - _read(decayed[t], key[t]))
        state = torch.addcmul(decayed[t], key[t].unsqueeze(-1), written[t].unsqueeze(-2))
    return decayed, written, state


def _send_back(
    d_state: Tensor, query: Tensor, key: Tensor, decay: Tensor, beta: Tensor | None, d_output: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of every S of a block, and of the state before it; `decay` has the rate in it."""
    d_states = key.new_empty(len(key), *d_state.shape)
    for t in reversed(range(len(key))):
        torch.addcmul(d_state, query[t].unsqueeze(-1), d_output[t].unsqueeze(-2), out=d_states[t])
        d_decayed = d_states[t]
        if beta is not None:
            d_value = beta[t] * _read(d_states[t], key[t])
            d_decayed = torch.addcmul(d_decayed, key[t].unsqueeze(-1), d_value.unsqueeze(-2), value=-1)
        d_state = d_decayed * decay[t].unsqueeze(-1)
    return d_states, d_state
