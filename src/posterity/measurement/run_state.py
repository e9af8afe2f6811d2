"""What has been measured so far, on disk: a run that was stopped goes on, and counts no window twice.

The state is a folder with one file for each process, written whole or not at all: the sums so far, the numbers of the
windows that are in them, and the settings. A process goes on from the file of its number; files beyond the number of
processes stay as they are, and are added at the end. So a run can go on with more or fewer processes.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from posterity.decomposition.accumulator import Sums
from posterity.errors import InputError
from posterity.measurement.distributed import Processes

SHARE = 0.02  # of the time that writing may take
FILE = "{}.safetensors"


class State:
    """How far a run is: the windows that are done, the time they took; with a folder, also on disk.

    Attributes:
        seconds: Time spent on measuring, in earlier attempts too.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: Mapping[str, object], processes: Processes):
        """Read what is there.

        Raises:
            InputError: It is of other settings, damaged, or nothing can be written there.
        """
        self._held = Held(folder, processes.rank)
        self.folder = self._held.folder
        self.settings, self.processes = json.loads(json.dumps(settings)), processes
        self.seconds, self._started = 0.0, time.monotonic()
        self._done: list[int] = []  # by this process, in the order of the rows
        self._earlier = Sums()  # of this process
        self._others: list[tuple[Sums, list[int]]] = []  # of processes that are no more
        self._kept = 0  # how many of them are on disk
        self._written = self._took = 0.0
        try:
            self._read_all()
        except BaseException:
            self._held.free()
            raise

    def _read_all(self) -> None:
        if self.folder is None:
            return
        numbers = sorted(int(file.stem) for file in self.folder.glob(FILE.format("[0-9]*")) if file.stem.isdecimal())
        for number in self.processes.share(range(max(numbers, default=-1) + 1)):
            if number in numbers:
                sums, done, seconds = self._read(self.folder / FILE.format(number))
                self.seconds += seconds
                if number == self.processes.rank:
                    self._earlier, self._done, self._kept = sums, done, len(done)
                else:
                    self._others.append((sums, done))

    def left(self, windows: int) -> list[int]:
        """The numbers of the windows that are in no process's sums.

        Raises:
            InputError: One is there twice, or does not exist.
        """
        mine = [*self._done, *(number for _, done in self._others for number in done)]
        known = [number for numbers in self.processes.every(mine) for number in numbers]
        if len(set(known)) < len(known) or not set(known) <= set(range(windows)):
            self._held.free()
            raise InputError(f"{self.folder} counts a window twice, or one that is not there: remove it to start again")
        return sorted(set(range(windows)) - set(known))

    def start(self, sums: Sums) -> None:
        """Go on: the sums so far, and the clock."""
        sums.merge(self._earlier)
        self._earlier = Sums()
        self._started = time.monotonic()

    def add(self, sums: Sums, numbers: list[int]) -> None:
        """These windows are in the sums now. Write that down, unless writing would take more than its share of time."""
        self._done += numbers
        now = time.monotonic()
        if self.folder is not None and now - self._written >= self._took / SHARE:
            self._write(sums)
            self._written = time.monotonic()
            self._took = self._written - now

    def finish(self, sums: Sums) -> None:
        """Write down the last windows; then the sums of all processes, rows in the order of the windows."""
        if self.folder is not None and self._done:
            self._write(sums)
        self.seconds = max(self.processes.every(self._seconds()))
        for other, done in self._others:
            sums.merge(other)
            self._done += done
        self.processes.sum(sums)
        order = [number for numbers in self.processes.every(self._done) for number in numbers]
        if self.processes.first:
            sums.reorder(sorted(range(len(order)), key=order.__getitem__))

    def kept(self, todo: int) -> AbstractContextManager[None]:
        """Inside, while so many windows are measured, an interruption says what is kept; then the folder is free."""
        total = len(self._done) + todo
        return self._held.working(lambda: f"{self._kept} of {total} windows are kept")

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self._started

    def _write(self, sums: Sums) -> None:
        assert self.folder is not None
        tensors = sums.tensors() | {"done": torch.tensor(self._done, dtype=torch.int64)}
        known = {"settings": json.dumps(self.settings), "seconds": repr(self._seconds())}
        with written(self.folder / FILE.format(self.processes.rank)) as part:
            save_file(tensors, part, known)
        self._kept = len(self._done)

    def _read(self, file: Path) -> tuple[Sums, list[int], float]:
        try:
            with safe_open(file, "pt") as opened:
                known = opened.metadata() or {}
                settings = json.loads(known["settings"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            done, seconds = tensors.pop("done").tolist(), float(known["seconds"])
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise InputError(f"{file} is no state of a run ({error}): remove {self.folder} to start again") from error
        check_settings(self.folder, settings, self.settings)
        return Sums.of(tensors), done, seconds


class Held:
    """The folder of an unfinished run, held by one run at a time; without a folder nothing is kept."""

    def __init__(self, folder: str | os.PathLike[str] | None, rank: int):
        """Hold it.

        Raises:
            InputError: Another run does, or it cannot be made.
        """
        self.folder = None if folder is None else Path(folder)
        self._lock = None if self.folder is None else lock(self.folder, rank)

    def free(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def working(self, kept: Callable[[], str]) -> Iterator[None]:
        """Inside, an interruption says what is kept, and where; then the folder is free."""
        try:
            yield
        except KeyboardInterrupt as error:
            if self.folder is None:
                raise
            raise type(error)(f"{kept()} in {self.folder}") from error
        finally:
            self.free()


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """A file for what is written inside; it takes the place of `target` at the end, whole or not at all.

    Raises:
        InputError: It cannot be written.
    """
    part = target.with_suffix(".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"expected to write the unfinished run to {target.parent}; {error}: make room") from error


def check_settings(folder: Path | None, there: Mapping[str, object], here: Mapping[str, object]) -> None:
    """Raise InputError if an unfinished run was begun under other settings."""
    for name in {**there, **here}:
        if there.get(name) != here.get(name):
            plain = name in ("model", "text")
            what = f"another {name}" if plain else f"{name} {there.get(name)} there, {here.get(name)} here"
            raise InputError(
                f"{folder} holds an unfinished run with other settings ({what}): use those, or remove the folder to "
                "start again"
            )


def remove(folder: Path) -> None:
    """Delete the states in a folder and the folders directly in it; what else is there stays."""
    for place in (*folder.glob("*/"), folder):
        for file in (file for kind in ("safetensors", "nc", "part", "lock") for file in place.glob(f"[0-9]*.{kind}")):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or another process was first
            place.rmdir()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) of all parameters and buffers, their names, shapes and types."""
    state = hashlib.sha256()
    for name, x in model.state_dict(keep_vars=True).items():
        state.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        if not x.is_meta:
            state.update(x.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    return state.hexdigest()


def lock(folder: Path, rank: int) -> IO | None:
    """Hold a folder, as long as the file that is returned is open; None where the system knows no locks.

    Raises:
        InputError: Another run holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"{rank}.lock").open("w")
    except OSError as error:
        raise InputError(f"expected a folder for the unfinished run at {folder}; {error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(f"another run is at work on {folder}: wait for it, or choose another output") from error
    return file
