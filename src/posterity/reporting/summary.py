"""The summary of a result: one table for terminal, notebook and page, and one sentence in plain words."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import xarray as xr
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posterity.reporting.audit_table import print_audit
from posterity.reporting.comparison_table import print_comparison
from posterity.results import schema as results
from posterity.results import stats as derived
from posterity.results import steps
from posterity.results.audit_schema import AUDIT
from posterity.results.comparison_schema import COMPARISON
from posterity.results.formatting import UNKNOWN, horizon_text, number_text, percent, tokens_text
from posterity.results.kind import kind_name
from posterity.results.schema import RESULT

PAYERS = {"own": "own loss", "self later": "self edge, later losses", "future": "future edges"}  # parts, in words
TRUSTED = 1e-3  # accounts that disagree by more than this are reported as broken (float32 gives about 1e-6)


@dataclass(frozen=True)
class Row:
    """One line of the table: a label and one cell for each stream; `part` says which block of the table it is in."""

    part: str
    label: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Head:
    """One head's self share of one stream; `portion` is its credit over an equal part of its layer's credit."""

    layer: int
    head: int
    share: float
    error: float
    portion: float


def summary(result: xr.Dataset, console: Console | None = None) -> None:
    """Print table and sentence, in a terminal (from 80 columns) or a notebook; of several steps, those of the last.

    Of an audit, the table of its clauses; of a comparison, that of its arms.

    Raises:
        InputError: It is no result.
    """
    if kind_name(result) == AUDIT.name:
        print_audit(result, console)
        return
    if kind_name(result) == COMPARISON.name:
        print_comparison(result, console)
        return
    result = steps.latest(RESULT.check(result))
    console = console or Console(highlight=False)
    title, *details = heading(result)
    console.print(Text(title, style="bold"), *map(Text, details), sep="\n")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("", overflow="fold")
    for stream in results.STREAMS:
        table.add_column(stream, justify="right", no_wrap=True)
    part = ""
    for row in rows(result):
        if row.part != part:
            part = row.part
            if table.row_count:
                table.add_section()
            table.add_row(Text(part, style="bold"))
        table.add_row(Text("  " + row.label), *map(Text, row.cells))
    console.print(table)
    console.print()
    console.print(Text(sentence(result)))
    for note in notes(result):
        console.print(Text(note, style="dim"))


def heading(result: xr.Dataset) -> tuple[str, ...]:
    """Model, text and amounts in three short lines."""
    attrs = {name: str(results.plain(value)) for name, value in result.attrs.items()}
    parameters = f"{int(attrs['parameters']):,} parameters" if attrs.get("parameters", "").isdecimal() else ""
    windows, context = result.sizes["document"], result.sizes["position"]
    step = f"after {int(attrs['step']):,} steps" if attrs.get("step", "").isdecimal() else ""
    made = (attrs.get("architecture"), parameters, attrs.get("dtype"), step)
    amount = f"{windows} window{'s' * (windows != 1)} of {attrs.get('context') or context} tokens"
    read = (text_name(result), amount, f"loss {mean_loss(result)}")
    return model_name(result), *(" · ".join(part for part in line if part) for line in (made, read) if any(line))


def model_name(result: xr.Dataset) -> str:
    """Name of the model, or words that stand for it."""
    return str(results.plain(result.attrs.get("model"))) or "the model"


def text_name(result: xr.Dataset) -> str:
    """Name of the text: the attribute, or the names of the windows' texts, or their number if that is long."""
    names = sorted(set(map(str, result.text.values)))
    name = str(results.plain(result.attrs.get("text_name"))) or "; ".join(names)
    return name if len(names) == 1 or len(name) <= 80 else f"{len(names)} texts"


def mean_loss(result: xr.Dataset) -> str:
    """Mean loss over all tokens whose loss is known, in words."""
    known = result.loss.notnull() & (result.tokens > 0)
    number, windows = int(known.sum()), result.sizes["document"]
    if not number:
        return "unknown"
    loss = float((result.loss * result.tokens).where(known).sum() / result.tokens.where(known).sum())
    return f"{loss:.3f} nats per token" + (f" (known for {number} of {windows} windows)" if number < windows else "")


