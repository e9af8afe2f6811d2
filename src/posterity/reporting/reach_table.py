"""The table of the reach in a terminal: which window each layer and key/value head needs."""

import math

import xarray as xr
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posterity.reporting.result_words import heading
from posterity.results import stats
from posterity.results.formatting import UNKNOWN, error_words, first_positions_text, percent
from posterity.results.schema import RESULT
from posterity.results.steps import latest_step

LEVEL = 0.95
QUANTITIES = ("attention", "key mass", "value mass", "key credit", "value credit")  # of what a cache would hold
NOTES = (
    "attention: what the forward pass reads. For a cache or a window of a model as it is.",
    "mass: how much gradient passes over the edges, whatever its sign. For a window in training: beyond it hardly any "
    "signal would be lost.",
    "credit: how much of the gradient the edges make in the end, after terms have cancelled. For what W_K and W_V "
    "learn from. It can be negative, so that a lag of the whole context means: never settled.",
)


def print_reach(result: xr.Dataset, level: float = LEVEL, console: Console | None = None) -> None:
    """Print the lag that holds a share of attention, mass and credit, by layer and key/value head; of the last step.

    Args:
        result: A result of `posterity.measure`.
        level: The share, between 0 and 1.
        console: Where it is printed.

    Raises:
        InputError: It is no result, or was measured without lags or by an earlier version; a level out of range.
    """
    result = latest_step(RESULT.check(result))
    console = console or Console(highlight=False)
    model, layers, heads = (_reach(result, by, level) for by in ((), ("layer",), ("layer", "kv_head")))
    title, *details = heading(result)
    console.print(Text(title, style="bold"), *map(Text, details), sep="\n")
    first = first_positions_text(int(result.attrs["sinks"]))
    console.print(Text(f"Lag in tokens within which {100 * level:g} % lie" + (f", without {first}" if first else "")))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for name in ("layer", "kv head", *QUANTITIES):
        table.add_column(Text(name.replace(" ", "\n")), justify="right", no_wrap=name in QUANTITIES)
    table.add_row("all", "all", *_cells(model), style="bold", end_section=True)
    for layer in layers.layer.values:
        groups = heads.sel(layer=layer)
        existing = groups.kv_head.values[groups.lag.notnull().any("quantity").values]
        if len(existing) != 1:
            table.add_row(str(layer), "all", *_cells(layers.sel(layer=layer)))
        for number in existing:
            label = "" if len(existing) != 1 else str(layer)
            table.add_row(label, str(number), *_cells(groups.sel(kv_head=number)))
    console.print(table)
    console.print()
    console.print(Text(window_sentence(result, level)))
    for note in _notes(result):
        console.print(Text(note, style="dim"))


def window_sentence(result: xr.Dataset, level: float = LEVEL) -> str:
    """Say which of the measured windows holds this share of attention, mass and credit, or what the largest holds."""
    reach = stats.reach(result, ()).sel(quantity=list(QUANTITIES))
    enough = (reach.covered >= level).all("quantity").values
    window = int(reach.window[int(enough.argmax()) if enough.any() else -1])
    covered = reach.sel(window=window)
    shares = [
        f"{percent(float(number.covered), float(number.covered_error), result.sizes['document'])} of the {name}"
        for name, number in ((name, covered.sel(quantity=name)) for name in QUANTITIES)
    ]
    first = first_positions_text(int(result.attrs["sinks"]))
    if not enough.any():
        shares[-1] += f"; no measured window holds {100 * level:g} % of each"
    words = f"{first}{' and ' if first else ''}the latest {window:,} hold {', '.join(shares[:-1])} and {shares[-1]}"
    return f"{words[0].upper()}{words[1:]}."


def _reach(result: xr.Dataset, by: tuple[str, ...], level: float) -> xr.Dataset:
    """Return the lags of one level, with what stands behind their ±."""
    reach = stats.reach(result, by, (level,)).sel(level=level)
    return reach.assign(error=stats.uncertainty(reach.error, result.sizes["document"]))


def _cells(reach: xr.Dataset) -> list[str]:
    numbers = (reach.sel(quantity=name) for name in QUANTITIES)
    return [_lag(float(number.lag), float(number.error)) for number in numbers]


def _lag(lag: float, error: float) -> str:
    if math.isnan(lag):
        return UNKNOWN
    return f"{lag:,.0f}" if math.isnan(error) else f"{lag:,.0f} ± {error:,.0f}"


def _notes(result: xr.Dataset) -> tuple[str, ...]:
    error = (
        f"{error_words(result.sizes['document'])} A lag's standard error is half the interval between the lags at "
        "which the share plus and minus its own reaches the level. A window of w tokens holds the lags 0 to w − 1."
    )
    return (*NOTES, error, "All levels, windows and errors: posterity table RUN --kind reach")
