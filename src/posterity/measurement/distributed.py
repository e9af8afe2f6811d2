"""Several processes measure one corpus: each takes its share of the windows, sums are added, rows put in order.

`torchrun --nproc-per-node 8 -m posterity measure ...` starts them; accelerate finds out who they are. Few and small
things are exchanged, at the beginning and at the end, so all of it goes through the CPU (gloo), whatever the devices.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from posterity.decomposition.accumulator import Sums
from posterity.errors import InputError

T = TypeVar("T")
# Processes may end their shares hours apart; one that dies is noticed at once, for its connections close.
PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Processes:
    """This process among `count`: alone, unless joined. All of them call the same methods in the same order."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> "Processes":
        """Those that torchrun started, or this one alone.

        Raises:
            InputError: They cannot find each other.
        """
        wanted = int(os.environ.get("WORLD_SIZE", "1"))
        if wanted == 1:
            return cls()
        from accelerate import PartialState

        try:
            state = PartialState(cpu=True, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"expected {wanted} processes that find each other; {reason}: use torchrun") from error
        if state.num_processes != wanted:
            raise InputError(f"expected {wanted} processes; {state.num_processes} found each other: use torchrun")
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this is the one that reads, speaks and writes."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """What this process does of some work."""
        return list(work[self.rank :: self.count])

    def agreed(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; if it raises InputError there, it does in all of them.

        Raises:
            InputError: The first process did, or another process has ended.
        """
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = make()
            except InputError as error:
                found[1] = str(error)
        with _together():
            broadcast_object_list(found)
        if found[1] is not None:
            raise InputError(found[1])
        return found[0]

    def every(self, mine: T) -> list[T]:
        """What each process has, in all of them."""
        if self.count == 1:
            return [mine]
        from accelerate.utils import gather_object

        with _together():
            return gather_object([mine])

    def sum(self, sums: Sums) -> None:
        """Add up the sums of all processes, in the first one; rows of the first process come first there."""
        if self.count == 1:
            return
        rows = self.every({name: torch.stack([x.cpu() for x in rows]) for name, rows in sums.rows.items()})
        shapes = self.every({name: (x.shape, x.dtype) for name, x in sums.total.items()})
        totals = {}
        for name, (shape, dtype) in {name: one for known in shapes for name, one in known.items()}.items():
            totals[name] = sums.total.pop(name, torch.zeros(shape, dtype=dtype)).cpu()
            with _together():
                distributed.reduce(totals[name], 0)
        sums.total, sums.rows = totals, {}
        for one in rows:
            for name, x in one.items():
                sums.note(name, x)


@contextmanager
def _together() -> Iterator[None]:
    """What torch says of a process that has gone, in one line."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(
            f"another process of this run has ended, so this one cannot go on ({_short(error)})"
        ) from error


def _short(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
