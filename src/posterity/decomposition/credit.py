"""Accounts of one backward pass: where the gradients of queries, keys and values come from, by lag and by position.

Each edge (i, j) of each head adds one term to three gradients; its credit is the inner product of the term with the
whole gradient that it helped to make, its mass the norm of the term (docs/method.md):

    stream   term           credit             mass
    query    c ds_ij k_j    c ds_ij (k_j.dq_i)  c |ds_ij| |k_j|
    key      c ds_ij q_i    c ds_ij (q_i.dk_j)  c |ds_ij| |q_i|
    value    a_ij do_i      a_ij (do_i.dv_j)    a_ij |do_i|

dk_j and dv_j are the gradients of the key and value themselves, summed over the query heads that share them. Credits of
all edges therefore add up to the squared norms of the gradients that autograd computes: the ledger balances.

The self edges are elementwise work: a_ii = exp(s_ii - lse_i). All others are swept, block by block (sweep.py).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from posterity.decomposition.lag_sums import Scratch, sweep
from posterity.errors import InputError
from posterity.ops.attention import Backward, dot, one_edge, self_edges, working
from posterity.ops.mask import Tile

EXACT_LAGS = 16  # lags below this have a bin each; beyond, four bins an octave


@dataclass(frozen=True)
class Bins:
    """Bins of lags: `first[b] <= lag <= last[b]`. Bin 0 is the self edge alone."""

    first: tuple[int, ...]
    last: tuple[int, ...]
    swept: bool  # False: nothing but self and other is asked for

    @classmethod
    def of(cls, lags: str, context: int) -> "Bins":
        """Bins up to a context: "octaves" (exact up to 15, then a quarter octave each), "all" or "self"."""
        if lags == "all":
            first = list(range(context))
        elif lags == "self":
            first = [0, 1]
        elif lags == "octaves":
            quarters = (round(EXACT_LAGS * 2 ** (n / 4)) for n in range(4 * max(context.bit_length(), 1)))
            first = [*range(EXACT_LAGS), *quarters]
        else:
            raise InputError(f'lags expects "octaves", "all" or "self"; got {lags!r}')
        first = [lag for lag in first if lag < context]
        return cls(tuple(first), (*(lag - 1 for lag in first[1:]), context - 1), lags != "self")

    def sum(self, by_lag: Num[Tensor, "*rest lag"]) -> Num[Tensor, "*rest bin"]:
        """Add up the lags of each bin."""
        if len(self.first) == by_lag.shape[-1]:
            return by_lag
        sums = by_lag.new_zeros(*by_lag.shape[:-1], len(self.first))
        return sums.index_add_(-1, _of_lags(self, by_lag.device), by_lag)


@lru_cache(maxsize=16)
def _of_lags(bins: Bins, device: torch.device) -> Int[Tensor, " lag"]:
    """The number of each lag's bin."""
    widths = [last - first + 1 for first, last in zip(bins.first, bins.last, strict=True)]
    numbers, repeats = torch.arange(len(widths), device=device), torch.tensor(widths, device=device)
    return numbers.repeat_interleave(repeats, output_size=sum(widths))  # else a GPU must be waited for


@dataclass(frozen=True)
class Account:
    """What one backward pass of one layer adds to the ledger, per document of the batch, in float64."""

    credit: Float[Tensor, "batch head stream bin"]
    mass: Float[Tensor, "batch head stream bin"]
    attention: Float[Tensor, "batch head bin"]
    edges: Int[Tensor, "batch bin"]
    credit_by_position: Float[Tensor, "batch head stream side position"]
    attention_first: Float[Tensor, "batch head"]


@dataclass(frozen=True)
class SelfPart:
    """The self edges: a_ii and c ds_ii, and the part of the gradients that a position sends to itself."""

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


def finite(x: Tensor, what: str, place: str = "") -> Tensor:
    """Give a tensor back; raise InputError if a number in it is not finite."""
    if not x.isfinite().all():
        raise InputError(f"{what} is not finite{place}: check the model, or use float32")
    return x