def rows(result: xr.Dataset) -> list[Row]:
    """The table, one cell per stream in the order of `results.STREAMS`."""
    sides, counted = derived.shares(result), derived.counts(result)
    first = derived.first_position(result)
    median = derived.median_lag(derived.profile(result).share)
    count_median = tokens_text(float(derived.median_lag(counted)))
    own_counted = float(counted.isel(lag=0))
    by_layer = derived.shares(result, ("layer",)).share.sel(side="self")
    ranked = {stream: ranked_heads(result, stream) for stream in results.STREAMS}
    on_first = percent(float(derived.attention_first(result)))

    def each(cell: Callable[[str], str]) -> tuple[str, ...]:
        return tuple(cell(stream) for stream in results.STREAMS)

    def of_side(side: str) -> tuple[str, ...]:
        return each(lambda stream: _share(sides.sel(stream=stream, side=side)))

    credit, layers, heads = "Credit of the gradient", "Extremes of the self share", "Gradient of the weights"
    table = [
        Row(credit, "self share", of_side("self")),
        Row(credit, "  by counting alone", each(lambda _: percent(own_counted))),
        Row(credit, "other share", of_side("other")),
        Row(credit, "median lag of the credit", each(lambda stream: tokens_text(float(median.sel(stream=stream))))),
        Row(credit, "  by counting alone", each(lambda _: count_median)),
        Row(credit, "share of first position", each(lambda stream: _share(first.sel(stream=stream)))),
        Row(credit, "  attention weight on it", ("", on_first, on_first)),
        Row(layers, "largest, layer", each(lambda stream: _layer(by_layer.sel(stream=stream), -1))),
        Row(layers, "smallest, layer", each(lambda stream: _layer(by_layer.sel(stream=stream), 0))),
        Row(layers, "largest, head", each(lambda stream: _head(ranked[stream], -1))),
        Row(layers, "smallest, head", each(lambda stream: _head(ranked[stream], 0))),
    ]
    if "weight_mean" in result:
        found = derived.weights(result)
        whole = found.agreement.sel(part="whole")
        table += [
            Row(heads, "self share, one window", each(lambda stream: _share(found.sel(stream=stream)))),
            Row(heads, "self share, mean", each(lambda s: percent(float(found.share_mean.sel(stream=s))))),
            Row(heads, "agreement of windows", each(lambda stream: number_text(float(whole.sel(stream=stream))))),
        ]
    return table + _payers(result)


def _payers(result: xr.Dataset) -> list[Row]:
    """The block on own and later losses, as far as they were measured."""
    block, table = "Who pays for keys and values", []
    if "loss_credit" in result:
        found = derived.who_pays(result)
        for part, label in PAYERS.items():
            cells = (_share(found.sel(written=written, part=part)) for written in results.WRITTEN)
            table.append(Row(block, label, ("", *cells)))
    if "horizon_by_document" in result:
        reach = derived.effective_horizon(result)
        ends = int(result.horizon[0]), int(result.horizon[-1])
        cells = (horizon_text(float(reach.sel(stream=stream)), *ends) for stream in results.STREAMS)
        table.append(Row(block, "effective horizon", tuple(cells)))
    return table


def ranked_heads(result: xr.Dataset, stream: str) -> list[Head]:
    """Heads by their self share, smallest first, without those that `derived.weak` leaves out."""
    found = derived.shares(result, ("layer", "head")).sel(stream=stream, side="self")
    ranked = found.share.notnull().values & ~derived.weak(result).sel(stream=stream).values
    values = [portions(result).sel(stream=stream).values, found.error.values, found.share.values]
    portion, error, share = ([float(one) for one in value[ranked]] for value in values)
    layer, head = (index.tolist() for index in ranked.nonzero())
    return sorted(map(Head, layer, head, share, error, portion), key=lambda one: one.share)


