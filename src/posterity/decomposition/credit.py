"""Credit and mass of one backward pass: where the gradients of queries, keys and values come from, by lag and position.

Each edge (i, j) of each head adds one term to three gradients; its credit is the inner product of the term with the
whole gradient that it helped to make, its mass the norm of the term (docs/method.md):

    stream   term           credit             mass
    query    c ds_ij k_j    c ds_ij (k_j.dq_i)  c |ds_ij| |k_j|
    key      c ds_ij q_i    c ds_ij (q_i.dk_j)  c |ds_ij| |q_i|
    value    a_ij do_i      a_ij (do_i.dv_j)    a_ij |do_i|

dk_j and dv_j are the gradients of the key and value themselves, summed over the query heads that share them. Credits of
all edges therefore add up to the squared norms of the gradients that autograd computes: the ledger balances.

The self edges are elementwise work: a_ii = exp(s_ii - lse_i). All others are swept, block by block (sweep.py), those
into the first keys of a document apart (first_keys.py).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity.decomposition.bins import Bins
from posterity.decomposition.edge_sums import sum_edges
from posterity.decomposition.first_keys import SINKS, FirstKeys, Spans
from posterity.decomposition.lag_sums import LagSums
from posterity.decomposition.prices import PassPrices
from posterity.decomposition.sweep import Scratch
from posterity.errors import InputError, NotFiniteError
from posterity.ops.attention import Backward
from posterity.ops.precision import dot, working_dtype
from posterity.ops.scores import self_edges

EXACT_POSITIONS = 512  # positions below this have a bin each, by default at most; beyond, four bins an octave


@dataclass(frozen=True)
class PassCredit:
    """The entry of one backward pass of one layer in the ledger, per document of the batch, in float64.

    The axis `reader` (`posterity.axes.READER_OF`) tells the edges into the first keys of a document from all others.
    """

    credit: Float[Tensor, "batch head stream reader bin"]
    mass: Float[Tensor, "batch head stream reader bin"]
    attention: Float[Tensor, "batch head reader bin"]
    edges: Int[Tensor, "batch reader bin"]
    credit_by_side: Float[Tensor, "batch head stream reader side"]
    credit_by_position: Float[Tensor, "batch head stream side position"]
    attention_first: Float[Tensor, "batch head"]
    prices: PassPrices | None


@dataclass(frozen=True)
class SelfEdgeGradients:
    """Attention a_ii and c ds_ii of the self edges, and the part of the gradients that a position sends to itself."""

    attention: Float[Tensor, "batch head position"]
    grad_score: Float[Tensor, "batch head position"]
    back: Backward

    @property
    def query(self) -> Float[Tensor, "batch head position dim"]:
        """The self part of dq."""
        return self.grad_score[..., None] * self.back.repeat(self.back.key)

    @property
    def key(self) -> Float[Tensor, "batch head position dim"]:
        """The self part of each query head's dk."""
        return self.grad_score[..., None] * self.back.query

    @property
    def value(self) -> Float[Tensor, "batch head position dim_v"]:
        """The self part of each query head's dv."""
        return self.attention[..., None] * self.back.grad_output


def check_finite(x: Tensor, quantity: str) -> Tensor:
    """Return `x`; raise NotFiniteError, which names the quantity, unless all entries are finite."""
    if not x.isfinite().all():
        raise NotFiniteError(quantity)
    return x


def self_edge_gradients(back: Backward) -> SelfEdgeGradients:
    """Compute the gradients of the self edges, elementwise: O(N d), no scores but the diagonal ones.

    Raises:
        InputError: There are more keys than queries, so that a key has readers outside this pass.
    """
    length = back.lse.shape[2]
    if back.key.shape[2] != length:
        raise InputError(
            f"a ledger needs whole sequences; got {length} queries for {back.key.shape[2]} keys: "
            "call the model without past_key_values"
        )
    key, value = back.repeat(back.key), back.repeat(back.value)
    attention, grad_score = self_edges(back.grad_output, back.query, key, value, back.output, back.lse, back)
    return SelfEdgeGradients(attention, grad_score, back)