def self_part(back: Backward) -> SelfPart:
    """Self edges, elementwise: O(N d), no scores but the diagonal ones.

    Raises:
        InputError: There are more keys than queries, so that a key has readers outside this pass.
    """
    length = back.lse.shape[2]
    if back.key.shape[2] != length:
        raise InputError(
            f"a ledger needs whole sequences; got {length} queries for {back.key.shape[2]} keys: "
            "call the model without past_key_values"
        )
    given = back.grad_output, back.query, back.repeat(back.key), back.repeat(back.value), back.output, back.lse, back
    return SelfPart(*self_edges(*given), back)


def tally(back: Backward, part: SelfPart, bins: Bins, scratch: Scratch | None = None) -> Account:
    """Credit, mass and attention of every edge, summed by lag and by position."""
    batch, length = len(back.lse), back.lse.shape[2]
    query, key, value = back.wholes
    own = (
        part.grad_score * dot(back.repeat(back.key), query),
        part.grad_score * dot(back.query, key),
        part.attention * dot(back.grad_output, value),
    )
    whole = (dot(back.grad_query, query), dot(back.grad_key, key), dot(back.grad_value, value))
    own_credit, whole_credit = (torch.stack(credits, 2).double() for credits in (own, whole))
    by_position = torch.stack((own_credit, whole_credit - own_credit), 3)
    edges = bins.sum(back.mask.edges(length, back.lse.device)).expand(batch, -1)
    if bins.swept:
        swept = sweep(back, scratch)
        for rows, weight in ((swept[1:5:3], back.key_weight), (swept[2:6:3], back.value_weight)):  # credit and mass
            if weight is not None:
                rows *= weight
        swept = bins.sum(swept)
        credit, mass, attention = swept[:3].movedim(0, 2), swept[3:6].movedim(0, 2), swept[6]
    else:
        credit, mass, attention = _unswept(back, part, by_position)
        credit, mass, attention = (x[..., : len(bins.first)] for x in (credit, mass, attention))
    return Account(credit, mass, attention, edges, _from_start(by_position, back), _attention_first(back))


def _unswept(back: Backward, part: SelfPart, by_position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Credit, mass and attention of the bins (self, other); of the others only the credit is known without a sweep."""
    slope = part.grad_score.abs()
    terms = (
        slope * back.repeat(_norm(back.key)),
        slope * _norm(back.query),
        part.attention * _norm(back.grad_output),
    )
    mass = torch.stack([x.sum(-1, dtype=torch.float64) for x in terms], -1)
    attention = _read(part.attention, back).sum(-1, dtype=torch.float64)
    mass, attention = (torch.stack((x, torch.full_like(x, torch.nan)), -1) for x in (mass, attention))
    return by_position.sum(-1), mass, attention


def _attention_first(back: Backward) -> Float[Tensor, "batch head"]:
    """Attention on the first key, padding left aside, summed over queries."""
    length = back.lse.shape[2]
    at = back.mask.first_columns(length) or [0] * len(back.lse)
    key = torch.stack([x[:, column, None] for x, column in zip(back.key, at, strict=True)])
    bias = back.bias
    if bias is not None:
        bias = bias.expand(len(at), -1, -1, length)
        bias = torch.stack([x[:, :, column] for x, column in zip(bias, at, strict=True)])
    weight, _ = one_edge(back.query, back.repeat(key), back.lse, back, bias)
    for document, column in enumerate(at):
        first = Tile(slice(0, length), slice(column, column + 1), 0, back.mask.plain)
        back.mask.fill_(weight[document, ..., None], first, 0.0, document)
    return _read(weight, back).sum(-1, dtype=torch.float64)


def _from_start(
    by_position: Float[Tensor, "batch *rest position"], back: Backward
) -> Float[Tensor, "batch *rest position"]:
    """Count positions from each document's first real token; what padding leaves free at the end is zero."""
    length, starts = by_position.shape[-1], back.mask.starts(by_position.shape[-1])
    if starts is None:
        return by_position
    at = (torch.arange(length, device=starts.device) + starts[:, None]) % length
    return by_position.gather(-1, at[:, None, None, None].expand_as(by_position))


def _read(weight: Float[Tensor, "batch head query"], back: Backward) -> Float[Tensor, "batch head query"]:
    """Weights of the queries that count as readers."""
    readers = back.mask.readers(weight.shape[-1])
    return weight if readers is None else weight * readers[:, None]


def _norm(x: Float[Tensor, "*rest dim"]) -> Float[Tensor, "*rest"]:
    return x.to(working(x.dtype)).norm(dim=-1)
