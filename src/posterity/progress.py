"""The progress bar of long work, on stderr."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress_bar(
    total: int, show: bool, activity: str = "measuring", unit: str = "windows"
) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with tokens per second and the time left; `advance(units, tokens)` moves it."""
    columns = (
        TextColumn(activity),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + " · {task.fields[speed]} · left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("", total=total, speed="- tokens/s")
        start, total_tokens = time.perf_counter(), 0

        def advance(units: int, tokens: int) -> None:
            nonlocal total_tokens
            total_tokens += tokens
            bar.update(task, advance=units, speed=f"{total_tokens / (time.perf_counter() - start):,.0f} tokens/s")

        yield advance
