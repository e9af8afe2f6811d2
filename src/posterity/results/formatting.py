"""Numbers and names in words: shares in percent, numbers with their errors, tokens, lists of layers and heads."""

import math

import numpy as np


def named(chosen: np.ndarray, what: str = "layer", most: int = 8) -> str:
    """Parts in words: "layers 0, 3 and 7", "heads L0 H3, L2 H1 and 12 more"; "" for none."""
    at = np.argwhere(chosen)
    if not len(at):
        return ""
    words = [str(one[0]) if len(one) == 1 else f"L{one[0]} H{one[1]}" for one in at]
    if len(words) > most:
        words = [*words[:most], f"{len(words) - most} more"]
    listed = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{what}{'s' * (len(words) > 1)} {listed}"


UNKNOWN = "–"


def percent(share: float, error: float = math.nan) -> str:
    """A share in percent with its standard error, if there is one."""
    if math.isnan(share):
        return UNKNOWN
    digits = 2 if 0 < abs(share) < 0.01 or 0 < error < 0.0005 else 1
    if math.isnan(error):
        return f"{100 * share:.{digits}f} %"
    return f"{100 * share:.{digits}f} ± {100 * error:.{digits}f} %"


def horizon_text(reach: float, smallest: int, largest: int) -> str:
    """An effective horizon in words, given the ends of the curve it was read from."""
    if math.isnan(reach):
        return UNKNOWN
    if math.isinf(reach):
        return f"> {tokens_text(largest)}"
    if reach <= smallest:
        return f"≤ {tokens_text(smallest)}"
    return f"{reach:.1f} tokens" if reach < 10 else tokens_text(reach)


def tokens_text(lag: float) -> str:
    return UNKNOWN if math.isnan(lag) else f"{lag:.0f} token{'s' * (lag != 1)}"


def number_text(value: float) -> str:
    return UNKNOWN if math.isnan(value) else f"{value:.3f}"
