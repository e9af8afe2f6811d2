"""The bytes of living tensors over the operations of a short pass, extrapolated to the peak of a longer one.

A pass over twice as many tokens does the same operations on tensors that grow in proportion, or do not grow. So every
point of the timelines of two trials lies on a straight line over the number of tokens, and the peak of a longer pass is
the highest of these points there, wherever in the pass it stands.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Segments = list[list[int]]  # bytes after each operation


class MemoryTimeline(TorchDispatchMode):
    """Bytes of the tensors made in the block and still alive, after each operation, in segments that a caller marks."""

    def __init__(self, existing: Iterable[Tensor]):
        """`existing`: tensors made before, which are not counted."""
        super().__init__()
        self.segments: Segments = [[0]]
        self.live = 0
        self._storages: dict[int, weakref.ref | None] = {x.untyped_storage()._cdata: None for x in existing}
        self._paused = False

    def start_segment(self) -> None:
        """End a segment: the operations before and after are compared with those of another trial apart."""
        self.segments.append([self.live])

    def pause(self) -> None:
        """Leave the operations from now on out of the timeline, until `resume`; what they keep alive counts."""
        self._paused = True

    def resume(self) -> None:
        """Count operations again, in a new segment."""
        self._paused = False
        self.start_segment()

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation, and count what it made."""
        output = func(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                self._count(x)
        if not self._paused:
            self.segments[-1].append(self.live)
        return output

    def _count(self, x: Tensor) -> None:
        with contextlib.suppress(NotImplementedError, RuntimeError):  # a subclass without a storage of its own
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._storages:
                self._storages[key] = weakref.ref(storage, lambda _: self._free(key, size))
                self.live += size

    def _free(self, key: int, size: int) -> None:
        if self._storages.pop(key, None) is not None:
            self.live -= size


def peak_bytes(trials: dict[int, Segments], tokens: int) -> float:
    """Return the peak of a pass over so many tokens, from trials by their numbers of tokens (one or two)."""
    (first_tokens, first), (last_tokens, last) = min(trials.items()), max(trials.items())
    if first_tokens == last_tokens:
        return max(max(segment) for segment in last) * tokens / last_tokens
    slope = (tokens - last_tokens) / (last_tokens - first_tokens)
    return max(
        last_bytes + (last_bytes - first_bytes) * slope
        for first_segment, last_segment in _aligned(first, last)
        for first_bytes, last_bytes in zip(first_segment, last_segment, strict=True)
    )


def _aligned(first: Segments, last: Segments) -> Iterator[tuple[list[int], list[int]]]:
    """Pair the segments of two trials; of those with other operations, or all if their number varies, the peaks."""
    if len(first) != len(last):
        first, last = ([[max(max(segment) for segment in trial)]] for trial in (first, last))
    for left, right in zip(first, last, strict=True):
        yield (left, right) if len(left) == len(right) else ([max(left)], [max(right)])
