"""Plot of what trains the residual stream: parts of the parameters' gradient by layer."""

import xarray as xr
from matplotlib.axes import Axes

from posterity.axes import FEATURE_PARTS
from posterity.palette import LATE, OTHER, SELF
from posterity.plotting.canvas import (
    axes_to_draw,
    draw_legend,
    draw_level,
    draw_line,
    show_percents,
    show_whole_numbers,
)
from posterity.results.feature_parts import part_shares

COLOURS = dict(zip(FEATURE_PARTS, (SELF, OTHER, LATE), strict=True))


def plot_features(features: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw which part of the parameters' gradient goes through the stream in front of each layer.

    Args:
        features: What `posterity.features` returned.
        ax: Axes to draw on.

    Raises:
        InputError: It is something else.
    """
    shares, windows = part_shares(features), features.sizes["document"]
    with axes_to_draw(ax, 2.2) as axes:
        draw_level(axes, 0)
        for (part, colour), marker in zip(COLOURS.items(), "o^s", strict=True):
            share = shares.sel(part=part)
            draw_line(axes, shares.layer, share.share, share.error, windows, colour, part, marker=marker)
        show_whole_numbers(axes.xaxis)
        show_percents(axes.yaxis)
        axes.set(xlabel="layer in front of which the stream is split", ylabel="share of the gradient")
        draw_legend(axes)
    return axes
