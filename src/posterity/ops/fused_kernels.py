"""torch's fused attention kernels, forward and backward: plain causal attention that also returns its log-sum-exp.

Each is exact where it applies (Dao 2023, arXiv 2307.08691; Rabe and Staats 2021, arXiv 2112.05682); elsewhere the
operator goes block by block. Signatures: torch's native_functions.yaml, `_scaled_dot_product_*`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_aten = torch.ops.aten
_GPU = "cuda"
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    `forward(query, key, value, scale)` gives the output and what `backward` wants back: the log-sum-exp, perhaps padded
    in length, and the state of the random numbers. `backward(grad_output, query, key, value, output, kept, scale)`
    gives dq, dk, dv; there keys and values are repeated for each query head.
    """

    forward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, tuple[Tensor | None, ...]]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def kernel(query: Tensor, key: Tensor, value: Tensor) -> Kernel | None:
    """The kernel for plain causal attention of these, forward and backward; None if there is none."""
    if query.shape[2:] != key.shape[2:]:
        return None
    if query.device.type == "cpu":
        return CPU if key.shape == value.shape else None
    if query.device.type != _GPU or torch.version.hip or not query.numel():
        return None
    widths, half = (query.shape[3], value.shape[3]), query.dtype in HALF
    if half and widths[0] == widths[1] <= 192 and widths[0] % 8 == 0 and _ampere(query.device):
        return FLASH
    aligned = all(width % (8 if half else 4) == 0 for width in widths)  # 16 bytes
    return EFFICIENT if aligned and (half or query.dtype == torch.float32) and _ampere(query.device) else None


def _ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _cpu_forward(query, key, value, scale):
    output, lse = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)
    return output, (lse, None, None)


def _cpu_backward(grad_output, query, key, value, output, kept, scale):
    """In float32 at least: in half precision the kernel adds its blocks up in half precision, so that the gradient at a
    key with many readers loses more, the longer the context; and it is no faster."""
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    given = (x.float() if x.dtype in HALF else x for x in (grad_output, query, key, value, output))
    return tuple(x.to(query.dtype) for x in backward(*given, kept[0], 0.0, True, scale=scale))


def _flash_forward(query, key, value, scale):
    query, key, value = _ready(query, *_repeated(query, key, value))
    found = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)
    return found[0], (found[1], found[6], found[7])


def _flash_backward(grad_output, query, key, value, output, kept, scale):
    lse, *random = kept
    lengths = query.shape[2], key.shape[2]
    given = *_ready(grad_output, query, key, value), output, lse, None, None, *lengths, 0.0, True, *random
    return _aten._scaled_dot_product_flash_attention_backward(*given, scale=scale)


def _efficient_forward(query, key, value, scale):
    query, key, value = _ready(query, *_repeated(query, key, value))
    found = _aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, True, scale=scale)
    return found[0], tuple(found[1:])


def _efficient_backward(grad_output, query, key, value, output, kept, scale):
    given = *_ready(grad_output, query, key, value), None, output, *kept, 0.0, [True, True, True, False], True
    return _aten._scaled_dot_product_efficient_attention_backward(*given, scale=scale)[:3]


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    return [x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value)]


def _ready(*given: Tensor) -> list[Tensor]:
    """What CUDA's kernels read: numbers of one head and position in a row, rows at multiples of 16 bytes."""
    return [x.contiguous() for x in given]


CPU = Kernel(_cpu_forward, _cpu_backward)
FLASH = Kernel(_flash_forward, _flash_backward)
EFFICIENT = Kernel(_efficient_forward, _efficient_backward)
