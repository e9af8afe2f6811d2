"""Values as text and as JSON: numbers with their errors, shares in percent, tokens, lists of layers."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from posterity.results.ratios import ENOUGH_WINDOWS, MIN_WINDOWS, uncertainty

UNKNOWN = "–"  # stands for a value that is not known


def value_with_error(
    value: float, error: float = math.nan, empty: str = UNKNOWN, *, windows: int = ENOUGH_WINDOWS
) -> str:
    """Format a number with as many digits as its error allows, four significant ones without: "0.123 ± 0.004".

    Args:
        value: The number.
        error: Its standard error; NaN for none.
        empty: The text for a value that is not finite.
        windows: How many windows the error is taken over; what stands behind the ± is `stats.uncertainty` of it.
    """
    if not math.isfinite(value):
        return empty
    if error == 0 and windows >= MIN_WINDOWS:
        return f"{value_with_error(value)} ± 0"
    error = uncertainty(error, windows)
    if not math.isfinite(error) or error <= 0:
        return minus(f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e5 else f"{value + 0.0:.4g}")
    digits = max(0, 1 - math.floor(math.log10(error)))
    if digits > 6 or abs(value) >= 1e6:
        return f"{minus(f'{value:.2e}')} ± {error:.1e}"
    return f"{decimals(value, digits)} ± {error:.{digits}f}"


def fixed_with_error(value: float, error: float, sign: str = "") -> str:
    """Format a number to four decimals, with its standard error where there is one; sign="+" shows every sign."""
    return decimals(value, 4, sign) + ("" if math.isnan(error) else f" ± {error:.4f}")


def percent(share: float, error: float = math.nan, windows: int = ENOUGH_WINDOWS) -> str:
    """Format a share in percent, with an error where there is one: "12.3 ± 0.4 %".

    Args:
        share: The share, units 1.
        error: Its standard error; NaN for none.
        windows: How many windows the error is taken over; what stands behind the ± is `stats.uncertainty` of it.
    """
    if math.isnan(share):
        return UNKNOWN
    error = uncertainty(error, windows)
    digits = 2 if 0 < abs(share) < 0.01 or 0 < error < 0.0005 else 1
    if math.isnan(error):
        return f"{decimals(100 * share, digits)} %"
    return f"{decimals(100 * share, digits)} ± {100 * error:.{digits}f} %"


def decimals(value: float, digits: int, sign: str = "") -> str:
    """Format a number to some decimals with a true minus, and none before a zero; sign="+" shows every sign."""
    return minus(f"{round(value, digits) + 0.0:{sign}.{digits}f}")


def minus(text: str) -> str:
    """Return the text of a number with a minus in place of the hyphen before it."""
    return "−" + text[1:] if text.startswith("-") else text


def error_words(windows: int, unit: str = "window") -> str:
    """Say in one sentence what stands behind the ± of numbers over so many windows.

    Args:
        windows: How many.
        unit: What one of them is called.
    """
    if windows >= ENOUGH_WINDOWS:
        return f"± is one standard error over {windows} {unit}s."
    if windows >= MIN_WINDOWS:
        return f"± is half the 95 % interval (Student's t) over {windows} {unit}s: few, so that it is wide and rough."
    if windows == 1:
        return f"One {unit}: there are no errors."
    return f"{windows} {unit}s: no error worth printing."


def horizon_text(reach: float, smallest: int, largest: int) -> str:
    """Format an effective horizon, given the smallest and the largest horizon of the curve it was read from."""
    if math.isnan(reach):
        return UNKNOWN
    if math.isinf(reach):
        return f"> {tokens_text(largest)}"
    if reach <= smallest:
        return f"≤ {tokens_text(smallest)}"
    return f"{reach:.1f} tokens" if reach < 10 else tokens_text(reach)


def first_positions_text(sinks: int) -> str:
    """Name the first positions of a document that a result tells apart: "the first 4 positions"; "" for none."""
    return "" if sinks == 0 else "the first position" if sinks == 1 else f"the first {sinks:,} positions"


def tokens_text(number: float) -> str:
    """Format a number of tokens: "1 token", "12 tokens"."""
    return UNKNOWN if math.isnan(number) else f"{number:.0f} token{'s' * (number != 1)}"


def number_text(value: float) -> str:
    """Format a number to three decimals."""
    return UNKNOWN if math.isnan(value) else decimals(value, 3)


def left_out_text(attrs: Mapping[str, Any]) -> str:
    """Say which part of the documents is in no window: "left out: 2 of 9 documents, 31 of 4,064 tokens"; "" for none.

    Args:
        attrs: The counts of `posterity.inputs.windows.Coverage`, as attributes of a result.
    """
    counts = [attrs.get(f"{unit}_{part}") for unit in ("documents", "tokens") for part in ("left_out", "read")]
    if not all(type(count) is int for count in counts) or (not counts[0] and not counts[2]):
        return ""
    documents, tokens = (f"{left_out:,} of {read:,}" for left_out, read in (counts[:2], counts[2:]))
    without = attrs.get("windows_without_answers")
    answers = f", {without:,} window{'s' * (without != 1)} without an answer among them" if without else ""
    windows = attrs.get("limit")
    end = f"; reading ended at the limit of {windows:,} window{'s' * (windows != 1)}" if type(windows) is int else ""
    return f"left out: {documents} documents, {tokens} tokens{answers}{end}"


def list_parts(mask: np.ndarray, noun: str = "layer", most: int = 8) -> str:
    """Name the True entries of a mask (layer,) or (layer, head): "layers 0, 3 and 7", "heads L0 H3 and 12 more".

    Args:
        mask: Which parts are named.
        noun: What one part is called.
        most: How many are named before the rest is counted.

    Returns:
        The names; "" for none.
    """
    indices = np.argwhere(mask)
    if not len(indices):
        return ""
    names = [str(index[0]) if len(index) == 1 else f"L{index[0]} H{index[1]}" for index in indices]
    if len(names) > most:
        names = [*names[:most], f"{len(names) - most} more"]
    sequence = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{noun}{'s' * (len(names) > 1)} {sequence}"


def json_numbers(values: Any, digits: int | None = None) -> Any:
    """Return numbers of any dimensions as nested lists for JSON; None for NaN and infinity.

    Args:
        values: What numpy makes an array of.
        digits: Significant digits to round to; None keeps all.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(entry) for entry in value]
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")

    return convert(np.asarray(values, dtype=float).tolist())
