"""An eviction as a table in a terminal: what dropping pairs costs, by score, budget and share."""

import numpy as np
import xarray as xr
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posterity.errors import readable
from posterity.results.eviction_schema import EVICTION
from posterity.results.formatting import error_words, value_with_error
from posterity.results.ratios import mean_and_error

NAME_WIDTH, CELL_WIDTH = 20, 18


def print_eviction(eviction: xr.Dataset, console: Console) -> None:
    """Print the divergence of every scorer, for each budget the shares side by side, and its rank correlation.

    A narrow terminal shows means without their errors.
    """
    EVICTION.check(eviction)
    title, *details = eviction_heading(eviction)
    console.print(Text(title, style="bold"), *map(Text, details), sep="\n")
    wide = console.width >= NAME_WIDTH + CELL_WIDTH * (eviction.sizes["kept"] + 1)
    for budget in eviction.budget.values:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
        table.add_column("score", overflow="fold")
        for share in eviction.kept.values:
            table.add_column(kept_text(float(share)), justify="right", no_wrap=True)
        table.add_column("rank corr.", justify="right", no_wrap=True)
        for scorer in eviction.scorer.values:
            name, *cells = scorer_cells(eviction.sel(scorer=scorer, budget=budget))
            table.add_row(name, *(cell if wide else cell.partition(" ± ")[0] for cell in cells))
        console.print()
        console.print(Text(budget_words(str(budget))))
        console.print(table)
    errors = (
        error_words(eviction.sizes["document"]) if wide else "A wider terminal, or the page (--report), shows errors."
    )
    console.print(Text(f"Divergence in nats per token, by share of the pairs kept. {errors}", style="dim"))


def eviction_heading(eviction: xr.Dataset) -> list[str]:
    """Return the lines above the table: model and windows; the loss with all pairs."""
    attrs, windows = eviction.attrs, eviction.sizes["document"]
    loss = value_text(eviction.loss.values)
    task = "" if attrs.get("task") == "text" else f", task {attrs.get('task')}"
    return [
        f"{readable(str(attrs['model']))}: {windows} prompts of {attrs['prefix']} tokens, "
        f"{attrs['continuation']} predicted behind each{task}",
        f"Loss with all pairs: {loss} nats per token",
    ]


def budget_words(budget: str) -> str:
    """Say which heads share a budget."""
    return {
        "one threshold": "One threshold for all layers and heads",
        "by layer": "One threshold for the heads of a layer, a fifth of an equal budget for sure",
        "equal": "The same share in every head",
    }[budget]


def scorer_cells(eviction: xr.Dataset) -> list[str]:
    """Return name, divergence by share, and rank correlation of one scorer under one budget."""
    shares = [value_text(eviction.divergence.sel(kept=share).values) for share in eviction.kept.values]
    return [readable(str(eviction.scorer.values)), *shares, value_text(eviction.correlation.values)]


def value_text(values: np.ndarray) -> str:
    """Return the mean over windows with its error."""
    mean, error = mean_and_error(values)
    return value_with_error(float(mean), float(error), windows=len(values))


def kept_text(share: float) -> str:
    """Return a share as a percentage: 25 %, 6.2 %."""
    return f"{100 * share:.3g} %"
