"""Causal attention, blockwise, with a backward pass that can be observed.

For one head, with scale c (design: docs/method.md):

    s_ij = c q_i.k_j          (soft-capped where the model does so, then with the model's own bias b_ij if it has one)
    a_ij = exp(s_ij - lse_i)  over the edges (i, j) the mask allows
    o_i  = sum_j a_ij v_j

and backward, with do_i the gradient at o_i and D_i = do_i.o_i:

    dv_j = sum_i a_ij do_i    ds_ij = a_ij (do_i.v_j - D_i)
    dk_j = c sum_i ds_ij q_i  dq_i  = c sum_j ds_ij k_j

Nothing of size N x N is ever held: the forward pass keeps the log-sum-exp `lse`, the backward pass recomputes one block
of scores at a time (blockwise.py; Dao 2023, arXiv 2307.08691). Plain causal attention goes to torch's fused kernels
(fused_kernels.py), all other on CUDA to kernels of our own (block_kernels.py).

Under a horizon (horizon_rules.py) every edge's part of dk and dv carries a factor that depends on its lag; dq never
does.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from posterity.errors import InputError
from posterity.ops.block_kernels import kernel_table, triton_attention
from posterity.ops.blockwise import block_backward, block_forward
from posterity.ops.fused_kernels import Kernel, select_kernel
from posterity.ops.heads import repeat_heads, sum_heads
from posterity.ops.horizon_rules import Full, Rule, factors_by_lag
from posterity.ops.mask import Mask
from posterity.ops.precision import dot
from posterity.ops.scores import Scoring, self_edges


@dataclass(frozen=True)
class SharedStream:
    """A query, key or value tensor that several attention calls read, from one of which the model has it."""

    gradient: Tensor  # over all calls that read it: (batch, head or group, position, dim)
    borrowers: "tuple[Backward, ...] | None"  # the passes of the other calls; None: this call is one of them


@dataclass(frozen=True, kw_only=True)
class Backward(Scoring):
    """One finished backward pass of the operator: all that is needed to account for every edge of it.

    Keys and values are shared by groups of `heads // key_value_heads` query heads. `grad_key` and `grad_value` are each
    query head's own part; their sum over the group is the gradient that autograd sees, unless other calls read the same
    tensor: then `shared` has the gradient of all of them, for query, key and value. `key_factor` and `value_factor` are
    the horizon's factors that are in them; None if all are 1.
    """

    query: Float[Tensor, "batch head query dim"]
    key: Float[Tensor, "batch group key dim"]
    value: Float[Tensor, "batch group key dim_v"]
    output: Float[Tensor, "batch head query dim_v"]
    lse: Float[Tensor, "batch head query"]
    grad_output: Float[Tensor, "batch head query dim_v"]
    grad_query: Float[Tensor, "batch head query dim"]
    grad_key: Float[Tensor, "batch head key dim"]
    grad_value: Float[Tensor, "batch head key dim_v"]
    key_factor: Float[Tensor, " lag"] | None = None
    value_factor: Float[Tensor, " lag"] | None = None
    shared: tuple[SharedStream | None, SharedStream | None, SharedStream | None] = (None, None, None)
    _total: tuple[Tensor, Tensor, Tensor] | None = field(default=None, init=False, repr=False, compare=False)

    def repeat(self, shared: Float[Tensor, "batch group *rest"]) -> Float[Tensor, "batch head *rest"]:
        """Give each query head its own copy of what its group shares."""
        return repeat_heads(shared, self.query.shape[1])

    def total_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value that autograd sees, repeated for the query heads.

        Computed by the first call and kept.
        """
        if self._total is None:
            query, key, value = (self.stream_gradient(stream) for stream in range(3))
            object.__setattr__(self, "_total", (query, self.repeat(key), self.repeat(value)))
        assert self._total is not None
        return self._total

    def stream_gradient(self, stream: int) -> Float[Tensor, "batch _ position _"]:
        """Return the gradient of the query (0), key (1) or value (2) tensor, over all calls that read it."""
        shared = self.shared[stream]
        return self.call_gradient(stream) if shared is None else shared.gradient.to(self.query.device)

    def call_gradient(self, stream: int) -> Float[Tensor, "batch _ position _"]:
        """Return the part of that gradient that this call sends: of all its heads, over the heads of the tensor."""
        grad = (self.grad_query, self.grad_key, self.grad_value)[stream]
        return grad if stream == 0 else sum_heads(grad, self.key.shape[1])


OutputAndState = tuple[Tensor, tuple[Tensor | None, ...]]  # the state is what a backward pass needs beside the output


