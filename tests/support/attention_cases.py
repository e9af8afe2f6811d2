"""Cases of the attention operator: shapes, lengths, masks and biases."""

import torch
from support.reference import allowed_pairs

from posterity.ops.attention import attention
from posterity.ops.mask import Mask

LENGTHS = (1, 3, 7, 8, 9, 16, 21)


HEADS, GROUPS, DIM, DIM_V = 4, 2, 5, 3


def mask_case(name, length, batch=2):
    """Return (Mask, allowed pairs of the reference, readers)."""
    window, documents, padding = None, None, None
    if name == "window":
        window = 3
    if name == "packed":
        documents = torch.arange(length) // 6
    if name.endswith("padding"):
        padding = torch.ones(batch, length, dtype=torch.bool)
        padding[1, : length // 3] = False
        if name == "right padding":
            padding = padding.flip(1)
    allowed = allowed_pairs(length, window, documents, padding)
    if name == "plain":
        return Mask(), allowed, None
    if padding is not None:
        return Mask(padding=padding), allowed, padding
    return Mask(lambda query, key: allowed[0, 0][query, key]), allowed, None


MASKS = ("plain", "window", "packed", "left padding", "right padding")


def leaves(length, dim_v=DIM_V, sinks=False, batch=2, dtype=torch.double):
    shapes = ((batch, HEADS, length, DIM), (batch, GROUPS, length, DIM), (batch, GROUPS, length, dim_v))
    tensors = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    return [*tensors, torch.randn(HEADS, dtype=dtype).requires_grad_() if sinks else None]


BIASES = {  # of a batch of two and so many positions
    "whole": lambda length: (2, HEADS, length, length),
    "by head and key": lambda length: (1, HEADS, 1, length),
    "by document and query": lambda length: (2, 1, length, 1),
    "one number": lambda length: (1, 1, 1, 1),
}


def run_backward(query, key, value, grad, **options):
    """Return the `Backward` of one call, with a scale of 0.7."""
    passes = []
    attention(query, key, value, 0.7, observe=passes.append, **options).backward(grad)
    return passes[0]
