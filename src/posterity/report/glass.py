"""One text under the glass: its tokens as they can be seen, and its matrices in a form that a page can carry."""

import base64
import unicodedata

import numpy as np
import xarray as xr

from posterity import result as results

SIGNS = {" ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥"}
MEASURES = ("credit", "norm")


def glass(result: xr.Dataset) -> dict | None:
    """Tokens and matrices of an inspected text; None if the result is of no single text.

    A matrix is base64 of little-endian float32, row by row, of the loss positions but the last (which has no loss) and
    of the positions up to the loss: number t (t + 1) / 2 + j is that of loss t and key j. One string for each layer.
    """
    if "inspect_credit" not in result:
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
    values = values.transpose("written", "layer", "loss_position", "position")
    row, column = np.tril_indices(values.sizes["position"] - 1)
    return {
        written: [_packed(layer[row, column]) for layer in values.sel(written=written).values]
        for written in results.WRITTEN
    }


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()
