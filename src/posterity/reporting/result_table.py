"""The summary table of a result, for terminal, notebook and page, and its heads ranked by self share."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import xarray as xr
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posterity.axes import STREAMS, WRITTEN
from posterity.reporting.reader_table import reader_lags_table
from posterity.reporting.result_words import (
    edges_title,
    edges_words,
    heading,
    lead_reader,
    reading_notes,
    sink_number,
    verdict_sentence,
)
from posterity.results import stats
from posterity.results.formatting import UNKNOWN, horizon_text, number_text, percent, tokens_text
from posterity.results.ratios import sum_readers
from posterity.results.schema import RESULT
from posterity.results.steps import latest_step

BEYOND = " †"  # marks a share below 0 or above 100 %
LOSS_PARTS = {"own": "own loss", "self later": "self edge, later losses", "future": "future edges"}  # in words


@dataclass(frozen=True)
class SummaryRow:
    """One line of the table: a label and one cell for each stream; `part` says which block of the table it is in."""

    part: str
    label: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class RankedHead:
    """One head's number in the ranking of one stream, and its credit.

    `share` is what its self edges bring, of its own credit, or of its group's where heads share the stream
    (`ranked_shares`); `portion` is its credit over an equal part of its layer's credit.
    """

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
    part, rows = "", summary_rows(result)
    for row in rows:
        if row.part != part:
            part = row.part
            if table.row_count:
                table.add_section()
            table.add_row(Text(part, style="bold"))
        table.add_row(Text("  " + row.label), *map(Text, row.cells))
    console.print(table)
    console.print()
    console.print(Text(verdict_sentence(result)))
    if (readers := reader_lags_table(result)) is not None:
        console.print()
        console.print(readers)
        console.print()
    for note in [*reading_notes(result), *row_notes(result, rows)]:
        console.print(Text(note, style="dim"))


def summary_rows(result: xr.Dataset, reader_of: str = "") -> list[SummaryRow]:
    """Return the table, one cell for each stream in the order of `axes.STREAMS`.

    Args:
        result: A result of `posterity.measure`.
        reader_of: Of which edges, by their key; "" for those that lead (`lead_reader`).
    """
    reader = reader_of or lead_reader(result)
    return [
        *_credit_rows(result, reader),
        *_extreme_rows(result, reader),
        *_weight_rows(result),
        *_loss_rows(result, reader),
    ]


def row_notes(result: xr.Dataset, rows: Iterable[SummaryRow]) -> list[str]:
    """Return what a reader must know of single rows: whose credit heads are ranked by, and what the mark means."""
    notes = []
    if shares_keys(result):
        notes.append(
            "A head in its group: several heads read one key and value. For these, a head's number is what its self "
            "edges bring to the credit of the whole group; for queries, to its own."
        )
    if any(cell.endswith(BEYOND) for row in rows for cell in row.cells):
        notes.append(f"{BEYOND.strip()} beyond 0 to 100 %: parts of a gradient can point against their sum.")
    return notes


def _cells(cell: Callable[[str], str]) -> tuple[str, ...]:
    return tuple(cell(stream) for stream in STREAMS)


def _credit_rows(result: xr.Dataset, reader: str) -> list[SummaryRow]:
    part = edges_title("Credit of the gradient", result, reader)
    shares, counted = stats.shares(result, reader_of=reader), stats.counts(result, reader_of=reader)
    median = stats.median_lag(stats.profile(result, reader_of=reader).share)
    self_counted, median_counted = percent(float(counted.isel(lag=0))), tokens_text(float(stats.median_lag(counted)))

    def side_cells(side: str) -> tuple[str, ...]:
        return _cells(lambda stream: _percent(shares.sel(stream=stream, side=side), result))

    return [
        SummaryRow(part, "self share", side_cells("self")),
        SummaryRow(part, "  by counting alone", _cells(lambda _: self_counted)),
        SummaryRow(part, "other share", side_cells("other")),
        SummaryRow(part, "median lag of the credit", _cells(lambda s: tokens_text(float(median.sel(stream=s))))),
        SummaryRow(part, "  by counting alone", _cells(lambda _: median_counted)),
        *_first_rows(result),
    ]


def _first_rows(result: xr.Dataset) -> list[SummaryRow]:
    """Return what the first positions have of the whole; of an older file, the first one alone."""
    first, attention = stats.first_position(result), percent(float(stats.attention_first(result)))
    cells = ("", *(_percent(first.sel(stream=stream), result) for stream in WRITTEN))
    if lead_reader(result) == "all":
        part, label, rows = "Credit of the gradient", "share of first position", []
    else:
        part, label = "Sinks: part of all credit", "  the first position alone"
        together = stats.first_share(result)
        number = sink_number(result)
        edges = _cells(lambda stream: _percent(together.sel(stream=stream), result))
        rows = [SummaryRow(part, f"edges into the first {number}" if number != 1 else "edges into the first", edges)]
    return [
        *rows,
        SummaryRow(part, label, cells),
        SummaryRow(part, "  attention weight on it", ("", attention, attention)),
    ]


def _extreme_rows(result: xr.Dataset, reader: str) -> list[SummaryRow]:
    """Return the layers and heads at both ends of the ranking, each with its share in a row below."""
    part = edges_title("Extremes of the self share", result, reader)
    layers = {stream: _rank_layers(result, stream, reader) for stream in STREAMS}
    heads = {
        stream: [(f"L{head.layer} H{head.head}", head.share, head.error) for head in rank_heads(result, stream, reader)]
        for stream in STREAMS
    }
    rows = []
    for what, ranking in {"layer": layers, "head in its group" if shares_keys(result) else "head": heads}.items():
        for end, index in (("largest", -1), ("smallest", 0)):
            extremes = [ranking[stream][index] if ranking[stream] else None for stream in STREAMS]
            names = tuple(place[0] if place else UNKNOWN for place in extremes)
            shares = tuple(share_text(*place[1:], result.sizes["document"]) if place else "" for place in extremes)
            rows += [SummaryRow(part, f"{end}, {what}", names), SummaryRow(part, "  its share", shares)]
    return rows


def _rank_layers(result: xr.Dataset, stream: str, reader: str) -> list[tuple[str, float, float]]:
    """Return name, self share and standard error of the layers whose share is known, smallest share first."""
    shares = stats.shares(result, ("layer",), reader).sel(side="self", stream=stream)
    numbers = zip(shares.layer.values, shares.share.values.tolist(), shares.error.values.tolist(), strict=True)
    layers = [(f"L{layer}", share, error) for layer, share, error in numbers if not math.isnan(share)]
    return sorted(layers, key=lambda layer: layer[1])


def _weight_rows(result: xr.Dataset) -> list[SummaryRow]:
    if "weight_mean" not in result:
        return []
    part = "Gradient of the weights" + (", all edges" if edges_words(result, "all") else "")
    shares = stats.weight_shares(result)
    agreement = shares.agreement.sel(part="whole")
    single = SummaryRow(part, "self share, one window", _cells(lambda s: _percent(shares.sel(stream=s), result)))
    if result.sizes["document"] == 1:
        return [single]  # which is the mean
    return [
        single,
        SummaryRow(part, "self share, mean", _cells(lambda s: share_text(float(shares.share_mean.sel(stream=s))))),
        SummaryRow(part, "agreement of windows", _cells(lambda s: number_text(float(agreement.sel(stream=s))))),
    ]


def _loss_rows(result: xr.Dataset, reader: str) -> list[SummaryRow]:
    """Return the block on own and later losses, as far as they were measured; blank for queries, which nobody reads."""
    part, rows = edges_title("Who pays for keys and values", result, reader), []
    if "loss_credit" in result:
        shares = stats.loss_shares(result, reader_of=reader)
        for loss_part, label in LOSS_PARTS.items():
            cells = (_percent(shares.sel(written=written, part=loss_part), result) for written in WRITTEN)
            rows.append(SummaryRow(part, label, ("", *cells)))
    if "horizon_by_document" in result:
        reach = stats.effective_horizon(result, reader_of=reader)
        ends = int(result.horizon[0]), int(result.horizon[-1])
        cells = (horizon_text(float(reach.sel(stream=stream)), *ends) for stream in WRITTEN)
        rows.append(SummaryRow(part, "effective horizon", ("", *cells)))
    return rows


def rank_heads(result: xr.Dataset, stream: str, reader_of: str = "") -> list[RankedHead]:
    """Rank heads by what their self edges bring, smallest first, without those that `stats.weak_heads` leaves out.

    Args:
        result: A result of `posterity.measure`.
        stream: "query", "key" or "value".
        reader_of: Of which edges, by their key; "" for those that lead (`lead_reader`).
    """
    reader = reader_of or lead_reader(result)
    by_head = (
        stats.group_shares(result, reader) if shares_keys(result) else stats.shares(result, ("layer", "head"), reader)
    )
    shares = by_head.sel(stream=stream, side="self")
    ranked = shares.share.notnull().values & ~stats.weak_heads(result, reader).sel(stream=stream).values
    columns = [shares.share.values, shares.error.values, credit_portions(result, reader).sel(stream=stream).values]
    heads = zip(*ranked.nonzero(), *(values[ranked] for values in columns), strict=True)
    rows = [RankedHead(int(layer), int(head), *map(float, numbers)) for layer, head, *numbers in heads]
    return sorted(rows, key=lambda head: head.share)


def shares_keys(result: xr.Dataset) -> bool:
    """Return True if some heads of a layer read one key and value; False where an older file does not say."""
    if "kv_head" not in result.coords:
        return False
    groups, present = result.kv_head.values, stats.existing_heads(result).values
    return any(len(set(row[mask].tolist())) < mask.sum() for row, mask in zip(groups, present, strict=True))


def credit_portions(result: xr.Dataset, reader_of: str = "all") -> xr.DataArray:
    """Return the credit of each head over an equal part of its layer's credit; dims (layer, head, stream)."""
    credit = sum_readers(result.credit_by_document, reader_of).sum(("document", "side"), skipna=False)
    present = stats.existing_heads(result)
    return credit / credit.where(present, 0.0).sum("head", skipna=False) * present.sum("head")


def share_text(share: float, error: float = math.nan, windows: int = 1) -> str:
    """Format a share in percent, with a mark where it is beyond 0 to 100 %."""
    return percent(share, error, windows) + (BEYOND if share < 0 or share > 1 else "")


def _percent(share: xr.Dataset, result: xr.Dataset) -> str:
    return share_text(float(share.share), float(share.error), result.sizes["document"])
