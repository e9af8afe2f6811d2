"""The folder of an unfinished run: one run at a time uses it, and each of its files is written atomically.

`run_state` keeps measurements there, the audit its findings.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from posterity.atomic_files import replace_atomically
from posterity.errors import InputError

_SUFFIXES = ("safetensors", "nc", "part", "lock")  # of the files in such a folder; their names begin with a number


class FolderLock:
    """The lock of one process on a state folder, freed by the system if the process dies; no folder needs no lock."""

    def __init__(self, folder: Path | None, lock: FileLock | None):
        """Wrap a lock that is held."""
        self.folder, self._lock = folder, lock

    @classmethod
    def acquire(cls, folder: str | os.PathLike[str] | None, rank: int) -> "FolderLock":
        """Make the folder and lock it for the process of this rank.

        Raises:
            InputError: Another run holds the lock, or the folder cannot be made.
        """
        if folder is None:
            return cls(None, None)
        folder = Path(folder)
        lock = FileLock(folder / f"{rank}.lock", timeout=0, thread_local=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise InputError(f"another run is at work on {folder}: wait for it, or choose another output") from error
        except OSError as error:
            raise InputError(f"expected a folder for the unfinished run at {folder}; {error}") from error
        return cls(folder, lock)

    def release(self) -> None:
        """Let another run use the folder."""
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def hold(self, describe_saved: Callable[[], str]) -> Iterator[None]:
        """Hold the lock for the block; on Ctrl-C report what is saved, and where."""
        try:
            yield
        except KeyboardInterrupt as error:
            if self.folder is None:
                raise
            raise type(error)(f"{describe_saved()} in {self.folder}") from error
        finally:
            self.release()


@contextmanager
def write_state_file(target: Path) -> Iterator[Path]:
    """Yield the path where the block writes a state file; at its end the file replaces `target`.

    Raises:
        InputError: It cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(target, target.with_suffix(".part")) as part:
            yield part
    except (OSError, SafetensorError) as error:
        raise InputError(f"expected to write the unfinished run to {target.parent}; {error}: make room") from error


def check_settings(folder: Path | None, saved: Mapping[str, object], current: Mapping[str, object]) -> None:
    """Raise InputError if an unfinished run was begun under other settings."""
    for name in {**saved, **current}:
        if saved.get(name) != current.get(name):
            digest = name in ("model", "text")
            difference = f"another {name}" if digest else f"{name} {saved.get(name)} there, {current.get(name)} here"
            raise InputError(
                f"{folder} holds an unfinished run with other settings ({difference}): use those, or remove the folder "
                "to start again"
            )


def remove_state(folder: Path) -> None:
    """Delete the state files in a folder and in its subfolders, then those of these folders that are empty.

    Other processes may do the same at the same time.
    """
    places = [folder]
    with suppress(FileNotFoundError):  # another process was first
        places = [*folder.glob("*/"), folder]
    for place in places:
        with suppress(FileNotFoundError):
            for file in [file for suffix in _SUFFIXES for file in place.glob(f"[0-9]*.{suffix}")]:
                file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or another process was first
            place.rmdir()
