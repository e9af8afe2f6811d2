"""The Dataset of an eviction: what it costs to drop cached keys and values by different scores, and validation.

`divergence` and `loss_change` (document, scorer, budget, kept), in nats per token; `correlation` (document, scorer),
rank correlation of a score with the measured price; `loss` (document), of the model with all its pairs.
"""

import numpy as np
import xarray as xr

from posterity.results.kind import Kind, find_variable_flaw

KIND = "eviction"
MODEL, LAYER, EQUAL = BUDGETS = ("one threshold", "by layer", "equal")
BUDGET_OPTIONS: dict[str, str] = dict(
    zip(("model", "layer", "equal"), BUDGETS, strict=True)
)  # as the command line says them
DIMS_AND_DTYPES = {  # dimensions, and kinds of numpy's dtypes
    "divergence": (("document", "scorer", "budget", "kept"), "f"),
    "loss_change": (("document", "scorer", "budget", "kept"), "f"),
    "correlation": (("document", "scorer"), "f"),
    "loss": (("document",), "f"),
    "text": (("document",), "UO"),
    "document": (("document",), "iu"),
    "scorer": (("scorer",), "UO"),
    "budget": (("budget",), "UO"),
    "kept": (("kept",), "f"),
}
ATTRS = ("prefix", "continuation", "model", "posterity_version")


def _flaw(eviction: xr.Dataset) -> str | None:
    """Return the first flaw as half a sentence; None if there is none."""
    if (flaw := find_variable_flaw(eviction, DIMS_AND_DTYPES)) is not None:
        return flaw
    if missing := set(ATTRS) - set(eviction.attrs):
        return f"it does not say its {min(missing)}"
    if not set(map(str, eviction.budget.values)) <= set(BUDGETS):
        return f"its budgets are none of {', '.join(BUDGETS)}"
    kept = eviction.kept.values
    if not ((kept > 0) & (kept <= 1)).all() or (np.diff(kept) >= 0).any():
        return "its shares do not fall from 1 at most, above 0"
    if any(np.isinf(eviction[name].values).any() for name in ("divergence", "loss_change", "loss")):
        return "it holds an infinite number"
    return None


EVICTION = Kind(
    name=KIND,
    expected="an eviction as posterity.evict returns it",
    advice="run posterity.evict again",
    expected_file="a file of `posterity evict`",
    file_advice="it is damaged: run `posterity evict` again",
    find_flaw=_flaw,
)
