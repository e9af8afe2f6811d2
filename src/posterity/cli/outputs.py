"""The outputs of a command: files that replace only their own kind, the state of an unfinished run, the table."""

import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import posterity
from posterity.atomic_files import check_output_path
from posterity.errors import InputError, one_line

if TYPE_CHECKING:
    from posterity.inputs.model import LoadedModel
    from posterity.inputs.text_sources import SkippedLines

SIGNATURES = {  # the first bytes of each kind of file, in small letters
    "result": (b"\x89hdf",),
    "page": (b"<!doctype html",),
    "csv": (b"quantity,", b"document,"),  # of table and of score
    "parquet": (b"par1",),
    "latex": (b"\\begin{tabular}",),
}
STATE_SUFFIXES = (".safetensors", ".nc")


def check_outputs(
    output: Path | None, report: Path | None = None, inputs: Iterable[Any] = (), *, output_kind: str = "result"
) -> None:
    """Check before the work that the files can be written, and that none takes the place of something else.

    A file that is there already is replaced only by one of its kind: a result by a result, a page by a page.
    """
    taken = {real_path(path): "is read here" for path in inputs if str(path)}
    for kind, path in ((output_kind, output), ("page", report)):
        if path is None:
            continue
        if real_path(path) in taken:
            raise InputError(f"cannot write {path}: it {taken[real_path(path)]}; choose another file for the output")
        taken[real_path(path)] = "is the other output"
        check_output_path(path, kind)
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                if not file.read(16).lower().startswith(SIGNATURES[kind]):
                    noun = kind if kind in ("result", "page") else f"{kind} table of posterity"
                    raise InputError(f"cannot write {path}: what is there is no {noun}; choose another file")


def real_path(path: Any) -> str:
    """Return where a path leads; itself if that is nowhere: it holds a zero byte, or is a loop of links."""
    try:
        return os.path.realpath(path)
    except ValueError:
        return str(path)


def run_attrs(loaded: "LoadedModel") -> dict[str, Any]:
    """Return the attributes of a result that only the command line knows: the model's name and the command."""
    return {**loaded.attrs, "command": command_line()}


def command_line() -> str:
    """Return the command as it was typed, but for --resume."""
    return shlex.join(["posterity", *(word for word in sys.argv[1:] if word != "--resume")])


def _without_report(command: str) -> list[str]:
    """Return the words of a command but for the page that it writes."""
    rest, words = [], iter(shlex.split(command))
    for word in words:
        if word in ("-r", "--report"):
            next(words, None)
        elif not word.startswith(("--report=", "-r=")):
            rest.append(word)
    return rest


@dataclass(frozen=True)
class ResumableRun:
    """A run that goes on after an interruption: its processes, its output, and the folder of its state beside it."""

    processes: "posterity.Processes"
    output: Path | None
    resume: bool

    @classmethod
    def open(cls, output: Path | None, resume: bool) -> "ResumableRun":
        """Join the other processes of the run, if there are any, and look for the state of an unfinished one.

        Raises:
            InputError: The processes cannot find each other; there is a state and `resume` is False, or no output to
                resume.
        """
        run = cls(posterity.Processes.join(), output, resume)
        if resume and output is None:
            raise InputError("--resume goes on with a run that has an --output; name it")
        if not resume and run._has_state():
            raise InputError(
                f"{run.folder} holds an unfinished run: add --resume to go on with it, or remove it to start again"
            )
        return run

    @property
    def folder(self) -> Path | None:
        """The folder of the state; None for a run without an output."""
        if self.output is None:
            return None
        output = self.output.resolve() if self.output.name in ("", "..") else self.output
        return output.parent / f"{output.name}.state"

    def subfolder(self, name: str) -> Path | None:
        """Return the folder for one of several models."""
        return None if self.folder is None else self.folder / name

    def show_if_done(self, report: Path | None) -> bool:
        """Print the table and write the page of this very command if its result is there already; return whether."""
        return self.processes.broadcast(lambda: self._show_output(report))

    def _show_output(self, report: Path | None) -> bool:
        if not self.resume or self.output is None or not self.output.exists() or self._has_state():
            return False
        result = posterity.load(self.output)
        command = str(result.attrs.get("command"))
        if _without_report(command) != _without_report(command_line()):
            raise InputError(f"{self.output} is the result of another command ({command}): choose another output")
        typer.echo(one_line(f"{self.output} is finished"), err=True)
        if report is not None:
            posterity.report(result, report)
        posterity.summary(result)
        return True

    def remove_state(self) -> None:
        """Delete the state, once the first process has written the output."""
        from posterity.measurement.state_folder import remove_state

        self.processes.all_gather(None)
        if self.folder is not None:
            remove_state(self.folder)

    def _has_state(self) -> bool:
        return self.folder is not None and any(path.suffix in STATE_SUFFIXES for path in self.folder.rglob("*"))


def print_skipped_lines(skipped: "SkippedLines | None") -> dict[str, int]:
    """Print on stderr which lines were skipped, if they were to be, and return their number as an attribute."""
    if skipped is None:
        return {}
    typer.echo(one_line(str(skipped)), err=True)
    return {"skipped_lines": skipped.total}


def write_outputs(
    result: Any,
    output: Path | None,
    report: Path | None,
    skipped: "SkippedLines | None" = None,
    run: ResumableRun | None = None,
) -> None:
    """Write the result and its page where they were asked for, and print the table."""
    if run is None or run.processes.is_first:
        if skipped is not None:
            result = result.assign_attrs(print_skipped_lines(skipped))
        if output is not None:
            posterity.save(result, output)
        if report is not None:
            posterity.report(result, report)
        posterity.summary(result)
    if run is not None:
        run.remove_state()


def require_one_process() -> None:
    """Refuse several processes, each of which would do the same and write the same files."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("expected one process; only measure, audit and train share their work: leave torchrun out")
