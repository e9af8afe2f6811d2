"""The table of windows in a terminal: what it costs to let each layer look back less far, and the local layers."""

import math

import numpy as np
import xarray as xr
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posterity.reporting.result_words import heading
from posterity.results.formatting import (
    UNKNOWN,
    error_words,
    first_positions_text,
    list_parts,
    value_with_error,
)
from posterity.results.window_plan import DRAWS, RANDOM, Estimate, WindowPlan

MILLI = 1000  # prices are printed in thousandths of a nat
LAYER_WIDTH, CELL_WIDTH = 9, 11


def print_windows(plan: WindowPlan, console: Console | None = None) -> None:
    """Print the prices of windows by layer, the proposal, and what it and other choices really cost.

    Args:
        plan: Of `posterity.windows`, or of a result.
        console: Where it is printed.
    """
    console = console or Console(highlight=False)
    title, *details = heading(plan.result)
    console.print(Text(title, style="bold"), *map(Text, details), sep="\n")
    _print_prices(plan, console)
    console.print(Text(proposal_sentence(plan)))
    if plan.trials:
        _print_trials(plan, console)


def proposal_sentence(plan: WindowPlan) -> str:
    """Say which layers may be local at which window, and what that costs by their prices."""
    if plan.count is None:
        return "Which layers may be local: add --local 1/2, or another share or number of layers."
    if plan.proposal is None:
        return (
            f"No window lets {plan.count} of {plan.result.sizes['layer']} layers look back less far within "
            f"{plan.budget:g} nats per token: ask for fewer (--local), or name a window (--window)."
        )
    names = list_parts(np.isin(plan.result.layer.values, plan.proposal.layers), most=plan.count)
    cost = value_with_error(*plan.proposal.predicted, windows=plan.result.sizes["document"])
    tokens = f"{plan.proposal.window} token{'s' * (plan.proposal.window > 1)}"
    return f"Local at a window of {tokens}: {names}. By the sum of their prices that costs {cost} nats per token."


def _print_prices(plan: WindowPlan, console: Console) -> None:
    prices, windows = plan.prices, plan.result.sizes["document"]
    sinks = first_positions_text(int(plan.result.attrs["sinks"]))
    console.print(
        Text(
            "Price of a window in thousandths of a nat per token: what a layer alone loses if its queries see only so "
            f"many tokens{f' and {sinks}' if sinks else ''}"
        )
    )
    sizes = prices.window.values[-max(1, (console.width - LAYER_WIDTH) // CELL_WIDTH) :]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for name in ("layer", *(f"{size:,}" for size in sizes)):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in prices.layer.values:
        row = prices.sel(layer=layer, window=sizes)
        table.add_row(str(layer), *(_price(row.sel(window=size), windows) for size in sizes))
    console.print(table)
    notes = [error_words(windows)]
    if len(sizes) < prices.sizes["window"]:
        notes.append(f"Smaller windows than {sizes[0]:,}: posterity table RUN --kind windows, or a wider terminal.")
    if bool(prices.price.isnull().any()):
        notes.append(f"{UNKNOWN}: the layer looks back no further in any case.")
    console.print(Text(" ".join(notes), style="dim"))
    console.print()


def _price(number: xr.Dataset, windows: int) -> str:
    """Format a price in thousandths, with its error in a line of its own."""
    return value_with_error(MILLI * float(number.price), MILLI * float(number.error), windows=windows).replace(
        " ± ", "\n± "
    )


def _print_trials(plan: WindowPlan, console: Console) -> None:
    assert plan.proposal is not None
    windows = plan.trial_windows
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for name in ("layers chosen", "predicted", "divergence", "loss change"):
        table.add_column(Text(name), justify="left" if name == "layers chosen" else "right", no_wrap=True)
    priced = plan.result.sizes["document"]
    for trial in plan.trials:
        numbers = ((trial.predicted, priced), (trial.divergence, windows), (trial.loss, windows))
        table.add_row(trial.choice, *(_number(number, windows) for number, windows in numbers))
    console.print()
    console.print(Text(f"Nats per token on {windows} held-out windows, the layers really masked"))
    console.print(table)
    notes = (
        error_words(windows),
        "divergence: of the model's predictions from those with local layers (Kullback-Leibler); predicted: the sum of "
        f"prices. {RANDOM}: mean of {DRAWS} draws, ± over them.",
    )
    console.print(Text(" ".join(notes), style="dim"))


def _number(estimate: Estimate, windows: int) -> str:
    return UNKNOWN if math.isnan(estimate.value) else value_with_error(*estimate, windows=windows)