class OutputTape:
    """Outputs of attention calls in order, recorded when a layer runs and given back when it runs again."""

    def __init__(self):
        """Start empty."""
        self._outputs: list[OutputAndState] = []
        self._replay: Iterator[OutputAndState] | None = None

    def rewind(self) -> None:
        """Begin a run: the first is recorded, later ones get what it recorded."""
        self._replay = iter(self._outputs) if self._outputs else None

    def output(self, attend: Callable[[], OutputAndState]) -> OutputAndState:
        """Return the output of the next call: recorded before, or computed by `attend` now."""
        if self._replay is not None:
            output, state = next(self._replay)
            return output.detach(), state
        output, state = attend()
        self._outputs.append((output.detach(), state))  # `output` itself will hold the graph, and the graph the tape
        return output, state


@dataclass(frozen=True, kw_only=True)
class _Options(Scoring):
    horizon: Callable[[], tuple[Rule, Rule]]
    observe: Callable[[Backward], None] | None
    tape: OutputTape | None = None


def _full_horizon() -> tuple[Rule, Rule]:
    return Full(), Full()


def attention(
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch group key dim"],
    value: Float[Tensor, "batch group key dim_v"],
    scale: float | None = None,
    *,
    mask: Mask | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | Float[Tensor, "batch head query"] | None = None,
    bias: Float[Tensor, "_ _ _ _"] | None = None,
    horizon: Callable[[], tuple[Rule, Rule]] = _full_horizon,
    detached: tuple[Tensor | None, Tensor | None] = (None, None),
    observe: Callable[[Backward], None] | None = None,
    tape: OutputTape | None = None,
) -> Float[Tensor, "batch head query dim_v"]:
    """Causal attention, differentiable once in query, key, value, sinks and bias, in memory linear in the length.

    Under autocast it takes what fused attention takes there: everything but float64 in autocast's type.

    Args:
        query: Queries. With fewer queries than keys they stand at the last positions.
        key: Keys; `head` must be a multiple of `group` (grouped-query attention).
        value: Values; their width may differ from the keys'.
        scale: Factor on the scores; 1/sqrt(dim) by default.
        mask: Which pairs are edges; plain causal by default.
        softcap: Scores become softcap * tanh(scores / softcap).
        sinks: One extra logit per head, or per query, that takes weight and gives no value.
        bias: Added to the scores after scale and soft-cap; one of full size is N x N memory of the caller's own.
        horizon: Asked in each backward pass for the rules of keys and of values.
        detached: The same key and value, computed from a detached hidden state: their numbers are not used; they
            receive the gradient that the horizon removes from `key` and `value`.
        observe: Called once per backward pass with the finished `Backward`.
        tape: Records the output, or gives one that was recorded of the same call.

    Raises:
        InputError: The shapes do not fit each other.
    """
    batch, heads, queries, dim = query.shape
    groups, keys = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != dim or value.shape[:3] != key.shape[:3] or heads % groups:
        raise InputError(
            "attention expects query (batch, head, query, dim), key (batch, group, key, dim) and value (batch, group, "
            f"key, dim_v), head a multiple of group; got {[*query.shape]}, {[*key.shape]}, {[*value.shape]}"
        )
    if queries > keys:
        raise InputError(f"attention expects at least as many keys as queries; got {queries} queries, {keys} keys")
    shape = batch, heads, queries, keys
    if bias is not None and (bias.dim() != 4 or any(x not in (1, y) for x, y in zip(bias.shape, shape, strict=True))):
        raise InputError(f"attention expects a bias that broadcasts to {[*shape]}; got {[*bias.shape]}")
    if sinks is not None and sinks.dim() == 1:
        sinks = sinks[None, :, None]
    options = _Options(
        scale=dim**-0.5 if scale is None else float(scale),
        softcap=softcap or None,
        mask=mask or Mask(),
        bias=None if bias is None else bias.detach(),
        horizon=horizon,
        observe=observe,
        tape=tape,
    )
    with _without_autocast(query.device.type) as dtype:
        tensors = [
            x if x is None or dtype is None or x.dtype == torch.float64 else x.to(dtype)
            for x in (query, key, value, *detached)
        ]
        return _Attention.apply(*tensors[:3], sinks, bias, *tensors[3:], options)


