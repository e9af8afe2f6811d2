"""Where attention under a mask, and the sums over its edges, run as Triton kernels.

On CUDA, in half precision and float32: windows, packed documents, padding, soft-cap, sinks, heads of their own masks,
and the factors of a horizon. Elsewhere the operator goes block by block (blockwise.py).
"""

import torch
from torch import Tensor

from posterity.errors import warn_once
from posterity.ops.block_table import BlockTable, block_table
from posterity.ops.fused_kernels import HALF, is_ampere
from posterity.ops.scores import Scoring

try:
    from posterity.ops import triton_attention
except ImportError:  # no Triton
    triton_attention = None

DEVICE = "cuda"
_WIDEST = 256  # heads; the operands of wider ones do not fit a program


def kernel_table(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, shape: tuple[int, int] | None = None
) -> BlockTable | None:
    """Return the blocks of the mask for kernels; None where none applies, which is logged once with the reason on CUDA.

    Args:
        query: Queries, (batch, head, position, dim).
        key: Keys.
        value: Values.
        scoring: How scores are formed.
        shape: Of a block; that of the operator's kernels by default.
    """
    reason = refusal(query, key, value, scoring)
    if reason is None and triton_attention is not None:
        shape = shape or triton_attention.tile_shape(query, value)
        table = block_table(scoring.mask, query.shape[2], shape, query.device)
        if table is not None:
            return table
        reason = "the edges of its mask form too many blocks that are neither empty nor full"
    if query.device.type == DEVICE and query.shape[2] == key.shape[2]:
        warn_once(f"attention, or sums over its edges, go block by block in plain PyTorch, which is slower: {reason}")
    return None


def refusal(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> str | None:
    """Return why these tensors go block by block; None if kernels apply, but for masks of too many partial blocks."""
    if triton_attention is None:
        return "Triton is not installed"
    if query.device.type != DEVICE or torch.version.hip:
        return "the tensors are not on a CUDA device"
    if query.dtype not in (*HALF, torch.float32):
        return f"the kernels have no {str(query.dtype).removeprefix('torch.')}"
    if not is_ampere(query.device):
        return "the device is older than compute capability 8.0"
    if scoring.bias is not None:
        return "the scores have a bias"
    if query.shape[2] != key.shape[2]:
        return "there are more keys than queries"
    if max(query.shape[3], value.shape[3]) > _WIDEST:
        return f"the heads are wider than {_WIDEST}"
    return None if query.numel() else "there are no queries"
