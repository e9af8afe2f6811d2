"""Losses of a model whose attention is changed by hand: heads that see only themselves, and patches."""

import torch
from support.reference import dense_attention
from support.spy import use_attention


def mean_loss(model, ids, folded):
    """Mean loss of a token in every window; folded heads (by layer) have a diagonal mask, written down by hand."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        lower = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
        allowed = lower.expand(query.shape[1], -1, -1).clone()
        allowed[folded.get(module.layer_idx, [])] = torch.eye(query.shape[2], dtype=torch.bool)
        output, _, _ = dense_attention(query, key, value, scaling, allowed[None])
        return output.transpose(1, 2).contiguous(), None

    with use_attention(model, "by hand", attend), torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


def _one_head(query, key, value, allowed, scale, softcap, sink, kind, positions):
    """One head under a patch: every edge (i, j) has a key and a value of its own, (query, key, dim)."""
    length = len(query)
    edges = torch.zeros(length, length, dtype=torch.bool)
    keys, values = key.repeat(length, 1, 1), value.repeat(length, 1, 1)
    for i, j in allowed.nonzero().tolist():
        only = allowed[i].sum() == 1
        edges[i, j] = {"no self": i != j or only, "self and first": j in (0, i), "self only": i == j}.get(kind, True)
        if (kind == "own mean" and i == j in positions) or (kind == "later mean" and i > j and j in positions):
            keys[i, j], values[i, j] = key.sum(0) / length, value.sum(0) / length
    score = scale * torch.einsum("id,ijd->ij", query, keys)
    score = score if softcap is None else softcap * torch.tanh(score / softcap)
    weight = torch.exp(score) * edges
    total = weight.sum(1) + (0 if sink is None else torch.exp(sink))
    return torch.einsum("ij,ijd->id", weight / total[:, None], values)


def losses_by_hand(model, ids, kind=None, layer=None, head=None, positions=None):
    """Losses of one window, by position, with the edges, keys and values of some heads changed one edge at a time."""
    positions = None if positions is None else positions.tolist()

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        repeats = query.shape[1] // key.shape[1]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows = []
        for h in range(query.shape[1]):
            is_patched = layer in (None, module.layer_idx) and head in (None, h)
            streams = query[0, h], key[0, h // repeats], value[0, h // repeats], attention_mask[0, 0] == 0
            sink = None if s_aux is None else s_aux[h]
            rows.append(_one_head(*streams, scaling, softcap, sink, kind if is_patched else None, positions))
        return torch.stack(rows, 1)[None], None

    with torch.no_grad(), use_attention(model, "by_hand", attend):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return torch.stack([torch.logsumexp(x, -1) - x[target] for x, target in zip(logits[:-1], ids[1:], strict=True)])
