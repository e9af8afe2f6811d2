"""Atomic writes: a file has its old content or its new content, never a part of it."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from posterity.errors import InputError

ENDINGS = {"result": (".nc",), "page": (".html", ".htm")}  # tables have those that pandas and TeX know


def check_output_path(path: str | os.PathLike[str], kind: str = "") -> Path:
    """Return the real path of an output file.

    Args:
        path: The file.
        kind: "result" or "page", whose files have one of `ENDINGS`; empty for any other.

    Raises:
        InputError: It cannot be written there, with the reason, or its name ends otherwise than files of its kind.
    """
    name = os.fspath(path)
    try:
        target = Path(os.path.realpath(name))
        reason = _obstacle(target)
    except (OSError, ValueError) as error:
        target, reason = Path(), getattr(error, "strerror", None) or str(error)
    if reason is not None:
        raise InputError(f"{name!r}: expected a path where a file can be written, but {reason}; choose another path")
    endings = ENDINGS.get(kind, ())
    if endings and Path(name).suffix.lower() not in endings:
        example = Path(name).with_suffix(endings[0])
        raise InputError(f"expected a {kind} that ends in {endings[0]}; got {name}: name it {example}")
    return target


def write_atomically(target: Path, data: bytes) -> None:
    """Write `data` to a file, by way of a temporary file beside it.

    Raises:
        InputError: It cannot be written; the file is as before.
    """
    part = _part_path(target.parent)
    try:
        with replace_atomically(target, part) as path, open(path, "xb") as file:
            file.write(data)
    except OSError as error:
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another path"
        size = f"{len(data) / 1e6:.1f} MB"
        raise InputError(
            f"{target}: expected room and permission for {size}, but {error.strerror}; {advice}"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def replace_atomically(target: Path, part: Path) -> Iterator[Path]:
    """Yield `part` for the block to write; at its end flush that file to disk and let it replace `target`.

    Both lie in one folder. A block that fails, or a process that is killed, leaves `target` as it was, and may leave
    `part`.
    """
    yield part
    with part.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(part, target)


def _part_path(folder: Path) -> Path:
    return folder / f".{secrets.token_hex(8)}.part"


def _obstacle(target: Path) -> str | None:
    """Return the reason why no file can be written at `target`, or None."""
    folder = target.parent
    if target.is_dir():
        return "it is a folder"
    if not folder.is_dir():
        return f"the folder {str(folder)!r} does not exist"
    if os.path.lexists(target):
        if not target.is_file():
            return "it is not a regular file"
        if not os.access(target, os.W_OK):
            return "the file there is write-protected"
    probe = _part_path(folder)
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        return f"nothing can be written in the folder {str(folder)!r} ({error.strerror})"
    return None
