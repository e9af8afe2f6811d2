"""Where the command line meets its user: every mistake, lack of memory or interruption is one line and an exit code."""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from posterity.errors import InputError, one_line

OTHERS_WAIT = 5  # seconds that other processes wait for the first one to speak


class Terminated(KeyboardInterrupt):
    """SIGTERM: torchrun ends the other processes with it when one has died, Slurm a job whose time is up."""


def terminate(*_: object) -> None:
    """What to do at SIGTERM."""
    raise Terminated


@contextmanager
def edge() -> Iterator[None]:
    """Turn mistakes, a lack of memory and interruptions into one line; a real bug keeps its traceback."""
    try:
        yield
    except InputError as error:
        _stop(str(error), 2, error)
    except typer.TyperException as error:  # a wrong option
        asked = getattr(getattr(error, "ctx", None), "command_path", "posterity")
        _stop(f"{error.format_message().replace('Value error, ', '').rstrip('.')}; see {asked} --help", 2, error)
    except KeyboardInterrupt as error:
        ended = isinstance(error, Terminated)
        if ended and rank() != "0":  # the first process speaks for all
            raise typer.Exit(143) from error
        why = "told to stop from outside, or because another process has ended" if ended else "interrupted"
        kept = f"; {error}: add --resume to go on" if str(error) else ""
        _say(why + kept)
        raise typer.Exit(143 if ended else 130) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        _stop("out of memory: lower --context or --batch, or choose --dtype bfloat16", 2, error)
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
        # The reader has gone; what is still buffered would make Python complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from error


def _is_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError is a RuntimeError with this text; the CPU allocator has the other.
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _stop(message: str, code: int, error: BaseException) -> None:
    if rank() != "0":
        # What is wrong for all is said by the first process, and torchrun ends this one meanwhile.
        try:
            time.sleep(OTHERS_WAIT)
        except KeyboardInterrupt:
            raise typer.Exit(code) from error
        message = f"process {rank()}: {message}"
    _say(message)
    raise typer.Exit(code) from error


def _say(message: str) -> None:
    typer.echo(f"posterity: {one_line(message)}", err=True)


def rank() -> str:
    """The number of this process among those that torchrun started; "0" alone."""
    return os.environ.get("RANK", "0")
