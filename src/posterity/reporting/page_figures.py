"""Figures as JSON that a page carries: traces once, layouts for a few widths as what they change.

`theme.js` draws them: it takes the layout for the width and, where the reader's scheme is dark, dark colours for light
ones. Numbers have six digits.
"""

import math
from collections.abc import Mapping
from typing import Any

from posterity.palette import DARK
from posterity.reporting.panel_grid import FULL_WIDTH, PanelGrid
from posterity.reporting.theme import TEMPLATE

WIDTHS = (1040, 840, 620, 460, 340, 280, 240)  # pixels from which a layout is used; the last also below it


def page_figures(grids: Mapping[str, PanelGrid]) -> dict[str, Any]:
    """Return figures by name for a page, with the look that they share.

    `template` and `dark` (dark colour by light colour) are those of all figures. A figure's `data` and `layout` are
    complete, titled and of full width, but for the template; `layouts` are changes of `layout` for the screen, one for
    each of `WIDTHS` (see `find_changes`). `views`, by name, have other numbers for the same traces: `data` are changes.
    """
    return {
        "template": TEMPLATE.to_plotly_json(),
        "dark": DARK,
        "figures": {name: _page_figure(grid) for name, grid in grids.items()},
    }


def _page_figure(grid: PanelGrid) -> dict[str, Any]:
    first = _without_views(grid)
    views = {name: _without_views(view) for name, view in grid.views.items()}
    for view in views.values():
        view["data"] = find_changes(first["data"], view["data"])
    return first | ({"views": views} if views else {})


def _without_views(grid: PanelGrid) -> dict[str, Any]:
    layout = _rounded(grid.layout(FULL_WIDTH, titled=True))
    return {
        "data": _rounded(grid.traces),
        "layout": layout,
        "layouts": [find_changes(layout, _rounded(grid.layout(width))) for width in WIDTHS],
    }


def find_changes(base: Any, other: Any) -> Any:
    """Return what turns `base` into `other`.

    Of a dict by key, with None for a key that goes; of a list of as many dicts by index, as a dict; else `other`.
    """
    if isinstance(base, dict) and isinstance(other, dict):
        changes = {key: find_changes(base.get(key), value) for key, value in other.items() if base.get(key) != value}
        return {key: None for key in base if key not in other} | changes
    lists = isinstance(base, list) and isinstance(other, list) and len(base) == len(other)
    if lists and base and all(isinstance(value, dict) for value in [*base, *other]):
        pairs = enumerate(zip(base, other, strict=True))
        return {str(index): find_changes(*pair) for index, pair in pairs if pair[0] != pair[1]}
    return other


def _rounded(value: Any) -> Any:
    """Return plain lists, dicts and numbers of six digits; None for what is not finite."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() else rounded
