"""The summary table of a result, for terminal, notebook and page, and its heads ranked by self share."""

from collections.abc import Callable
from dataclasses import dataclass

import xarray as xr
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posterity.axes import STREAMS, WRITTEN
from posterity.reporting.result_words import heading, reading_notes, verdict_sentence
from posterity.results import stats
from posterity.results.formatting import UNKNOWN, horizon_text, number_text, percent, tokens_text
from posterity.results.schema import RESULT
from posterity.results.steps import latest_step

LOSS_PARTS = {"own": "own loss", "self later": "self edge, later losses", "future": "future edges"}  # in words


@dataclass(frozen=True)
class SummaryRow:
    """One line of the table: a label and one cell for each stream; `part` says which block of the table it is in."""

    part: str
    label: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class RankedHead:
    """One head's self share of one stream; `portion` is its credit over an equal part of its layer's credit."""

    layer: int
    head: int
    share: float
    error: float
    portion: float


def print_result(result: xr.Dataset, console: Console) -> None:
    """Print table and sentence, from 80 columns on; of several steps, those of the last."""
    result = latest_step(RESULT.check(result))
    title, *details = heading(result)
    console.print(Text(title, style="bold"), *map(Text, details), sep="\n")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("", overflow="fold")
    for stream in STREAMS:
        table.add_column(stream, justify="right", no_wrap=True)
    part = ""
    for row in summary_rows(result):
        if row.part != part:
            part = row.part
            if table.row_count:
                table.add_section()
            table.add_row(Text(part, style="bold"))
        table.add_row(Text("  " + row.label), *map(Text, row.cells))
    console.print(table)
    console.print()
    console.print(Text(verdict_sentence(result)))
    for note in reading_notes(result):
        console.print(Text(note, style="dim"))


def summary_rows(result: xr.Dataset) -> list[SummaryRow]:
    """Return the table, one cell for each stream in the order of `axes.STREAMS`."""
    return [*_credit_rows(result), *_extreme_rows(result), *_weight_rows(result), *_loss_rows(result)]


def _cells(cell: Callable[[str], str]) -> tuple[str, ...]:
    return tuple(cell(stream) for stream in STREAMS)


def _credit_rows(result: xr.Dataset) -> list[SummaryRow]:
    part = "Credit of the gradient"
    shares, counted, first = stats.shares(result), stats.counts(result), stats.first_position(result)
    median = stats.median_lag(stats.profile(result).share)
    self_counted, median_counted = percent(float(counted.isel(lag=0))), tokens_text(float(stats.median_lag(counted)))
    attention = percent(float(stats.attention_first(result)))

    def side_cells(side: str) -> tuple[str, ...]:
        return _cells(lambda stream: _percent(shares.sel(stream=stream, side=side)))

    return [
        SummaryRow(part, "self share", side_cells("self")),
        SummaryRow(part, "  by counting alone", _cells(lambda _: self_counted)),
        SummaryRow(part, "other share", side_cells("other")),
        SummaryRow(part, "median lag of the credit", _cells(lambda s: tokens_text(float(median.sel(stream=s))))),
        SummaryRow(part, "  by counting alone", _cells(lambda _: median_counted)),
        SummaryRow(part, "share of first position", _cells(lambda stream: _percent(first.sel(stream=stream)))),
        SummaryRow(part, "  attention weight on it", ("", attention, attention)),
    ]


def _extreme_rows(result: xr.Dataset) -> list[SummaryRow]:
    part = "Extremes of the self share"
    layers = stats.shares(result, ("layer",)).share.sel(side="self")
    heads = {stream: rank_heads(result, stream) for stream in STREAMS}
    return [
        SummaryRow(part, "largest, layer", _cells(lambda stream: _layer(layers.sel(stream=stream), -1))),
        SummaryRow(part, "smallest, layer", _cells(lambda stream: _layer(layers.sel(stream=stream), 0))),
        SummaryRow(part, "largest, head", _cells(lambda stream: _head(heads[stream], -1))),
        SummaryRow(part, "smallest, head", _cells(lambda stream: _head(heads[stream], 0))),
    ]


def _weight_rows(result: xr.Dataset) -> list[SummaryRow]:
    if "weight_mean" not in result:
        return []
    part = "Gradient of the weights"
    shares = stats.weight_shares(result)
    agreement = shares.agreement.sel(part="whole")
    return [
        SummaryRow(part, "self share, one window", _cells(lambda stream: _percent(shares.sel(stream=stream)))),
        SummaryRow(part, "self share, mean", _cells(lambda s: percent(float(shares.share_mean.sel(stream=s))))),
        SummaryRow(part, "agreement of windows", _cells(lambda s: number_text(float(agreement.sel(stream=s))))),
    ]


def _loss_rows(result: xr.Dataset) -> list[SummaryRow]:
    """Return the block on own and later losses, as far as they were measured."""
    part, rows = "Who pays for keys and values", []
    if "loss_credit" in result:
        shares = stats.loss_shares(result)
        for loss_part, label in LOSS_PARTS.items():
            cells = (_percent(shares.sel(written=written, part=loss_part)) for written in WRITTEN)
            rows.append(SummaryRow(part, label, ("", *cells)))
    if "horizon_by_document" in result:
        reach = stats.effective_horizon(result)
        ends = int(result.horizon[0]), int(result.horizon[-1])
        cells = _cells(lambda stream: horizon_text(float(reach.sel(stream=stream)), *ends))
        rows.append(SummaryRow(part, "effective horizon", cells))
    return rows


def rank_heads(result: xr.Dataset, stream: str) -> list[RankedHead]:
    """Rank heads by their self share, smallest first, without those that `stats.weak_heads` leaves out."""
    shares = stats.shares(result, ("layer", "head")).sel(stream=stream, side="self")
    ranked = shares.share.notnull().values & ~stats.weak_heads(result).sel(stream=stream).values
    columns = [shares.share.values, shares.error.values, credit_portions(result).sel(stream=stream).values]
    heads = zip(*ranked.nonzero(), *(values[ranked] for values in columns), strict=True)
    rows = [RankedHead(int(layer), int(head), *map(float, numbers)) for layer, head, *numbers in heads]
    return sorted(rows, key=lambda head: head.share)


def credit_portions(result: xr.Dataset) -> xr.DataArray:
    """Return the credit of each head over an equal part of its layer's credit; dims (layer, head, stream)."""
    credit = result.credit_by_document.sum(("document", "reader_of", "side"), skipna=False)
    present = stats.existing_heads(result)
    return credit / credit.where(present, 0.0).sum("head", skipna=False) * present.sum("head")


def _percent(share: xr.Dataset) -> str:
    return percent(float(share.share), float(share.error))


def _layer(share: xr.DataArray, index: int) -> str:
    """Format the layer at an index of the ranking."""
    shares = share.dropna("layer")
    if not shares.size:
        return UNKNOWN
    layer = shares.sortby(shares)[index]
    return f"L{int(layer.layer)} {percent(float(layer))}"


def _head(heads: list[RankedHead], index: int) -> str:
    """Format the head at an index of the ranking."""
    return f"L{heads[index].layer} H{heads[index].head} {percent(heads[index].share)}" if heads else UNKNOWN
