"""torch's fused attention kernels, forward and backward: plain causal attention that also returns its log-sum-exp.

Each is exact where it applies (Dao 2023, arXiv 2307.08691; Rabe and Staats 2021, arXiv 2112.05682); elsewhere the
operator goes block by block. Signatures: torch's native_functions.yaml, `_scaled_dot_product_*`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from posterity.ops.heads import repeat_heads

_aten = torch.ops.aten
_GPU = "cuda"
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Kernel:
    """A pair of fused functions.

    `forward(query, key, value, scale)` returns the output and the state that `backward` needs: the log-sum-exp, perhaps
    padded in length, and the state of the random numbers. `backward(grad_output, query, key, value, output, state,
    scale)` returns dq, dk, dv; there keys and values are repeated for each query head.
    """

    forward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, tuple[Tensor | None, ...]]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def select_kernel(query: Tensor, key: Tensor, value: Tensor) -> Kernel | None:
    """Return the kernel for plain causal attention of these tensors; None if there is none."""
    if query.shape[2:] != key.shape[2:]:
        return None
    if query.device.type == "cpu":
        return CPU if key.shape == value.shape else None
    if query.device.type != _GPU or torch.version.hip or not query.numel():
        return None
    widths, half = (query.shape[3], value.shape[3]), query.dtype in HALF
    if half and widths[0] == widths[1] <= 192 and widths[0] % 8 == 0 and is_ampere(query.device):
        return FLASH
    aligned = all(width % (8 if half else 4) == 0 for width in widths)  # 16 bytes
    return EFFICIENT if aligned and (half or query.dtype == torch.float32) and is_ampere(query.device) else None


def is_ampere(device: torch.device) -> bool:
    """Return whether a CUDA device has compute capability 8.0 at least."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _cpu_forward(query, key, value, scale):
    output, lse = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)
    return output, (lse, None, None)


def _cpu_backward(grad_output, query, key, value, output, state, scale):
    """Run in float32 at least.

    In half precision the kernel adds its blocks up in half precision, so that the gradient at a key with many readers
    loses more, the longer the context; and it is no faster.
    """
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    tensors = (x.float() if x.dtype in HALF else x for x in (grad_output, query, key, value, output))
    return tuple(x.to(query.dtype) for x in backward(*tensors, state[0], 0.0, True, scale=scale))


def _flash_forward(query, key, value, scale):
    query, key, value = _per_head(query, key, value)
    results = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)
    return results[0], (results[1], results[6], results[7])


def _flash_backward(grad_output, query, key, value, output, state, scale):
    lse, *random = state
    lengths = query.shape[2], key.shape[2]
    args = *_contiguous(grad_output, query, key, value), output, lse, None, None, *lengths, 0.0, True, *random
    return _aten._scaled_dot_product_flash_attention_backward(*args, scale=scale)


def _efficient_forward(query, key, value, scale):
    query, key, value = _per_head(query, key, value)
    results = _aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, True, scale=scale)
    return results[0], tuple(results[1:])


def _efficient_backward(grad_output, query, key, value, output, state, scale):
    args = *_contiguous(grad_output, query, key, value), None, output, *state, 0.0, [True, True, True, False], True
    return _aten._scaled_dot_product_efficient_attention_backward(*args, scale=scale)[:3]


def _per_head(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    return _contiguous(query, *(repeat_heads(x, query.shape[1]) for x in (key, value)))


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    """Lay tensors out as CUDA's kernels read them: a head's numbers at a position in a row, rows at 16 bytes."""
    return [x.contiguous() for x in tensors]


CPU = Kernel(_cpu_forward, _cpu_backward)
FLASH = Kernel(_flash_forward, _flash_backward)
EFFICIENT = Kernel(_efficient_forward, _efficient_backward)
