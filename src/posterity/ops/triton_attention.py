# pyright: reportIndexIssue=false, reportCallIssue=false
# A kernel is launched by an index, its grid; Triton has no types for it.
"""Attention under any mask by Triton kernels (kernels/attention_passes.py).

Products take the inputs' own precision, sums are in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from posterity.kernels.attention_passes import forward_kernel, key_value_kernel, query_kernel
from posterity.kernels.tiles import padded
from posterity.ops.block_table import BlockTable
from posterity.ops.precision import dot, working_dtype
from posterity.ops.scores import Scoring


def tile_shape(query: Tensor, value: Tensor) -> tuple[int, int]:
    """Return queries and keys of a block, so that the operands of all kernels fit a program."""
    width = max(query.shape[-1], value.shape[-1]) * query.element_size()
    if width <= 256:
        return 64, 64
    return (32, 32) if width <= 512 else (16, 16)


def precision(dtype: torch.dtype) -> str:
    """Return Triton's name for the precision of products of this type; half precision has its own."""
    return "ieee" if dtype != torch.float32 else FLOAT32


FLOAT32 = "tf32x3"  # three products of tensor cores: float32 but for the last bit or two
_WARPS = 4


def forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scoring: Scoring, table: BlockTable
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, as `blockwise.block_forward` does."""
    query, key, value = (x.contiguous() for x in (query, key, value))
    batch, heads, length, dim = query.shape
    output = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=working_dtype(query.dtype))
    logits = lse if sinks is None else sinks.to(lse.dtype).expand_as(lse).contiguous()
    forward_kernel[table.count[0], batch * heads](
        query, key, value, logits, output, lse,
        *table.by_row, table.edges, scoring.scale, scoring.softcap or 1.0,
        length, heads, key.shape[1], *table.strides, table.count[0], dim, value.shape[3],
        *table.shape, padded(dim), padded(value.shape[3]),
        scoring.softcap is not None, sinks is not None, precision(query.dtype), num_warps=_WARPS,
    )  # fmt: skip
    return output, lse


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scoring: Scoring,
    table: BlockTable,
    factors: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, and each query head's own dk and dv under `factors` by lag, as `blockwise.block_backward` does.

    Keys and values are those of the groups, not repeated.
    """
    delta = dot(grad_output, output).contiguous()
    grad_output, query, key, value, lse = (x.contiguous() for x in (grad_output, query, key, value, lse))
    batch, heads, length, dim = query.shape
    grad_query = torch.empty_like(query)
    grad_key, grad_value = query.new_empty(query.shape), query.new_empty(*query.shape[:3], value.shape[3])
    operands = grad_output, query, key, value, lse, delta
    sizes = length, heads, key.shape[1], *table.strides
    widths = dim, value.shape[3], *table.shape, padded(dim), padded(value.shape[3])
    score = scoring.scale, scoring.softcap or 1.0
    softcap, exact = scoring.softcap is not None, precision(query.dtype)
    query_kernel[table.count[0], batch * heads](
        *operands, grad_query, *table.by_row, table.edges, *score, *sizes, table.count[0], *widths, softcap, exact,
        num_warps=_WARPS,
    )  # fmt: skip
    key_value_kernel[table.count[1], batch * heads](
        *operands, grad_key, grad_value, *(lse if x is None else x.contiguous() for x in factors),
        *table.by_column, table.edges, *score, *sizes, table.count[1], *widths, softcap,
        *(x is not None for x in factors), exact, num_warps=_WARPS,
    )  # fmt: skip
    return grad_query, grad_key, grad_value
