"""Files that are written whole or not at all; whether they can be is said before the work."""

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path

from posterity.errors import InputError


def writable(path: str | os.PathLike[str]) -> Path:
    """Say before the work whether a file can be written at `path`; returns its real path. InputError has the reason."""
    name = os.fspath(path)
    try:
        target = Path(os.path.realpath(name))
        reason = _obstacle(target)
    except (OSError, ValueError) as error:
        target, reason = Path(), getattr(error, "strerror", None) or str(error)
    if reason is not None:
        raise InputError(f"{name!r}: expected a path where a file can be written, but {reason}; choose another path")
    return target


def write_whole(target: Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, then one rename. InputError when it fails."""
    part = target.parent / f".{secrets.token_hex(8)}.part"
    try:
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another path"
        size = f"{len(data) / 1e6:.1f} MB"
        raise InputError(
            f"{target}: expected room and permission for {size}, but {error.strerror}; {advice}"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _obstacle(target: Path) -> str | None:
    """What stands in the way of writing a file at `target`; None if nothing does."""
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
    probe = folder / f".{secrets.token_hex(8)}.part"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        return f"nothing can be written in the folder {str(folder)!r} ({error.strerror})"
    return None
