"""Several processes measure one corpus: each takes its share of the windows; sums are reduced, rows gathered.

`torchrun --nproc-per-node 8 -m posterity measure ...` starts them; accelerate tells each its rank. Little is exchanged,
at the beginning and at the end, so all of it goes through the CPU (gloo), whatever the devices.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from posterity.decomposition.accumulator import Accumulator, stack_rows
from posterity.errors import InputError, first_line

T = TypeVar("T")
# Processes may end their shares hours apart; one that dies is noticed at once, for its connections close.
TIMEOUT = timedelta(days=2)


@dataclass(frozen=True)
class Processes:
    """This process among `count` of them, made by `Processes.join()` and passed to `measure` or `audit`.

    Without torchrun there is one. All processes call the same methods in the same order.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> "Processes":
        """Join the processes that torchrun started; without torchrun this one is alone.

        Raises:
            InputError: They cannot find each other.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        from accelerate import PartialState

        try:
            state = PartialState(cpu=True, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"expected {count} processes that find each other; {first_line(error)}: use torchrun"
            ) from error
        if state.num_processes != count:
            raise InputError(f"expected {count} processes; {state.num_processes} found each other: use torchrun")
        return cls(state.process_index, state.num_processes)

    @property
    def is_first(self) -> bool:
        """Whether this process has rank 0, which reads, reports and writes."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """Return the items of `work` that fall to this process."""
        return list(work[self.rank :: self.count])

    def broadcast(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0 and broadcast its result (or its InputError).

        Raises:
            InputError: `make` did, or another process has ended.
        """
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        message: list[Any] = [None, None]  # result, text of the InputError
        if self.is_first:
            try:
                message[0] = make()
            except InputError as error:
                message[1] = str(error)
        with _report_lost_process():
            broadcast_object_list(message)
        result, reason = message
        if reason is not None:
            raise InputError(reason)
        return result

    def all_gather(self, item: T) -> list[T]:
        """Return the items of all processes, by rank, in every process."""
        if self.count == 1:
            return [item]
        from accelerate.utils import gather_object

        with _report_lost_process():
            return gather_object([item])

    def reduce(self, sums: Accumulator) -> None:
        """Add up the sums of all processes on rank 0; rows stand there in the order of the ranks."""
        if self.count == 1:
            return
        rows_by_rank = self.all_gather({key: stack_rows(rows) for key, rows in sums.rows.items()})
        self._reduce(sums.total)
        self._reduce(sums.weight_total)
        sums.rows = {}
        for rows_by_key in rows_by_rank:
            for key, rows in rows_by_key.items():
                sums.append_rows(key, rows)

    def _reduce(self, total: dict[Any, Tensor]) -> None:
        """Add up the tensors of all processes on rank 0; a tensor that some process lacks counts as zero there."""
        layouts = self.all_gather({key: (x.shape, x.dtype) for key, x in total.items()})
        merged = {key: layout for by_key in layouts for key, layout in by_key.items()}
        for key, (shape, dtype) in merged.items():
            total[key] = total.pop(key, torch.zeros(shape, dtype=dtype)).cpu()
            with _report_lost_process():
                distributed.reduce(total[key], 0)


@contextmanager
def _report_lost_process() -> Iterator[None]:
    """Turn the error by which torch reports a process that has ended into an InputError of one line."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(
            f"another process of this run has ended, so this one cannot go on ({first_line(error)[:200]})"
        ) from error
