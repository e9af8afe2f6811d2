"""What a mask's rule says about whole blocks of pairs: interval arithmetic, so that empty blocks need not be evaluated.

The rule is any function of positions. Given a `Span` in place of each position it says, for all blocks at once, whether
a pair of the block may be an edge: by what its comparisons, sums and look-ups do to bounds. What is not known here
raises, and the blocks are evaluated instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Span(Tensor):
    """Whole numbers or bools of which only bounds are known; `low` and `high` have the shape of the tensor."""

    low: Tensor
    high: Tensor

    @staticmethod
    def __new__(cls, low: Tensor, high: Tensor) -> "Span":
        """Numbers from `low` to `high`, both included."""
        made = Tensor._make_wrapper_subclass(cls, low.shape, dtype=low.dtype, device=low.device)  # type: ignore[attr-defined]
        made.low, made.high = low, high
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Bounds of what an operation gives."""
        if func is torch.ops.aten.new_ones.default or func is torch.ops.aten.new_zeros.default:
            made = torch.ones if func is torch.ops.aten.new_ones.default else torch.zeros
            return made(args[1], dtype=(kwargs or {}).get("dtype") or args[0].dtype, device=args[0].device)
        if func not in _BOUNDS or kwargs:
            raise NotImplementedError(f"bounds of {func}")
        return Span(*_BOUNDS[func](*args))


def _both(x: Any) -> tuple[Any, Any]:
    return (x.low, x.high) if isinstance(x, Span) else (x, x)


def _add(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    (low_x, high_x), (low_y, high_y) = _both(x), _both(y)
    return low_x + low_y, high_x + high_y


def _sub(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    (low_x, high_x), (low_y, high_y) = _both(x), _both(y)
    return low_x - high_y, high_x - low_y


def _floor_divide(x: Any, by: Any) -> tuple[Tensor, Tensor]:
    if isinstance(by, Tensor) or by <= 0:
        raise NotImplementedError("division by anything but one positive number")
    return x.low // by, x.high // by


def _le(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    (low_x, high_x), (low_y, high_y) = _both(x), _both(y)
    return high_x <= low_y, low_x <= high_y


def _lt(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    (low_x, high_x), (low_y, high_y) = _both(x), _both(y)
    return high_x < low_y, low_x < high_y


def _eq(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    (low_x, high_x), (low_y, high_y) = _both(x), _both(y)
    return (high_x == low_y) & (low_x == high_y), (low_x <= high_y) & (low_y <= high_x)


def _not(x: Any) -> tuple[Tensor, Tensor]:
    _bools(x)
    return ~x.high, ~x.low


def _and(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    _bools(x, y)
    (low_x, high_x), (low_y, high_y) = _both(x), _both(y)
    return low_x & low_y, high_x & high_y


def _or(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    _bools(x, y)
    (low_x, high_x), (low_y, high_y) = _both(x), _both(y)
    return low_x | low_y, high_x | high_y


def _bools(*given: Any) -> None:
    if any(isinstance(x, Tensor) and x.dtype != torch.bool for x in given):
        raise NotImplementedError("bounds of bits")


def _index(table: Tensor, indices: list[Any]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest entry among those that the last index may mean; the others are plain."""
    *before, last = indices
    if isinstance(table, Span) or any(isinstance(x, Span) for x in before) or table.dim() != len(indices):
        raise NotImplementedError("a look-up by more than one span")
    lows, highs = last.low.flatten().tolist(), last.high.flatten().tolist()
    if min(lows) < 0 or max(highs) >= table.shape[-1]:
        raise NotImplementedError("a look-up from the end")
    numbers = table.to(torch.uint8) if table.dtype == torch.bool else table
    parts = [numbers[..., low : high + 1] for low, high in zip(lows, highs, strict=True)]
    at = torch.arange(len(parts), device=table.device).view(last.shape)
    low, high = (torch.stack([bound(x, -1) for x in parts], -1).to(table.dtype) for bound in (torch.amin, torch.amax))
    return low[(*before, at)], high[(*before, at)]


def _flipped(bounds: Callable) -> Callable:
    return lambda x, y: bounds(y, x)


def _opposite(bounds: Callable) -> Callable:
    return lambda x, y: tuple(~bound for bound in reversed(bounds(x, y)))


_aten = torch.ops.aten
_BOUNDS: dict[Any, Callable] = {
    function: bounds
    for packet, bounds in (
        (_aten.add, _add),
        (_aten.sub, _sub),
        (_aten.floor_divide, _floor_divide),
        (_aten.le, _le),
        (_aten.lt, _lt),
        (_aten.ge, _flipped(_le)),
        (_aten.gt, _flipped(_lt)),
        (_aten.eq, _eq),
        (_aten.ne, _opposite(_eq)),
        (_aten.bitwise_not, _not),
        (_aten.logical_not, _not),
        (_aten.bitwise_and, _and),
        (_aten.logical_and, _and),
        (_aten.bitwise_or, _or),
        (_aten.logical_or, _or),
        (_aten.index, _index),
    )
    for function in (getattr(packet, name) for name in packet.overloads() if name in ("Tensor", "Scalar", "default"))
}
