"""Results as a page: sentence, five numbers, pictures, table, rankings, provenance, side by side."""

import math
from collections.abc import Container, Sequence

import xarray as xr

from posterity.axes import STREAMS
from posterity.reporting.charts import draw_charts
from posterity.reporting.head_details import head_details
from posterity.reporting.head_maps import share_by_counting
from posterity.reporting.html import render_page
from posterity.reporting.inspected_text import pack_inspected_text
from posterity.reporting.key_numbers import key_numbers
from posterity.reporting.page_figures import page_figures
from posterity.reporting.reach_chart import reach_tables
from posterity.reporting.result_group import NamedResult, ResultGroup
from posterity.reporting.result_table import RankedHead, rank_heads, row_notes, share_text, summary_rows
from posterity.reporting.result_words import (
    WEAK_WORDS,
    edges_words,
    heading,
    lead_reader,
    mean_loss,
    reading_notes,
    verdict_sentence,
)
from posterity.reporting.tables import chart_tables
from posterity.results.netcdf import portable_value
from posterity.results.ratios import ENOUGH_WINDOWS, MIN_WINDOWS, has_fine_lags
from posterity.results.stats import balance

EXTREMES = 5  # heads at each end of the ranking
TEXTS = 12  # texts by name
INSPECTED_SCRIPTS = ("inspected_numbers.js", "inspected_words.js", "inspected_elements.js", "inspected_text.js")


def render_results(results: Sequence[xr.Dataset], names: Sequence[str] = (), files: Sequence[str] = ()) -> str:
    """Return the page as one string of HTML; names and files as in `ResultGroup.of`."""
    group = ResultGroup.of(results, names, files)
    grids = draw_charts(group)
    members = [_describe(member, group.readers) for member in group.members]
    inspected = [text for member in group.members if (text := pack_inspected_text(member.result, member.name))]
    without_lags = [member.name for member in group.members if not has_fine_lags(member.result)]
    windows = max(member.result.sizes["document"] for member in group.members)
    titles = {name: grid.title for name, grid in grids.items()}
    has = {name for member in members for name in member["tables"]}
    return render_page(
        "result.html.j2",
        page_figures(grids) | {"inspected_texts": inspected, "heads": head_details(group), "streams": STREAMS},
        styles=["inspected_text.css"] if inspected else [],
        scripts=[*(["heads.js"] if "map" in titles else []), *(INSPECTED_SCRIPTS if inspected else [])],
        results=members, streams=STREAMS, titles=titles, has=has, inspected=bool(inspected),
        same_counts=not math.isnan(share_by_counting(group.members, group.readers[0])), without_lags=without_lags,
        weak=WEAK_WORDS,
        min_windows=MIN_WINDOWS, enough_windows=ENOUGH_WINDOWS,
        readers=group.readers if len(group.readers) > 1 else (), first_positions=group.first_positions,
        several_windows=windows >= MIN_WINDOWS,
        index=_index(titles, has, bool(inspected)),
    )  # fmt: skip


def _index(titles: Container[str], has: set[str], inspected: bool) -> list[tuple[str, str]]:
    """Return the parts of the page: anchor and words."""
    parts = {
        "answer": ("The answer", True),
        "reach": ("Reach", "reach" in titles),
        "lags": ("By lag", "lags" in titles),
        "map": ("Heads", "map" in titles),
        "who": ("Who pays", bool(has & {"loss_parts", "modules", "rest", "horizons"})),
        "prices": ("Prices", "pair_prices" in titles),
        "inspected": ("One text", inspected),
        "over-training": ("Over training", "training" in has),
        "more": ("Layers, positions, weights", True),
        "heads": ("Extremes", True),
        "how": ("How to read this", True),
    }
    return [(anchor, words) for anchor, (words, shown) in parts.items() if shown]


def _describe(member: NamedResult, readers: Sequence[str]) -> dict:
    """Return what the template shows of one result as text and tables."""
    result = member.result
    title, *details = heading(result)
    shown = readers if len(readers) > 1 else (lead_reader(result),)
    return {
        "name": member.name,
        "model": title,
        "details": details,
        "views": [_view(result, reader_of) for reader_of in shown],
        "provenance": _provenance(result),
        "texts": _texts(result),
        "tables": chart_tables(member.over_steps, readers) | reach_tables(result),
    }


def _view(result: xr.Dataset, reader_of: str) -> dict:
    """Return what the page says of these edges, by their key, besides its charts and their tables."""
    rows = summary_rows(result, reader_of)
    return {
        "reader_of": reader_of,
        "sentence": verdict_sentence(result, reader_of),
        "caption": _edges_caption(result, reader_of),
        "key_numbers": key_numbers(result, reader_of),
        "rows": rows,
        "notes": [*reading_notes(result, reader_of), *row_notes(result, rows)],
        "heads": {stream: _extremes(result, rank_heads(result, stream, reader_of)[::-1]) for stream in STREAMS},
    }


def _edges_caption(result: xr.Dataset, reader_of: str) -> str:
    """Say which edges the five numbers are of; "" where a result has no others."""
    words = edges_words(result, reader_of)
    if not words or reader_of == "all":
        return words and "Of all edges, the first positions counted:"
    return f"{words[0].upper()}{words[1:]}:"


def _extremes(result: xr.Dataset, heads: list[RankedHead]) -> list[dict | None]:
    """Return the first and the last few of the ranking as text; None stands for those between them."""
    cells: list[dict | None] = []
    for head in heads:
        name = f"layer {head.layer}, head {head.head}"
        share = share_text(head.share, head.error, result.sizes["document"])
        cells.append({"name": name, "share": share, "portion": f"{head.portion:.2f}"})
    return cells if len(cells) <= 2 * EXTREMES + 1 else [*cells[:EXTREMES], None, *cells[-EXTREMES:]]


def _provenance(result: xr.Dataset) -> list[tuple[str, str]]:
    attrs = [
        (str(name).replace("_", " "), str(portable_value(value)))
        for name, value in result.attrs.items()
        if name != "tidy"
    ]
    imbalance = ("accounts disagree by at most", f"{float(balance(result).max()):.1e} of a layer")
    return [*((name, value) for name, value in attrs if value), imbalance]


def _texts(result: xr.Dataset) -> list[tuple[str, int, str]]:
    """Return texts in the order of the windows: name, windows, mean loss; the last row counts those left out."""
    names = [str(name) for name in result.text.values]
    unique = list(dict.fromkeys(names))
    rows = []
    for name in unique[:TEXTS]:
        windows = result.isel(document=[other == name for other in names])
        rows.append((name, names.count(name), mean_loss(windows)))
    rest = unique[TEXTS:]
    return [*rows, (f"{len(rest)} more texts", sum(map(names.count, rest)), "")] if rest else rows
