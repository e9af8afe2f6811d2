"""Interval arithmetic: the bounds of a mask's rule over whole blocks of pairs, so that empty blocks are not evaluated.

The rule is any function of positions. Called with an `Interval` in place of each position it returns, for all blocks at
once, whether a pair of the block may be an edge: `Interval` is a tensor whose operators (comparisons, sums, look-ups)
act on its two bounds instead of on numbers, through `__torch_dispatch__`. So a rule needs no second form, whoever wrote
it, and a long context costs one evaluation of bounds, not one of every block. An operator without bounds here raises
NotImplementedError, and every block is evaluated instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Interval(Tensor):
    """Whole numbers or bools of which only bounds are known; `low` and `high` have the shape of the tensor."""

    low: Tensor
    high: Tensor

    @staticmethod
    def __new__(cls, low: Tensor, high: Tensor) -> "Interval":
        """Make an interval of the numbers from `low` to `high`, both included."""
        interval = Tensor._make_wrapper_subclass(cls, low.shape, dtype=low.dtype, device=low.device)  # type: ignore[attr-defined]
        interval.low, interval.high = low, high
        return interval

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Return the bounds of an operator's result."""
        if func is torch.ops.aten.new_ones.default or func is torch.ops.aten.new_zeros.default:
            fill = torch.ones if func is torch.ops.aten.new_ones.default else torch.zeros
            return fill(args[1], dtype=(kwargs or {}).get("dtype") or args[0].dtype, device=args[0].device)
        if func not in _BOUNDS or kwargs:
            raise NotImplementedError(f"bounds of {func}")
        return Interval(*_BOUNDS[func](*args))


def _bounds(x: Any) -> tuple[Any, Any]:
    return (x.low, x.high) if isinstance(x, Interval) else (x, x)


def _add(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    (low_x, high_x), (low_y, high_y) = _bounds(x), _bounds(y)
    return low_x + low_y, high_x + high_y


def _sub(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    (low_x, high_x), (low_y, high_y) = _bounds(x), _bounds(y)
    return low_x - high_y, high_x - low_y


def _floor_divide(x: Any, divisor: Any) -> tuple[Tensor, Tensor]:
    if isinstance(divisor, Tensor) or divisor <= 0:
        raise NotImplementedError("division by anything but one positive number")
    return x.low // divisor, x.high // divisor


def _le(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    (low_x, high_x), (low_y, high_y) = _bounds(x), _bounds(y)
    return high_x <= low_y, low_x <= high_y


def _lt(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    (low_x, high_x), (low_y, high_y) = _bounds(x), _bounds(y)
    return high_x < low_y, low_x < high_y


def _eq(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    (low_x, high_x), (low_y, high_y) = _bounds(x), _bounds(y)
    return (high_x == low_y) & (low_x == high_y), (low_x <= high_y) & (low_y <= high_x)


def _not(x: Any) -> tuple[Tensor, Tensor]:
    _require_bools(x)
    return ~x.high, ~x.low


def _and(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    _require_bools(x, y)
    (low_x, high_x), (low_y, high_y) = _bounds(x), _bounds(y)
    return low_x & low_y, high_x & high_y


def _or(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    _require_bools(x, y)
    (low_x, high_x), (low_y, high_y) = _bounds(x), _bounds(y)
    return low_x | low_y, high_x | high_y


def _require_bools(*operands: Any) -> None:
    if any(isinstance(x, Tensor) and x.dtype != torch.bool for x in operands):
        raise NotImplementedError("bounds of bits")


def _index(table: Tensor, indices: list[Any]) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest entry within the interval of the last index; the others are plain."""
    *plain, last = indices
    if isinstance(table, Interval) or any(isinstance(x, Interval) for x in plain) or table.dim() != len(indices):
        raise NotImplementedError("a look-up by more than one interval")
    lows, highs = last.low.flatten().tolist(), last.high.flatten().tolist()
    if min(lows) < 0 or max(highs) >= table.shape[-1]:
        raise NotImplementedError("a look-up from the end")
    numbers = table.to(torch.uint8) if table.dtype == torch.bool else table
    parts = [numbers[..., low : high + 1] for low, high in zip(lows, highs, strict=True)]
    index = torch.arange(len(parts), device=table.device).view(last.shape)
    low, high = (torch.stack([bound(x, -1) for x in parts], -1).to(table.dtype) for bound in (torch.amin, torch.amax))
    return low[(*plain, index)], high[(*plain, index)]


def _swapped(bounds: Callable) -> Callable:
    return lambda x, y: bounds(y, x)


def _negated(bounds: Callable) -> Callable:
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
        (_aten.ge, _swapped(_le)),
        (_aten.gt, _swapped(_lt)),
        (_aten.eq, _eq),
        (_aten.ne, _negated(_eq)),
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
