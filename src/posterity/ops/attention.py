"""Causal attention, blockwise, with a backward pass that can be watched.

For one head, with scale c (design: docs/method.md):

    s_ij = c q_i.k_j          (soft-capped where the model does so, then with the model's own bias b_ij if it has one)
    a_ij = exp(s_ij - lse_i)  over the edges (i, j) the mask allows
    o_i  = sum_j a_ij v_j

and backward, with do_i the gradient at o_i and D_i = do_i.o_i:

    dv_j = sum_i a_ij do_i    ds_ij = a_ij (do_i.v_j - D_i)
    dk_j = c sum_i ds_ij q_i  dq_i  = c sum_j ds_ij k_j

Nothing of size N x N is ever held: the forward pass keeps the log-sum-exp `lse`, the backward pass recomputes one block
of scores at a time (Dao 2023, arXiv 2307.08691). Plain causal attention goes to torch's fused kernels (fused.py).

Under a horizon (horizon.py) every edge's part of dk and dv carries a factor that depends on its lag; dq never does.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from posterity.errors import InputError
from posterity.ops.fused_kernels import Kernel, kernel
from posterity.ops.horizon_rules import Full, Rule, by_lag
from posterity.ops.mask import Mask, Tile


@dataclass(frozen=True)
class Backward:
    """One finished backward pass of the operator: all that is needed to account for every edge of it.

    Keys and values are shared by groups of `heads // key_value_heads` query heads. `grad_key` and `grad_value` are each
    query head's own part; their sum over the group is the gradient that autograd sees. `key_weight` and
    `value_weight` are the horizon's factors that are in them; None if all are 1.
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
    scale: float
    softcap: float | None
    mask: Mask
    key_weight: Float[Tensor, " lag"] | None = None
    value_weight: Float[Tensor, " lag"] | None = None
    bias: Float[Tensor, "#batch #head #query #key"] | None = None

    def repeat(self, grouped: Float[Tensor, "batch group *rest"]) -> Float[Tensor, "batch head *rest"]:
        """Give each query head its own copy of what its group shares."""
        return grouped.repeat_interleave(self.query.shape[1] // self.key.shape[1], 1)

    @cached_property
    def wholes(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of query, key and value that autograd sees, repeated for the query heads that share them."""
        groups = self.key.shape[1]
        key, value = (self.repeat(group_sum(x, groups)) for x in (self.grad_key, self.grad_value))
        return self.grad_query, key, value


@dataclass(frozen=True)
class _Options:
    scale: float
    softcap: float | None
    mask: Mask
    horizon: Callable[[], tuple[Rule, Rule]]
    observe: Callable[[Backward], None] | None
    bias: Tensor | None = None


def _full() -> tuple[Rule, Rule]:
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
    horizon: Callable[[], tuple[Rule, Rule]] = _full,
    detached: tuple[Tensor | None, Tensor | None] = (None, None),
    observe: Callable[[Backward], None] | None = None,
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
        detached: Key and value once more (their numbers are not used): they get the gradient that the horizon takes
            from `key` and `value`.
        observe: Called once per backward pass with the finished `Backward`.

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
    whole = batch, heads, queries, keys
    if bias is not None and (bias.dim() != 4 or any(x not in (1, y) for x, y in zip(bias.shape, whole, strict=True))):
        raise InputError(f"attention expects a bias that broadcasts to {[*whole]}; got {[*bias.shape]}")
    if sinks is not None and sinks.dim() == 1:
        sinks = sinks[None, :, None]
    factor = dim**-0.5 if scale is None else float(scale)
    options = _Options(
        factor, softcap or None, mask or Mask(), horizon, observe, None if bias is None else bias.detach()
    )
    with _without_autocast(query.device.type) as kind:
        given = [
            x if x is None or kind is None or x.dtype == torch.float64 else x.to(kind)
            for x in (query, key, value, *detached)
        ]
        return _Attention.apply(*given[:3], sinks, bias, *given[3:], options)


@contextlib.contextmanager
def _without_autocast(device: str) -> Iterator[torch.dtype | None]:
    """Inside, autocast is off; gives the type it had, if it was on."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        yield None
        return
    kind = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        yield kind


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, bias, key_detached, value_detached, options):
        fused = _fused(query, key, value, sinks, options)
        if fused is None:
            output, lse = _block_forward(query, key, value, sinks, options)
            kept = lse, None, None
        else:
            output, kept = fused.forward(query, key, value, options.scale)
        ctx.save_for_backward(query, key, value, sinks, bias, output, *kept)
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
        query, key, value, sinks, bias, output, *kept = ctx.saved_tensors
        options, groups, lse = ctx.options, key.shape[1], kept[0][..., : query.shape[2]]
        weights = [by_lag(rule, key.shape[2], lse) for rule in options.horizon()]
        key_, value_ = (x.repeat_interleave(query.shape[1] // groups, 1) for x in (key, value))
        given: tuple = grad_output, query, key_, value_, output, lse, options
        grad_bias = torch.zeros_like(bias, dtype=lse.dtype) if ctx.needs_input_grad[4] else None
        fused = _fused(query, key, value, sinks, options)
        whole = partial(_block_backward, *given, grad_bias=grad_bias)
        if fused is not None:
            whole = partial(fused.backward, *given[:5], kept, options.scale)
        limited = any(weight is not None for weight in weights)
        apart = ctx.detached if limited else (False, False)
        (grad_query, *grads), (_, *wholes) = _grads(given, weights, whole, any(apart), grad_bias)
        # What reaches the projections, the factors in it, and what of it passes the hidden state by.
        reached = [whole if one else x for whole, x, one in zip(wholes, grads, apart, strict=True)]
        weights = [None if one else weight for weight, one in zip(weights, apart, strict=True)]
        beyond = [whole - x if one else None for whole, x, one in zip(wholes, grads, apart, strict=True)]
        if options.observe is not None:
            back = Backward(
                query.detach(), key.detach(), value.detach(), output.detach(), lse.detach(), grad_output.detach(),
                grad_query, reached[0], reached[1], options.scale, options.softcap, options.mask,
                weights[0], weights[1], options.bias,
            )  # fmt: skip
            options.observe(back)
        grad_sinks = None
        if sinks is not None:
            weight = torch.exp(sinks - lse)
            grad_sinks = -(weight * dot(grad_output, output)).sum_to_size(sinks.shape).to(sinks.dtype)
        grads, beyond = ([None if x is None else group_sum(x, groups) for x in some] for some in (grads, beyond))
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_query, *grads, grad_sinks, grad_bias, *beyond, None


def _grads(
    given: tuple,
    weights: list[Tensor | None],
    whole: Callable[[], Sequence[Tensor]],
    both: bool,
    grad_bias: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """dq and each query head's own part of dk and dv, under the factors of a horizon; and, if `both`, without them.

    `whole` gives the latter, and adds the gradient of the bias, which has no factor, to `grad_bias`.
    """
    grad_output, query, key = given[:3]
    limited = any(weight is not None for weight in weights)
    alone = all(weight is None or not weight[1:].any() for weight in weights)  # self edges or everything
    blockwise = not alone or (limited and query.shape[2] != key.shape[2])
    wholes: list[Tensor] = []
    if both or not blockwise:
        wholes = list(whole())
    if blockwise:
        grads = _block_backward(*given, weights=weights, grad_bias=None if wholes else grad_bias)
        return grads, wholes if both else grads
    if not limited:
        return wholes, wholes
    weight, grad_score = self_edges(*given)
    edges = zip(wholes[1:], weights, (grad_score, weight), (query, grad_output), strict=True)
    own = [
        whole if factors is None else (edge[..., None] * left).to(query.dtype) for whole, factors, edge, left in edges
    ]
    return [wholes[0], *own], wholes


def self_edges(
    grad_output: Float[Tensor, "batch head position dim_v"],
    query: Float[Tensor, "batch head position dim"],
    key: Float[Tensor, "batch head position dim"],
    value: Float[Tensor, "batch head position dim_v"],
    output: Float[Tensor, "batch head position dim_v"],
    lse: Float[Tensor, "batch head position"],
    options: "_Options | Backward",
) -> tuple[Float[Tensor, "batch head position"], Float[Tensor, "batch head position"]]:
    """a_ii and c ds_ii, elementwise: O(N d), no scores but the diagonal ones."""
    bias = options.bias
    if bias is not None:
        bias = bias.expand(-1, -1, query.shape[2], key.shape[2]).diagonal(key.shape[2] - query.shape[2], -2, -1)
    weight, slope = one_edge(query, key, lse, options, bias)
    allowed = options.mask.diagonal(query.shape[2], key.shape[2], lse.device)
    if allowed is not None:
        weight = weight * allowed
    return weight, options.scale * slope * weight * (dot(grad_output, value) - dot(grad_output, output))


def one_edge(
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch head #query dim"],
    lse: Float[Tensor, "batch head query"],
    options: "_Options | Backward",
    bias: Float[Tensor, "#batch #head #query"] | None,
) -> tuple[Float[Tensor, "batch head query"], Float[Tensor, "batch head query"] | float]:
    """Attention of each query on a key of its own under a bias, without the mask; and the slope of the soft-cap."""
    score, slope = options.scale * dot(query, key), 1.0
    if options.softcap is not None:
        tanh = torch.tanh(score / options.softcap)
        score, slope = options.softcap * tanh, 1 - tanh * tanh
    if bias is not None:
        score = score + bias
    return torch.exp(score - lse), slope


def dot(x: Float[Tensor, "*#rest dim"], y: Float[Tensor, "*#rest dim"]) -> Float[Tensor, "*#rest"]:
    """Inner products, in the working precision."""
    return (x.to(working(x.dtype)) * y).sum(-1)


def group_sum(per_head: Float[Tensor, "batch head key dim"], groups: int) -> Float[Tensor, "batch group key dim"]:
    """Add the parts of the query heads that share a key or value head."""
    return per_head if per_head.shape[1] == groups else per_head.unflatten(1, (groups, -1)).sum(2)


def _fused(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, options: _Options) -> Kernel | None:
    plain = options.mask.plain and options.softcap is None and sinks is None and options.bias is None
    return kernel(query, key, value) if plain else None


def _block_forward(query, key, value, sinks, options):
    """Softmax over blocks of keys with a running maximum; an empty row gets output 0 and lse +inf, so that a = 0."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    output = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=working(query.dtype))
    for rows, tiles in options.mask.tiles(query.shape[2], key.shape[2], query.device):
        top = lse.new_full((*query.shape[:2], rows.stop - rows.start, 1), -torch.inf)
        if sinks is not None:
            top = top.maximum((sinks if sinks.shape[2] == 1 else sinks[:, :, rows])[..., None])
        total = torch.zeros_like(top) if sinks is None else torch.ones_like(top)
        gathered = top.new_zeros(*top.shape[:3], value.shape[3])
        for tile in tiles:
            score, _ = block_scores(query, key, tile, options)
            new_top = top.maximum(score.amax(-1, keepdim=True))
            weight = torch.exp(score - new_top.nan_to_num(neginf=0.0))
            shrink = torch.exp(top - new_top.nan_to_num(neginf=0.0))
            total = total * shrink + weight.sum(-1, keepdim=True)
            gathered = gathered * shrink + weight @ value[:, :, tile.columns].to(weight.dtype)
            top = new_top
        empty = total == 0
        output[:, :, rows] = (gathered / total.masked_fill(empty, 1)).to(output.dtype)
        lse[:, :, rows] = (top + total.log()).masked_fill(empty, torch.inf).squeeze(-1)
    return output, lse


def _block_backward(
    grad_output, query, key, value, output, lse, options, weights=(None, None), grad_bias: Tensor | None = None
):
    """The four sums at the top of this file, one block of scores at a time; `weights`: factors by lag for dk, dv.

    Adds ds_ij to `grad_bias`, summed where the bias is broadcast.
    """
    grads = [torch.zeros_like(x, dtype=working(x.dtype)) for x in (query, key, value)]
    delta = dot(grad_output, output)[..., None]
    for rows, tiles in options.mask.tiles(query.shape[2], key.shape[2], query.device):
        query_i, grad_i = query[:, :, rows].to(lse.dtype), grad_output[:, :, rows].to(lse.dtype)
        for tile in tiles:
            columns = tile.columns
            score, slope = block_scores(query, key, tile, options)
            weight = score.sub_(lse[:, :, rows, None]).exp_()
            grad_score = (grad_i @ value[:, :, columns].to(lse.dtype).mT).sub_(delta[:, :, rows]).mul_(weight)
            if grad_bias is not None:
                part = bias_block(grad_bias, tile)
                part += grad_score.sum_to_size(part.shape)
            grad_score.mul_(options.scale if slope is None else options.scale * slope)
            grads[0][:, :, rows] += grad_score @ key[:, :, columns].to(lse.dtype)
            for grad, edge, left, factor in zip(
                grads[1:], (grad_score, weight), (query_i, grad_i), weights, strict=True
            ):
                factors = None if factor is None else _on(factor, tile)
                if factors is None or factors.any():
                    grad[:, :, columns] += (edge if factors is None else edge * factors).mT @ left
    return [grad.to(query.dtype) for grad in grads]


def _on(factor: Float[Tensor, " lag"], tile: Tile) -> Float[Tensor, "rows columns"]:
    """Factors by lag, laid out on the pairs of a block; what they are where key > query does not matter."""
    rows, columns = (torch.arange(x.start, x.stop, device=factor.device) for x in (tile.rows, tile.columns))
    return factor[(tile.offset + rows[:, None] - columns).clamp_(min=0)]


def block_scores(
    query: Tensor, key: Tensor, tile: Tile, options: "_Options | Backward"
) -> tuple[Tensor, Tensor | None]:
    """Scores of one block, -inf off the edges, and the slope of the soft-cap."""
    dtype = working(query.dtype)
    score = options.scale * query[:, :, tile.rows].to(dtype) @ key[:, :, tile.columns].to(dtype).mT
    slope = None
    if options.softcap is not None:
        tanh = torch.tanh(score / options.softcap)
        score, slope = options.softcap * tanh, 1 - tanh * tanh
    if options.bias is not None:
        score += bias_block(options.bias, tile)
    return options.mask.fill_(score, tile, -torch.inf), slope


def bias_block(bias: Tensor, tile: Tile) -> Tensor:
    """What a bias (or its gradient) is on one block: a view that broadcasts as the bias does."""
    rows, columns = (
        x if size > 1 else slice(None) for x, size in zip((tile.rows, tile.columns), bias.shape[2:], strict=True)
    )
    return bias[:, :, rows, columns]


def working(dtype: torch.dtype) -> torch.dtype:
    """Half precision is accounted in float32; everything else in its own precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