def pass_credit(
    back: Backward,
    self_part: SelfEdgeGradients,
    bins: Bins,
    scratch: Scratch | None = None,
    spans: Spans | None = None,
    sinks: int = SINKS,
    prices: bool = False,
) -> PassCredit:
    """Sum credit, mass and attention of every edge by lag and by position.

    Args:
        back: The backward pass.
        self_part: Its self edges.
        bins: Of lags.
        scratch: Keeps memory between calls.
        spans: Of the documents packed into each row, whose positions are then counted from each document's first token.
        sinks: Number of first positions of a document whose readers are told apart.
        prices: Whether to price pairs and windows too, in the same sweep.
    """
    batch, length = len(back.lse), back.lse.shape[2]
    query, key, value = back.total_gradients()
    self_credits = (
        self_part.grad_score * dot(back.repeat(back.key), query),
        self_part.grad_score * dot(back.query, key),
        self_part.attention * dot(back.grad_output, value),
    )
    total_credits = (dot(back.grad_query, query), dot(back.grad_key, key), dot(back.grad_value, value))
    self_credit, total_credit = (torch.stack(credits, 2).double() for credits in (self_credits, total_credits))
    by_position = torch.stack((self_credit, total_credit - self_credit), 3)
    first_keys = FirstKeys.of(back, sinks, spans)
    first = first_keys.sum_by_lag(back)
    rest, price_sums = sum_edges(
        back, bins if bins.needs_sweep else None, (length,) if prices else None, first_keys.columns(), scratch
    )
    if rest is None:
        rest = _self_and_other(back, self_part, by_position, first, bins)
    credit, mass, attention = (torch.stack(parts, -2) for parts in zip(_bin(first, bins), rest, strict=True))
    edges, first_edges = back.mask.edges(length, back.lse.device).expand(batch, -1), first_keys.edges(back)
    edges = bins.sum(torch.stack((first_edges, edges - first_edges), 1))
    first_sides = torch.stack((first.credit[..., 0], first.credit[..., 1:].sum(-1)), -1).movedim(0, 2)
    by_side = torch.stack((first_sides, by_position.sum(-1) - first_sides), -2)
    attention_first = FirstKeys.of(back, 1, spans).sum_by_lag(back).attention.sum(-1)
    positions = count_positions(by_position, back, spans)
    pass_prices = None if price_sums is None else PassPrices.of(price_sums, first_keys, back)
    return PassCredit(credit, mass, attention, edges, by_side, positions, attention_first, pass_prices)


def _bin(sums: LagSums, bins: Bins) -> tuple[Tensor, Tensor, Tensor]:
    """Return credit, mass (batch, head, stream, bin) and attention (batch, head, bin)."""
    credit, mass, attention = (bins.sum(x) for x in (sums.credit, sums.mass, sums.attention))
    return credit.movedim(0, 2), mass.movedim(0, 2), attention


def _self_and_other(
    back: Backward, self_part: SelfEdgeGradients, by_position: Tensor, first: LagSums, bins: Bins
) -> tuple[Tensor, Tensor, Tensor]:
    """Return credit, mass and attention of the bins self and other, less those of the first keys.

    Without a sweep only the credit of the others is known: their mass and attention are NaN.
    """
    slope = self_part.grad_score.abs()
    terms = (
        slope * back.repeat(_norm(back.key)),
        slope * _norm(back.query),
        self_part.attention * _norm(back.grad_output),
    )
    mass = torch.stack([x.sum(-1, dtype=torch.float64) for x in terms], -1)
    attention = _reader_weights(self_part.attention, back).sum(-1, dtype=torch.float64)
    mass, attention = (torch.stack((x, torch.full_like(x, torch.nan)), -1) for x in (mass, attention))
    totals = (x[..., : len(bins.first)] for x in (by_position.sum(-1), mass, attention))
    credit, mass, attention = (total - part for total, part in zip(totals, _bin(first, bins), strict=True))
    return credit, mass, attention


def count_positions(
    x: Float[Tensor, "batch *rest position"], back: Backward, spans: Spans | None
) -> Float[Tensor, "batch *rest position"]:
    """Let positions count from the first token of each document, which `spans` tell where several share a row."""
    return _shift_to_first_token(x, back) if spans is None else restart_positions(x, spans)


def restart_positions(x: Float[Tensor, "batch *rest position"], spans: Spans) -> Float[Tensor, "batch *rest position"]:
    """Add up what stands at the same position of each document that is packed into a row."""
    sums = torch.zeros_like(x)
    for row_sums, row, row_spans in zip(sums, x, spans, strict=True):
        for span in row_spans:
            row_sums[..., : span.stop - span.start] += row[..., span]
    return sums


def _shift_to_first_token(
    by_position: Float[Tensor, "batch *rest position"], back: Backward
) -> Float[Tensor, "batch *rest position"]:
    """Shift positions so that each document's first real token is position 0; padding moves to the end, as zeros."""
    length, starts = by_position.shape[-1], back.mask.starts(by_position.shape[-1])
    if starts is None:
        return by_position
    index = (torch.arange(length, device=starts.device) + starts[:, None]) % length
    return by_position.gather(-1, index.view(len(index), *[1] * (by_position.dim() - 2), -1).expand_as(by_position))


def _reader_weights(weight: Float[Tensor, "batch head query"], back: Backward) -> Float[Tensor, "batch head query"]:
    """Set the weights of queries that are no readers to zero."""
    readers = back.mask.readers(weight.shape[-1])
    return weight if readers is None else weight * readers[:, None]


def _norm(x: Float[Tensor, "*rest dim"]) -> Float[Tensor, "*rest"]:
    return x.to(working_dtype(x.dtype)).norm(dim=-1)