def portions(result: xr.Dataset) -> xr.DataArray:
    """Credit of each head over an equal part of its layer's credit; dims (layer, head, stream)."""
    credit = result.credit_by_document.sum(("document", "side"), skipna=False)
    return (
        credit
        / credit.where(derived.present(result), 0.0).sum("head", skipna=False)
        * derived.present(result).sum("head")
    )


def sentence(result: xr.Dataset) -> str:
    """One sentence on whom the keys and values are written for, with the numbers that say so."""
    sides = derived.shares(result).sel(side="other")
    share = {stream: float(sides.share.sel(stream=stream)) for stream in ("key", "value")}
    error = {stream: float(sides.error.sel(stream=stream)) for stream in ("key", "value")}
    known = [stream for stream in share if not math.isnan(share[stream])]
    if not known:
        return f"For whom {model_name(result)} writes its keys and values cannot be said: the credit is not known."
    verdicts = {stream: _verdict(share[stream], error[stream]) for stream in known}
    if len(set(verdicts.values())) == 1:
        claim = f"its {'s and '.join(known)}s {verdicts[known[0]]}"
    else:
        claim = " and ".join(f"its {stream}s {verdict}" for stream, verdict in verdicts.items())
    parts = [f"{percent(share[stream], error[stream])} of the credit of the {stream}s" for stream in known]
    counted = derived.counts(result)
    alone = percent(1 - float(counted.isel(lag=0)))
    told = (
        f"{model_name(result)} writes {claim}: {' and '.join(parts)} comes from queries at later positions, "
        f"where counting the edges alone would give {alone}"
    )
    median = derived.median_lag(derived.profile(result).share)
    lags = [(stream, float(median.sel(stream=stream))) for stream in known]
    reached = [f"lag {lag:.0f} for the {stream}s" for stream, lag in lags if not math.isnan(lag)]
    if reached:
        middle = float(derived.median_lag(counted))
        told += f"; half of the credit is reached at {' and at '.join(reached)}"
        told += "" if math.isnan(middle) else f" (counting alone: lag {middle:.0f})"
    return told + "."


def notes(result: xr.Dataset) -> list[str]:
    """What a reader must know to judge the table, and what is wrong with it."""
    windows = result.sizes["document"]
    one = "One window: there are no standard errors."
    told = [f"± is one standard error over {windows} windows." if windows > 1 else one]
    left_out = int((derived.weak(result) & derived.present(result)).sum())
    if left_out:
        ranked = int(derived.present(result).sum()) * len(results.STREAMS)
        told.append(f"Not ranked: {left_out} of {ranked} heads x streams, of small, negative or uncertain credit.")
    unknown = int(derived.shares(result, ("layer",)).share.isel(side=0).isnull().sum())
    if unknown:
        told.append(
            f"{unknown} of {result.sizes['layer'] * 3} layers x streams have no share: credit zero or not known."
        )
    off = float(derived.balance(result).max())
    if off > TRUSTED:
        told.append(f"Warning: the accounts of the credit disagree by up to {off:.1g} of a layer's credit.")
    return told


def _verdict(share: float, error: float) -> str:
    """For whom most of the credit is, in words; undecided within two standard errors of one half."""
    if abs(share - 0.5) <= (0.0 if math.isnan(error) else 2 * error):
        return "about equally for later readers and for their own position"
    return "mostly for later readers" if share > 0.5 else "mostly for their own position"


def _share(found: xr.Dataset) -> str:
    return percent(float(found.share), float(found.error))


def _layer(share: xr.DataArray, index: int) -> str:
    known = share.dropna("layer")
    if not known.size:
        return UNKNOWN
    one = known.sortby(known)[index]
    return f"L{int(one.layer)} {percent(float(one))}"


def _head(heads: list[Head], index: int) -> str:
    return f"L{heads[index].layer} H{heads[index].head} {percent(heads[index].share)}" if heads else UNKNOWN
