"""The figures of a page of results, by name: what draws each, and the variable that it needs."""

from collections.abc import Callable
from dataclasses import replace

from posterity.reporting.credit_charts import (
    draw_agreement,
    draw_first_position,
    draw_layers,
    draw_positions,
    draw_weights,
)
from posterity.reporting.head_details import draw_head
from posterity.reporting.head_maps import draw_head_horizons, draw_heads
from posterity.reporting.lag_chart import draw_lags
from posterity.reporting.loss_charts import (
    draw_horizons,
    draw_layer_inputs,
    draw_loss_parts,
    draw_loss_positions,
    draw_modules,
)
from posterity.reporting.panel_grid import PanelGrid
from posterity.reporting.price_charts import draw_pair_prices, draw_price_positions, draw_window_prices
from posterity.reporting.reach_chart import draw_reach
from posterity.reporting.result_group import ResultGroup
from posterity.reporting.training_charts import draw_loss_angles, draw_own_shares, draw_self_shares

Draw = Callable[[ResultGroup], PanelGrid]
DrawReaders = Callable[[ResultGroup, str], PanelGrid]

READER_CHARTS: dict[str, tuple[str, DrawReaders]] = {  # with and without the first keys of a document
    "lags": ("credit", draw_lags),
    "map": ("credit", draw_heads),
    "layers": ("credit", draw_layers),
    "loss_parts": ("loss_credit", draw_loss_parts),
    "horizons": ("horizon_by_document", draw_horizons),
    "head_horizons": ("horizon_by_document", draw_head_horizons),
}
CHARTS: dict[str, tuple[str, Draw]] = {
    "head": ("credit", draw_head),
    "reach": ("credit", draw_reach),
    "positions": ("credit", draw_positions),
    "first": ("credit", draw_first_position),
    "weights": ("weight_mean", draw_weights),
    "agreement": ("weight_mean", draw_agreement),
    "inputs": ("loss_credit", draw_layer_inputs),
    "loss_positions": ("loss_credit", draw_loss_positions),
    "modules": ("parameter_by_document", draw_modules),
    "window_prices": ("window_price_by_document", draw_window_prices),
    "pair_prices": ("price_by_document", draw_pair_prices),
    "price_positions": ("price", draw_price_positions),
}
TRAINING_CHARTS: dict[str, tuple[str, Draw]] = {  # of results at several steps
    "training": ("credit", draw_self_shares),
    "training_own": ("loss_credit", draw_own_shares),
    "training_angle": ("loss_credit", draw_loss_angles),
}


def draw_charts(group: ResultGroup) -> dict[str, PanelGrid]:
    """Draw the figures of what was measured, by name."""
    grids = {
        name: _draw_readers(group, draw) for name, (variable, draw) in READER_CHARTS.items() if group.having(variable)
    }
    grids |= {name: draw(group) for name, (variable, draw) in CHARTS.items() if group.having(variable)}
    grids |= {name: draw(group) for name, (variable, draw) in TRAINING_CHARTS.items() if group.over_training(variable)}
    return {name: grid for name, grid in grids.items() if grid.panels}


def _draw_readers(group: ResultGroup, draw: DrawReaders) -> PanelGrid:
    """Draw a figure of the edges that the page begins with; its views are of others too: "all", or "VIEW all"."""
    first, *others = group.readers
    if not others:
        return draw(group, first)
    begin = _annotate(draw(group, first), f"without {group.first_positions}")
    views = dict(begin.views)
    for reader_of in others:
        grid = draw(group, reader_of)
        views |= {reader_of: replace(grid, views={})} | {f"{name} {reader_of}": x for name, x in grid.views.items()}
    return replace(begin, views=views)


def _annotate(grid: PanelGrid, note: str) -> PanelGrid:
    return replace(grid, note=note, views={name: replace(view, note=note) for name, view in grid.views.items()})
