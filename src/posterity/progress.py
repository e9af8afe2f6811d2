"""The progress bar of long work."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress_bar(total: int, shown: bool, doing: str = "measuring", what: str = "windows") -> Iterator[Any]:
    """A bar with tokens per second and the time left; `advance(done, tokens)` moves it."""
    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(what + " · {task.fields[speed]} · left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("", total=total, speed="- tokens/s")
        started, done = time.perf_counter(), 0

        def advance(windows: int, tokens: int) -> None:
            nonlocal done
            done += tokens
            bar.update(task, advance=windows, speed=f"{done / (time.perf_counter() - started):,.0f} tokens/s")

        yield advance
