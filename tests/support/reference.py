"""The slow, dense, float64 account of one attention call. It says what is right, and imports nothing of the package.

Everything of size N x N is held, and every gradient comes from autograd through plain tensor operations.
"""

import torch


def allowed_pairs(length, window=None, documents=None, padding=None):
    """Bool (batch or 1, 1, query, key): the edges, written down pair by pair."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    allowed = key <= query
    if window is not None:
        allowed = allowed & (query - key < window)
    if documents is not None:
        allowed = allowed & (documents[:, None] == documents[None, :])
    allowed = allowed[None, None]
    return allowed if padding is None else allowed & padding[:, None, None, :]


def dense_attention(query, key, value, scale, allowed, softcap=None, sinks=None, bias=None):
    """Compute attention as written in the textbooks; return (output, scores before the soft-cap, weights)."""
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    score = scale * (query @ key.mT)
    capped = score if softcap is None else softcap * torch.tanh(score / softcap)
    capped = capped if bias is None else capped + bias
    capped = capped.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        sinks = sinks[None, :, None] if sinks.dim() == 1 else sinks
        capped = torch.cat([capped, sinks[..., None].expand(*capped.shape[:3], 1)], -1)
    exponent = torch.exp(capped - capped.amax(-1, keepdim=True).nan_to_num(neginf=0.0))
    weight = exponent / exponent.sum(-1, keepdim=True).clamp(min=torch.finfo(exponent.dtype).tiny)
    weight = weight[..., : key.shape[2]]
    return weight @ value, score, weight


def dense_account(query, key, value, grad, scale, allowed, softcap=None, sinks=None, readers=None, bias=None):
    """Return every edge's term in full.

    Credit and mass (stream, batch, head, query, key), weights, allowed pairs, the gradients and the terms.
    """
    leaves = [x.detach().double().requires_grad_() for x in (query, key, value)]
    sinks = None if sinks is None else sinks.detach().double()
    bias = None if bias is None else bias.detach().double()
    output, score, weight = dense_attention(*leaves, scale, allowed, softcap, sinks, bias)
    score.retain_grad()
    output.backward(grad.double())
    share = query.shape[1] // key.shape[1]
    totals = [leaves[0].grad, *(x.grad.repeat_interleave(share, 1) for x in leaves[1:])]
    query, key = leaves[0].detach(), leaves[1].detach().repeat_interleave(share, 1)
    slope = scale * score.grad[..., None]
    terms = (slope * key[:, :, None], slope * query[:, :, :, None], weight.detach()[..., None] * grad[:, :, :, None])
    total_per_edge = (totals[0][:, :, :, None], totals[1][:, :, None], totals[2][:, :, None])
    credit = torch.stack([(term * total).sum(-1) for term, total in zip(terms, total_per_edge, strict=True)])
    mass = torch.stack([term.norm(dim=-1) for term in terms])
    weight = weight.detach()
    if readers is not None:
        weight = weight * readers[:, None, :, None]
        allowed = allowed & readers[:, None, :, None]
    return credit, mass, weight, allowed, [x.grad for x in leaves], terms


def by_reader_and_lag(edges, starts, sinks=4):
    """Sum (..., batch, head, query, key) by lag: the first keys from each document's start on, and all others."""
    key = torch.arange(edges.shape[-1])
    first = torch.stack([(key >= start) & (key < start + sinks) for start in starts])[:, None, None]
    return torch.stack([by_lag(edges * part) for part in (first, ~first)], -2)


def by_lag(edges):
    """Sum (..., query, key) along its diagonals: (..., lag)."""
    length = edges.shape[-1]
    return torch.stack([edges.diagonal(-lag, -2, -1).sum(-1) for lag in range(length)], -1)
