"""One text under the glass: its tokens as they can be seen, and its matrices in a form that a page can carry."""

import base64
import unicodedata

import numpy as np
import xarray as xr

from posterity.results import schema as results

SIGNS = {" ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥"}
MEASURES = ("credit", "norm")
TOP = 2**15 - 1  # the largest short


def glass(result: xr.Dataset) -> dict | None:
    """Tokens and matrices of an inspected text; None if the result is of no single text.

    A matrix is of the loss positions but the last (which has no loss) and of as many key positions, one string for each
    layer. The string is base64 of little-endian numbers: a float32 for each key, then, row by row of the lower
    triangle, an int16 for each loss and key, to be multiplied by the number of its key. So it has half the size of
    float32, and rounds to 2^-16 of the key's largest part.
    """
    if "inspect_credit" not in result or result.sizes["position"] < 2:
        return None
    return {
        "tokens": [visible(str(token)) for token in result.token.values],
        **{measure: _matrices(result[f"inspect_{measure}"]) for measure in MEASURES},
    }


def visible(token: str) -> str:
    """The token with a sign in place of every character that shows as nothing or that turns the writing direction."""
    shown = "".join(_sign(letter) for letter in token)
    if token and unicodedata.category(token[0]).startswith("M"):  # a mark needs something to stand on
        return "◌" + shown
    return shown or "∅"


def _sign(letter: str) -> str:
    if letter in SIGNS:
        return SIGNS[letter]
    if ord(letter) < 0x20:
        return chr(0x2400 + ord(letter))
    if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"):
        return f"⟨U+{ord(letter):04X}⟩"
    return letter


def _matrices(values: xr.DataArray) -> dict[str, list[str]]:
    """For each stream the matrices of all layers."""
    losses = values.transpose("written", "layer", "loss_position", "position")[..., :-1, :-1]
    return {written: [_packed(layer) for layer in losses.sel(written=written).values] for written in results.WRITTEN}


def _packed(values: np.ndarray) -> str:
    scale = (np.abs(values).max(0) / TOP).astype("<f4")  # NaN where a number of the key is not known
    shorts = np.nan_to_num(np.rint(values / np.where(scale > 0, scale, 1)), posinf=0, neginf=0)
    lower = shorts[np.tril_indices(len(values))].clip(-TOP, TOP).astype("<i2")
    return base64.b64encode(scale.tobytes() + lower.tobytes()).decode()
