"""What trains the residual stream, as a table in a terminal: parts by layer, then pulls by direction."""

import xarray as xr
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posterity.axes import FEATURE_PARTS
from posterity.errors import readable
from posterity.results.feature_parts import direction_pulls, part_shares
from posterity.results.feature_schema import FEATURES
from posterity.results.formatting import error_words, percent, value_with_error
from posterity.results.ratios import mean_and_error

MOST_DIRECTIONS = 30  # in a terminal
LAYER_COLUMNS = ("layer", *FEATURE_PARTS, "cosine direct, pre-cached")
PULL_COLUMNS = ("direction", "later share", "cosine own, later", "own pull", "later pull")
INFLUENCE_COLUMNS = ("direction", *(f"step along {part}" for part in FEATURE_PARTS))


def print_features(features: xr.Dataset, console: Console) -> None:
    """Print the shares of the parts by layer, and the pulls on the directions, at most 30 of them."""
    FEATURES.check(features)
    title, *details = feature_heading(features)
    console.print(Text(title, style="bold"), *map(Text, details), sep="\n")
    _print_table(LAYER_COLUMNS, layer_rows(features), console)
    console.print(Text("Shares of the gradient of all parameters, at the input of a layer.", style="dim"))
    if "pull" in features:
        _print_table(PULL_COLUMNS, direction_rows(features)[:MOST_DIRECTIONS], console)
        console.print(Text("Pulls in nats; positive: gradient descent makes the component larger.", style="dim"))
        if "influence" in features:
            _print_table(INFLUENCE_COLUMNS, influence_rows(features)[:MOST_DIRECTIONS], console)
            console.print(Text("Change of the mean component per learning rate, by a step along a part.", style="dim"))
        if (more := features.sizes["direction"] - MOST_DIRECTIONS) > 0:
            console.print(Text(f"{more} more directions in the file (posterity table).", style="dim"))
    console.print(Text(error_words(features.sizes["document"]), style="dim"))


def feature_heading(features: xr.Dataset) -> list[str]:
    """Return the lines above the table: model and windows; the loss."""
    attrs, windows = features.attrs, features.sizes["document"]
    mean, error = mean_and_error(features.loss.values)
    loss = value_with_error(float(mean), float(error), windows=windows)
    first, stop = map(int, str(attrs["positions"]).split(":"))
    where = f"position {first}" if stop == first + 1 else f"positions {first} to {stop - 1}"
    noun = "window" if windows == 1 else "windows"
    return [
        f"{readable(str(attrs['model']))}: {windows} {noun} of {attrs['context']} tokens, {where}",
        f"Loss: {loss} nats per token",
    ]


def layer_rows(features: xr.Dataset) -> list[list[str]]:
    """Return for each layer its number, the shares of the parts, and the cosine of direct and pre-cached part."""
    shares, windows, rows = part_shares(features), features.sizes["document"], []
    for layer in shares.layer.values:
        layer_shares = shares.sel(layer=layer)
        cells = [
            percent(float(layer_shares.share.sel(part=part)), float(layer_shares.error.sel(part=part)), windows)
            for part in FEATURE_PARTS
        ]
        cosine = value_with_error(float(layer_shares.cosine), float(layer_shares.cosine_error), windows=windows)
        rows.append([str(layer), *cells, cosine])
    return rows


def direction_rows(features: xr.Dataset) -> list[list[str]]:
    """Return for each direction its name, share of later losses, cosine and pulls."""
    pulls, windows, rows = direction_pulls(features), features.sizes["document"], []
    for index, name in enumerate(pulls.direction.values):
        pull = pulls.isel(direction=index)
        numbers = [
            value_with_error(float(pull[name]), float(pull[f"{name}_error"]), windows=windows)
            for name in ("cosine", "own", "later")
        ]
        share = percent(float(pull.later_share), float(pull.later_share_error), windows)
        rows.append([readable(str(name)), share, *numbers])
    return rows


def influence_rows(features: xr.Dataset) -> list[list[str]]:
    """Return for each direction its name and what a step along each part does to it; nothing if not measured."""
    pulls, windows = direction_pulls(features), features.sizes["document"]
    if "influence" not in pulls:
        return []
    return [
        [
            readable(str(name)),
            *(
                value_with_error(float(mean), float(error), windows=windows)
                for mean, error in zip(means, errors, strict=True)
            ),
        ]
        for name, means, errors in zip(
            pulls.direction.values, pulls.influence.values, pulls.influence_error.values, strict=True
        )
    ]


def _print_table(columns: tuple[str, ...], rows: list[list[str]], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)
