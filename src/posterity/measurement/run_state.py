"""The state of an unfinished measurement on disk: a run that was stopped continues, and counts no window twice.

A state is a folder with one file for each process: the accumulator so far, the numbers of the windows in it, and the
settings. A process continues from the file of its rank. Files of higher ranks than there are processes stay as they
are and are merged at the end, so that a run can continue with more or fewer processes.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from posterity.decomposition.accumulator import Accumulator
from posterity.decomposition.projections import plain_tensors
from posterity.errors import InputError
from posterity.measurement.distributed import Processes
from posterity.measurement.state_folder import FolderLock, check_settings, write_state_file

STATE_FILE = "{}.safetensors"  # rank
WRITE_SHARE = 0.02  # of the time that writing may take


class RunState:
    """The windows measured so far and the time they took; with a folder, also on disk.

    Attributes:
        seconds: Time spent on measuring, in earlier attempts too.
    """

    def __init__(self, lock: FolderLock, settings: Mapping[str, object], processes: Processes):
        """Begin without any window; `open` also reads the folder."""
        self._lock, self.folder = lock, lock.folder
        self.settings, self.processes = json.loads(json.dumps(settings)), processes
        self.seconds, self._start = 0.0, time.monotonic()
        self._windows: list[int] = []  # measured by this process, in the order of the rows
        self._saved = Accumulator()  # of this rank, from an earlier attempt
        self._higher_ranks: list[tuple[Accumulator, list[int]]] = []  # sums and windows of ranks that are no more
        self._windows_on_disk = 0
        self._last_write = self._write_seconds = 0.0

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str] | None, settings: Mapping[str, object], processes: Processes
    ) -> "RunState":
        """Lock a folder and read the files in it that this process continues or merges.

        Raises:
            InputError: A file is of other settings or damaged; another run is at work; nothing can be written there.
        """
        state = cls(FolderLock.acquire(folder, processes.rank), settings, processes)
        try:
            state._read_files()
        except BaseException:
            state._lock.release()
            raise
        return state

    def remaining_windows(self, count: int) -> list[int]:
        """Return which of `count` windows no process has measured.

        Raises:
            InputError: A window is counted twice, or does not exist.
        """
        numbers = [*self._windows, *(number for _, windows in self._higher_ranks for number in windows)]
        measured = [number for windows in self.processes.all_gather(numbers) for number in windows]
        if len(set(measured)) < len(measured) or not set(measured) <= set(range(count)):
            self._lock.release()
            raise InputError(f"{self.folder} counts a window twice, or one that is not there: remove it to start again")
        return sorted(set(range(count)) - set(measured))

    def hold_lock(self, remaining: int) -> AbstractContextManager[None]:
        """Hold the lock while so many windows are measured; on Ctrl-C report how many windows are saved."""
        total = len(self._windows) + remaining
        return self._lock.hold(lambda: f"{self._windows_on_disk} of {total} windows are kept")

    def start(self, sums: Accumulator) -> None:
        """Merge what an earlier attempt saved into `sums`, and start the clock."""
        sums.merge(self._saved)
        self._saved = Accumulator()
        self._start = time.monotonic()

    def add_windows(self, sums: Accumulator, windows: list[int]) -> None:
        """Note that `sums` has these windows now, and save it unless writing would take more than its share of time."""
        self._windows += windows
        now = time.monotonic()
        if self.folder is not None and now - self._last_write >= self._write_seconds / WRITE_SHARE:
            self._write(sums)
            self._last_write = time.monotonic()
            self._write_seconds = self._last_write - now

    def finish(self, sums: Accumulator) -> None:
        """Save the last windows, then reduce `sums` over all processes and put its rows in the order of the windows."""
        if self.folder is not None and self._windows:
            self._write(sums)
        self.seconds = max(self.processes.all_gather(self._total_seconds()))
        for saved, windows in self._higher_ranks:
            sums.merge(saved)
            self._windows += windows
        self.processes.reduce(sums)
        order = [number for windows in self.processes.all_gather(self._windows) for number in windows]
        if self.processes.is_first:
            sums.reorder(sorted(range(len(order)), key=order.__getitem__))

    def _total_seconds(self) -> float:
        return self.seconds + time.monotonic() - self._start

    def _write(self, sums: Accumulator) -> None:
        assert self.folder is not None
        tensors = sums.tensors() | {"done": torch.tensor(self._windows, dtype=torch.int64)}
        metadata = {"settings": json.dumps(self.settings), "seconds": repr(self._total_seconds())}
        with write_state_file(self.folder / STATE_FILE.format(self.processes.rank)) as part:
            save_file(tensors, part, metadata)
        self._windows_on_disk = len(self._windows)

    def _read_files(self) -> None:
        if self.folder is None:
            return
        files = self.folder.glob(STATE_FILE.format("[0-9]*"))
        ranks = sorted(int(file.stem) for file in files if file.stem.isdecimal())
        for rank in self.processes.share(range(max(ranks, default=-1) + 1)):
            if rank in ranks:
                sums, windows, seconds = self._read(self.folder / STATE_FILE.format(rank))
                self.seconds += seconds
                if rank == self.processes.rank:
                    self._saved, self._windows, self._windows_on_disk = sums, windows, len(windows)
                else:
                    self._higher_ranks.append((sums, windows))

    def _read(self, file: Path) -> tuple[Accumulator, list[int], float]:
        try:
            with safe_open(file, "pt") as state:
                metadata = state.metadata() or {}
                settings = json.loads(metadata["settings"])
                tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118
            windows, seconds = tensors.pop("done").tolist(), float(metadata["seconds"])
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise InputError(f"{file} is no state of a run ({error}): remove {self.folder} to start again") from error
        check_settings(self.folder, settings, self.settings)
        return Accumulator.from_tensors(tensors), windows, seconds


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of all parameters and buffers, their names, shapes and types."""
    digest = hashlib.sha256()
    for name, x in model.state_dict(keep_vars=True).items():
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        for plain in plain_tensors(_offloaded(model, name) if x.is_meta else x):
            numbers = plain.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy()
            digest.update(numbers)  # type: ignore[arg-type]
    return digest.hexdigest()


def _offloaded(model: nn.Module, name: str) -> Tensor:
    """Return a parameter that accelerate keeps elsewhere until it is used."""
    prefix, _, leaf = name.rpartition(".")
    hook: Any = getattr(model.get_submodule(prefix), "_hf_hook", None)
    maps = [x.weights_map for x in getattr(hook, "hooks", [hook]) if getattr(x, "weights_map", None) is not None]
    if not maps:
        raise InputError(f"expected a model with weights; {name} is on the meta device, without numbers: load it")
    return maps[0][leaf]
