"""How far away the readers of each token of an inspected text are: for the page, and as a table in a terminal."""

import math
from typing import Any

import xarray as xr
from rich import box
from rich.table import Table
from rich.text import Text

from posterity.axes import READER_LEVELS, READER_QUANTITIES
from posterity.errors import one_line, readable
from posterity.results import stats
from posterity.results.formatting import UNKNOWN

ROWS = 48  # tokens of the table in a terminal


def reader_lags_table(result: xr.Dataset) -> Table | None:
    """Return the table of the first tokens, over all layers; None for a result that does not have these lags."""
    if "reader_lag_all" not in result:
        return None
    lags = stats.reader_lags(result).transpose("position", "reader_quantity", "level").values
    title = "Readers of a token: lags of 50 % · 90 %, all layers"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False, title=title, title_justify="left")
    table.add_column("token", overflow="fold")
    for name in READER_QUANTITIES:
        table.add_column(name, justify="right")
    tokens = [f"{position} {one_line(readable(str(token)))}" for position, token in enumerate(result.token.values)]
    for token, quantities in list(zip(tokens, lags, strict=True))[:ROWS]:
        table.add_row(Text(token), *(Text(" · ".join(map(_lag, levels))) for levels in quantities))
    if len(tokens) > ROWS:
        table.caption = f"{len(tokens) - ROWS} more tokens: in the page, and in posterity.stats.reader_lags(result)."
    return table


def pack_reader_lags(result: xr.Dataset) -> dict[str, Any] | None:
    """Return the lags by quantity, level and position for the page, of `all` layers and of each; None: not known."""
    if "reader_lag_all" not in result:
        return None
    order = ("reader_quantity", "level", "position")
    model = stats.reader_lags(result).transpose(*order).values
    layers = stats.reader_lags(result, ("layer",)).transpose("layer", *order).values
    return {"levels": list(READER_LEVELS), "all": _whole(model.tolist()), "layers": _whole(layers.tolist())}


def _whole(lags: list | float) -> list | int | None:
    if isinstance(lags, list):
        return [_whole(part) for part in lags]
    return None if math.isnan(lags) else int(lags)


def _lag(lag: float) -> str:
    return UNKNOWN if math.isnan(lag) else f"{lag:.0f}"
