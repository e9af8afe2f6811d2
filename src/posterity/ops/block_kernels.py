"""Where attention under a mask, and the sums over its edges, run as Triton kernels.

On CUDA, in half precision and float32: windows, packed documents, padding, soft-cap, sinks, heads of their own masks,
and the factors of a horizon. Elsewhere the operator goes block by block (blockwise.py).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from posterity.errors import InputError, warn_once
from posterity.ops.block_table import BlockTable, block_table
from posterity.ops.fused_kernels import HALF, is_ampere
from posterity.ops.scores import Scoring

try:
    from posterity.ops import triton_attention
except ImportError:  # no Triton
    triton_attention = None

DEVICE = "cuda"
KERNELS = ("auto", "triton", "blocks")
_WIDEST = 256  # heads; the operands of wider ones do not fit a program
_choice = ["auto"]  # of all threads: backward passes run in threads of autograd's


@contextlib.contextmanager
def choose_kernels(choice: str) -> Iterator[None]:
    """Choose, in all threads, what computes attention under a mask and the sums over edges, for the length of a block.

    Plain causal attention goes to torch's fused kernels by any choice; its sums over edges do not.

    Args:
        choice: "triton" for Triton kernels or an error; "blocks" for plain PyTorch, block by block; "auto" for kernels
            where they apply, as without this.

    Raises:
        InputError: Another choice; and within the block, with "triton", where the kernels do not apply.
    """
    if choice not in KERNELS:
        raise InputError(f"expected kernels among {', '.join(KERNELS)}; got {choice!r}")
    before, _choice[0] = _choice[0], choice
    try:
        yield
    finally:
        _choice[0] = before


def kernel_table(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, shape: tuple[int, int] | None = None
) -> BlockTable | None:
    """Return the blocks of the mask for kernels; None where none applies or is wanted (see `report_refusal`).

    Args:
        query: Queries, (batch, head, position, dim).
        key: Keys.
        value: Values.
        scoring: How scores are formed.
        shape: Of a block; that of the operator's kernels by default.
    """
    if _choice[0] == "blocks":
        return None
    reason = refusal(query, key, value, scoring)
    if reason is None and triton_attention is not None:
        shape = shape or triton_attention.tile_shape(query, value)
        table = block_table(scoring.mask, query.shape[2], shape, query.device)
        if table is not None:
            return table
    reason = reason or "the edges of its mask form too many blocks that are neither empty nor full"
    report_refusal(query, reason, query.shape[2] != key.shape[2])
    return None


def report_refusal(query: Tensor, reason: str, generating: bool = False) -> None:
    """Say why kernels do not apply: on CUDA, once, in the log, unless a text is `generating` from cached keys.

    Raises:
        InputError: Kernels are chosen (`choose_kernels`).
    """
    if _choice[0] == "triton":
        raise InputError(f"Triton kernels are chosen, but do not apply: {reason}: choose auto or blocks (--kernels)")
    if query.device.type == DEVICE and not generating:
        warn_once(f"attention, or sums over its edges, go block by block in plain PyTorch, which is slower: {reason}")


def refusal(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> str | None:
    """Return why these tensors go block by block; None if kernels apply, but for masks of too many partial blocks."""
    if query.device.type != DEVICE or torch.version.hip:
        return "the tensors are not on a CUDA device"
    if triton_attention is None:
        return "Triton is not installed"
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
