"""The colours of every figure by role, each stated once in light and in dark.

Figures are made in the light colours; a page replaces each by its dark one (`DARK`) where the reader's scheme is dark.
Orange stands for self and the own loss, blue for others and later losses, in every figure of one result; several
results, arms, models or quantities of a clause take the colours of `SERIES`. The text around figures has its own in
`reporting/assets/style.css`.
"""

from typing import Any

import numpy as np

DARK: dict[str, str] = {}  # dark colour by light colour
DEPTH_STEPS = 60  # shades between the first and the last layer

Scale = list[tuple[float, str]]


def _role(light: str, dark: str) -> str:
    """Register the dark colour of a light one, and return the light one."""
    assert DARK.setdefault(light, dark) == dark, f"{light} has two dark colours"
    return light


def _scale(light: str, dark: str) -> Scale:
    """Return colours at equal distances from 0 to 1."""
    colours = [_role(*pair) for pair in zip(light.split(), dark.split(), strict=True)]
    return [(index / (len(colours) - 1), colour) for index, colour in enumerate(colours)]


PAPER = _role("#ffffff", "#1a2027")
INK = _role("#1d232b", "#e6e9ec")
SOFT = _role("#59636f", "#a3adb8")  # labels
GRID = _role("#eceae5", "#2a323b")
AXIS = _role("#b9b5ad", "#566270")
EMPTY = _role("#dcdad5", "#4a525c")  # a share that is too small or too uncertain to show

SELF = _role("#c25a00", "#f2a55c")
OTHER = _role("#1c5f9e", "#7db8f0")
LATE = _role("#79b0dc", "#3b6d9c")  # later losses through the self edge
COUNT = _role("#7a828c", "#98a2ad")  # counting edges alone
ATTENTION = _role("#2a8a6a", "#5cc8a2")
MEAN = _role("#8a3f8f", "#d69add")  # means over windows; beyond the largest horizon; against the sum
SERIES = (
    _role("#16806a", "#5cc8a2"), MEAN, _role("#8a6d00", "#d8c55a"), _role("#b03060", "#f08fb0"),
    _role("#4d5c6b", "#a9b6c4"), _role("#3f4fb0", "#9fadff"),
)  # fmt: skip
STREAM = {"query": SERIES[5], "key": SERIES[3], "value": SERIES[2]}  # where all stand on one pair of axes

# Shares from "all of others" to "all of self"; numbers on both sides of zero.
DIVERGING = _scale(
    "#0f4c86 #2f72b0 #6ba3d3 #b3d1e9 #f4f1ea #f8cfa0 #ec9a4a #c9640f #8a3d00",
    "#a9d2f8 #7db8f0 #4a8ecb #2f5f8c #252c34 #6d4a26 #b06f2c #ee9a45 #ffd0a0",
)
SHARE_TICKS = (1, 0, 0.5, 0.15, 0.05, 0.75, 0.3, 0.01)  # on that scale, the first of them first where room is short
# Numbers that grow from zero, effective horizons among them.
SEQUENTIAL = _scale("#f7eeb0 #a9d9a8 #45a9a6 #1f6fa3 #10306b", "#1c3a63 #216f92 #35a58f #9ad07a #fbf0a6")


def share_place(share: Any) -> np.ndarray:
    """Return where shares stand on the scale of `DIVERGING`, from 0 to 1, in every map of shares.

    The scale has room for small shares: a square root up to one half, linear from there. Shares beyond 0 to 1 stand at
    its ends; NaN stays NaN.
    """
    share = np.clip(share, 0, 1)
    return np.where(share < 0.5, np.sqrt(share / 2), share)


def share_at_place(place: Any) -> np.ndarray:
    """Return the shares at places of the scale, from 0 to 1: the inverse of `share_place`."""
    return np.where(np.asarray(place) < 0.5, 2 * np.square(place), place)


def _mixture(colours: tuple[str, ...], fraction: float) -> str:
    """Return the colour between those of a list, at a fraction from 0 to 1."""
    place = fraction * (len(colours) - 1)
    index = min(int(place), len(colours) - 2)
    pairs = zip(*(bytes.fromhex(colour[1:]) for colour in colours[index : index + 2]), strict=True)
    return "#" + bytes(round(low + (place - index) * (high - low)) for low, high in pairs).hex()


_DEPTH = tuple(
    _role(
        _mixture(("#e0b23c", "#1d8a72", "#2b3f9c"), step / DEPTH_STEPS),
        _mixture(("#f0d478", "#3fae93", "#7d8fe8"), step / DEPTH_STEPS),
    )
    for step in range(DEPTH_STEPS + 1)
)


def depth_colour(fraction: float) -> str:
    """Return the colour of a layer at a fraction of the depth, from 0 (first layer) to 1 (last layer)."""
    return _DEPTH[round(fraction * DEPTH_STEPS)]
