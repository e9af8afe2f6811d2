"""The account of one attention call from hooked tensors, in N x N memory. torch only."""

import torch


def credit_by_lag(query, key, value, pattern, grads, scale):
    """Credit (stream, lag) of the edges of one layer, summed over its heads: docs/method.md.

    Args:
        query: (1, head, position, dim), after the rotary embedding.
        key, value: (1, group, position, dim); a group of heads shares them, and their gradient is the group's.
        pattern: (1, head, position, position), after the softmax.
        grads: the gradients of these four and of the output (1, head, position, dim), by name.
        scale: the factor on the scores.
    """
    repeats = query.shape[1] // key.shape[1]
    key, grad_key, grad_value = (x.repeat_interleave(repeats, 1) for x in (key, grads["key"], grads["value"]))
    score = pattern * (grads["pattern"] - (pattern * grads["pattern"]).sum(-1, keepdim=True)) * scale
    edges = (
        score * (grads["query"] @ key.mT),
        score * (query @ grad_key.mT),
        pattern * (grads["output"] @ grad_value.mT),
    )
    summed = [x.sum((0, 1)) for x in edges]
    return torch.stack([torch.stack([x.diagonal(-lag).sum() for lag in range(len(x))]) for x in summed])
