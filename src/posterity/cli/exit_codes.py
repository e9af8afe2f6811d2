"""Exit codes of the command line: every mistake, lack of memory or interruption is one line and a code.

1 is a folding beyond its budget, 2 a mistake or a lack of memory, 130 an interruption from the keyboard, 143 one by
SIGTERM, 141 a reader of the output that has gone. A bug keeps its traceback.
"""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from posterity.errors import InputError, one_line

FIRST_PROCESS_SECONDS = 5  # that the other processes leave the first one to print what is wrong for all


class Termination(KeyboardInterrupt):
    """SIGTERM: torchrun ends the other processes with it when one has died, Slurm a job whose time is up."""


def raise_termination(*_: object) -> None:
    """Handle SIGTERM."""
    raise Termination


@contextmanager
def exit_with_one_line() -> Iterator[None]:
    """Turn mistakes, a lack of memory and interruptions into one line on stderr and an exit code."""
    try:
        yield
    except InputError as error:
        more = "" if error.page is None else f" (why: posterity explain {error.page})"
        _exit(f"{error}{more}", 2, error)
    except typer.TyperException as error:  # a wrong option
        command = getattr(getattr(error, "ctx", None), "command_path", "posterity")
        _exit(f"{error.format_message().replace('Value error, ', '').rstrip('.')}; see {command} --help", 2, error)
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Termination)
        if terminated and process_rank() != "0":  # the first process speaks for all
            raise typer.Exit(143) from error
        reason = "told to stop from outside, or because another process has ended" if terminated else "interrupted"
        advice = f"; {error}: add --resume to go on" if str(error) else ""
        _print_error(reason + advice)
        raise typer.Exit(143 if terminated else 130) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _exit("out of memory: lower --context or --batch, or choose --dtype bfloat16", 2, error)
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
        # The reader has gone; what is still buffered would make Python complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from error


def process_rank() -> str:
    """Return the number of this process among those that torchrun started; "0" for a single one."""
    return os.environ.get("RANK", "0")


def _is_out_of_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError is a RuntimeError with this text; the CPU allocator has the other.
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _exit(message: str, code: int, error: BaseException) -> None:
    rank = process_rank()
    if rank != "0":
        # What is wrong for all is printed by the first process, and torchrun ends this one meanwhile.
        try:
            time.sleep(FIRST_PROCESS_SECONDS)
        except KeyboardInterrupt:
            raise typer.Exit(code) from error
        message = f"process {rank}: {message}"
    _print_error(message)
    raise typer.Exit(code) from error


def _print_error(message: str) -> None:
    typer.echo(f"posterity: {one_line(message)}", err=True)
