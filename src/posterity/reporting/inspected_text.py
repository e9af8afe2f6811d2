"""One text under the glass: its tokens as they can be seen, and its matrices in a form that a page can carry."""

import base64
import unicodedata

import numpy as np
import xarray as xr

from posterity.axes import WRITTEN
from posterity.palette import MEAN, OTHER, PAPER, SELF
from posterity.reporting.html import displayable
from posterity.reporting.reader_table import pack_reader_lags

SIGNS = {" ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥"}
MEASURES = ("credit", "norm")
LARGEST_SHORT = 2**15 - 1
COLOURS = {"paper": PAPER, "own": SELF, "other": OTHER, "against": MEAN}  # against: of a part against the sum


def pack_inspected_text(result: xr.Dataset, name: str = "") -> dict | None:
    """Return tokens and matrices of an inspected text; None if the result is of no single text.

    A matrix is of the loss positions but the last (which has no loss) and of as many key positions, one string for each
    layer. The string is base64 of little-endian numbers: a float32 for each key, then, row by row of the lower
    triangle, an int16 for each loss and key, to be multiplied by the number of its key. So it has half the size of
    float32, and rounds to 2^-16 of the key's largest part.
    """
    if "inspect_credit" not in result or result.sizes["position"] < 2:
        return None
    return {
        "name": displayable(name),
        "colours": COLOURS,
        "tokens": [visible_token(str(token)) for token in result.token.values],
        "reader_lags": pack_reader_lags(result),
        **{measure: _matrices(result[f"inspect_{measure}"]) for measure in MEASURES},
    }


def visible_token(token: str) -> str:
    """Return the token with a sign for every character that shows as nothing or that turns the writing direction."""
    text = "".join(_sign(letter) for letter in token)
    if token and unicodedata.category(token[0]).startswith("M"):  # a mark needs something to stand on
        return "◌" + text
    return text or "∅"


def _sign(letter: str) -> str:
    if letter in SIGNS:
        return SIGNS[letter]
    if ord(letter) < 0x20:
        return chr(0x2400 + ord(letter))
    if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"):
        return f"⟨U+{ord(letter):04X}⟩"
    return letter


def _matrices(values: xr.DataArray) -> dict[str, list[str]]:
    """Return for each stream the matrices of all layers."""
    losses = values.transpose("written", "layer", "loss_position", "position")[..., :-1, :-1]
    return {written: [_pack(layer) for layer in losses.sel(written=written).values] for written in WRITTEN}


def _pack(values: np.ndarray) -> str:
    scale = (np.abs(values).max(0) / LARGEST_SHORT).astype("<f4")  # NaN where a number of the key is not known
    shorts = np.nan_to_num(np.rint(values / np.where(scale > 0, scale, 1)), posinf=0, neginf=0)
    lower = shorts[np.tril_indices(len(values))].clip(-LARGEST_SHORT, LARGEST_SHORT).astype("<i2")
    return base64.b64encode(scale.tobytes() + lower.tobytes()).decode()