@contextlib.contextmanager
def _without_autocast(device: str) -> Iterator[torch.dtype | None]:
    """Disable autocast inside the block; yield the dtype it had, None if it was off."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        yield None
        return
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        yield dtype


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, bias, key_detached, value_detached, options):
        def attend():
            kernel = _fused_kernel(query, key, value, sinks, options)
            if kernel is not None:
                return kernel.forward(query, key, value, options.scale)
            table = kernel_table(query, key, value, options)
            if table is None or triton_attention is None:
                output, lse = block_forward(query, key, value, sinks, options)
            else:
                output, lse = triton_attention.forward(query, key, value, sinks, options, table)
            return output, (lse, None, None)

        output, state = attend() if options.tape is None else options.tape.output(attend)
        ctx.save_for_backward(query, key, value, sinks, bias, output, *state)
        ctx.options = options
        ctx.detached = key_detached is not None, value_detached is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        with _without_autocast(grad_output.device.type):
            return _Attention._backward(ctx, grad_output)

    @staticmethod
    def _backward(ctx, grad_output):
        query, key, value, sinks, bias, output, *state = ctx.saved_tensors
        options, groups, lse = ctx.options, key.shape[1], state[0][..., : query.shape[2]]
        factors = [factors_by_lag(rule, key.shape[2], lse) for rule in options.horizon()]
        limited = any(factor is not None for factor in factors)
        key_per_head, value_per_head = (repeat_heads(x, query.shape[1]) for x in (key, value))
        tensors = grad_output, query, key_per_head, value_per_head, output, lse
        grad_bias = torch.zeros_like(bias, dtype=lse.dtype) if ctx.needs_input_grad[4] else None

        def by_blocks(factors: Sequence[Tensor | None] = (None, None), grad_bias: Tensor | None = None):
            table = kernel_table(query, key, value, options)
            if table is None or triton_attention is None:
                return block_backward(*tensors, options, factors, grad_bias)
            return triton_attention.backward(grad_output, query, key, value, output, lse, options, table, factors)

        kernel = _fused_kernel(query, key, value, sinks, options)
        if kernel is None:
            compute_total = partial(by_blocks, grad_bias=grad_bias)
        else:
            compute_total = partial(kernel.backward, *tensors[:5], state, options.scale)
        # With cut="hidden" the projections hand over keys and values twice, attached to the hidden state and detached
        # from it. The attached ones get what the factors leave (kept), the detached ones the rest (cut): so W_K and
        # W_V learn from the total gradient, while the hidden state gets only the part that is kept.
        detached = ctx.detached if limited else (False, False)
        (grad_query, *kept_grads), (_, *total_grads) = _gradients(
            tensors, options, factors, compute_total, by_blocks, any(detached), grad_bias
        )
        cut_grads = [
            total - grad if stream else None
            for total, grad, stream in zip(total_grads, kept_grads, detached, strict=True)
        ]
        if options.observe is not None:
            # What the projections get, and the factors that are in it.
            grad_key, grad_value = (
                total if stream else grad for total, grad, stream in zip(total_grads, kept_grads, detached, strict=True)
            )
            key_factor, value_factor = (
                None if stream else factor for factor, stream in zip(factors, detached, strict=True)
            )
            back = Backward(
                query=query.detach(),
                key=key.detach(),
                value=value.detach(),
                output=output.detach(),
                lse=lse.detach(),
                grad_output=grad_output.detach(),
                grad_query=grad_query,
                grad_key=grad_key,
                grad_value=grad_value,
                key_factor=key_factor,
                value_factor=value_factor,
                scale=options.scale,
                softcap=options.softcap,
                mask=options.mask,
                bias=options.bias,
            )
            options.observe(back)
        grad_sinks = None
        if sinks is not None:
            weight = torch.exp(sinks - lse)
            grad_sinks = -(weight * dot(grad_output, output)).sum_to_size(sinks.shape).to(sinks.dtype)
        kept_grads, cut_grads = (
            [None if x is None else sum_heads(x, groups) for x in grads] for grads in (kept_grads, cut_grads)
        )
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_query, *kept_grads, grad_sinks, grad_bias, *cut_grads, None


def _gradients(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],  # grad_output, query, key, value, output, lse
    scoring: Scoring,
    factors: list[Tensor | None],
    compute_total: Callable[[], Sequence[Tensor]],
    by_blocks: Callable[[Sequence[Tensor | None], Tensor | None], Sequence[Tensor]],
    with_total: bool,
    grad_bias: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return dq and each query head's own dk and dv under the factors of a horizon; and, if `with_total`, without them.

    `compute_total` returns the latter, and adds the gradient of the bias, which has no factor, to `grad_bias`;
    `by_blocks` returns the former, and does likewise.
    """
    grad_output, query, key = tensors[:3]
    limited = any(factor is not None for factor in factors)
    elementwise = all(factor is None or not factor[1:].any() for factor in factors)  # self edges or everything
    blockwise = not elementwise or (limited and query.shape[2] != key.shape[2])
    totals: list[Tensor] = []
    if with_total or not blockwise:
        totals = list(compute_total())
    if blockwise:
        grads = list(by_blocks(factors, None if totals else grad_bias))
        return grads, totals if with_total else grads
    if not limited:
        return totals, totals
    weight, grad_score = self_edges(*tensors, scoring)
    terms = zip(totals[1:], factors, (grad_score, weight), (query, grad_output), strict=True)
    limited_grads = [
        grad if factor is None else (edge[..., None] * reader).to(query.dtype) for grad, factor, edge, reader in terms
    ]
    return [totals[0], *limited_grads], totals


def _fused_kernel(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scoring: Scoring) -> Kernel | None:
    plain = scoring.mask.plain and scoring.softcap is None and sinks is None and scoring.bias is None
    return select_kernel(query, key, value) if plain else None
