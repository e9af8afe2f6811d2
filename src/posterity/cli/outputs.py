"""What a command writes: files that replace only their own kind, the state of an unfinished run, the table."""

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from posterity.errors import InputError, one_line

STARTS = {"result": b"\x89HDF", "page": b"<!doctype html"}


def check_writable(output: Path | None, report: Path | None = None, reads: Iterable[Any] = ()) -> None:
    """Say before the work whether the files can be written, and that none takes the place of something else.

    A file that is there already is replaced only by one of its kind: a result by a result, a page by a page.
    """
    from posterity.atomic_files import writable

    taken = {real_path(one): "is read here" for one in reads if str(one)}
    for kind, path in (("result", output), ("page", report)):
        if path is not None:
            if real_path(path) in taken:
                raise InputError(
                    f"cannot write {path}: it {taken[real_path(path)]}; choose another file for the output"
                )
            taken[real_path(path)] = "is the other output"
            writable(path)
            if path.is_file() and path.stat().st_size:
                with path.open("rb") as file:
                    if not file.read(16).lower().startswith(STARTS[kind].lower()):
                        raise InputError(f"cannot write {path}: what is there is no {kind}; choose another file")


def real_path(path: Any) -> str:
    """Where a path leads; itself if it leads nowhere (a zero byte: pathlib would raise, as for a loop of links)."""
    try:
        return os.path.realpath(path)
    except ValueError:
        return str(path)


def provenance(loaded: Any) -> dict[str, Any]:
    """What only the command line knows of a result."""
    return {"model": loaded.name, "revision": loaded.revision, "command": command_line()}


def command_line() -> str:
    """The command as it was given, but for --resume."""
    return shlex.join(["posterity", *(one for one in sys.argv[1:] if one != "--resume")])


def _asked(command: list[str]) -> list[str]:
    """A command without the page that it writes."""
    kept, words = [], iter(command)
    for word in words:
        if word in ("-r", "--report"):
            next(words, None)
        elif not word.startswith(("--report=", "-r=")):
            kept.append(word)
    return kept


class Unfinished:
    """The state of a run beside its output, for one process or several."""

    def __init__(self, output: Path | None, resume: bool):
        from posterity.measurement.distributed import Processes

        self.processes = Processes.join()
        self.output, self.resume = output, resume
        self.folder = None if output is None else output.with_name(f"{output.name}.state")
        if resume and output is None:
            raise InputError("--resume goes on with a run that has an --output; name it")
        if not resume and self._state_exists():
            raise InputError(
                f"{self.folder} holds an unfinished run: add --resume to go on with it, or remove it to start again"
            )

    def is_done(self, report: Path | None) -> bool:
        """Whether the result of this very command is there already; then print its table and write its page."""
        import posterity

        def find() -> bool:
            if not self.resume or self.output is None or not self.output.exists() or self._state_exists():
                return False
            result = posterity.load(self.output)
            there = str(result.attrs.get("command"))
            if _asked(shlex.split(there)) != _asked(shlex.split(command_line())):
                raise InputError(f"{self.output} is the result of another command ({there}): choose another output")
            typer.echo(one_line(f"{self.output} is finished"), err=True)
            if report is not None:
                posterity.report(result, report)
            posterity.summary(result)
            return True

        return self.processes.agreed(find)

    def part(self, name: str) -> Path | None:
        """The folder of one of the models."""
        return None if self.folder is None else self.folder / name

    def remove(self) -> None:
        """Delete the state, once the first process has written the output."""
        from posterity.measurement import run_state as resume

        self.processes.every(None)
        if self.folder is not None:
            resume.remove(self.folder)

    def _state_exists(self) -> bool:
        return self.folder is not None and any(
            path.suffix in (".safetensors", ".nc") for path in self.folder.rglob("*")
        )


def told_of(skipped: Any) -> dict[str, int]:
    """Say on stderr which lines were skipped, if that was asked for, and return their number as an attribute."""
    if skipped is None:
        return {}
    typer.echo(one_line(str(skipped)), err=True)
    return {"skipped_lines": skipped.total}


def hand_over(
    result: Any, output: Path | None, report: Path | None, skipped: Any = None, unfinished: Unfinished | None = None
) -> None:
    """Write what was asked for and print the table."""
    import posterity

    if unfinished is None or unfinished.processes.first:
        if skipped is not None:
            result = result.assign_attrs(told_of(skipped))
        if output is not None:
            posterity.save(result, output)
        if report is not None:
            posterity.report(result, report)
        posterity.summary(result)
    if unfinished is not None:
        unfinished.remove()


def alone() -> None:
    """Refuse several processes, each of which would do the same and write the same files."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("expected one process; only measure, audit and train share their work: leave torchrun out")
