"""The Dataset of `posterity.features`: gradients of parameters by path through the residual stream, and validation.

`gram` (document, layer, pair): inner products of the three parts of the gradient of all parameters, in nats^2;
`pull` (document, direction, pull): means over positions of what the own loss and later ones want of a direction;
`influence` (document, direction, part): the change of the mean component along a direction by a step of gradient
descent along each part, per learning rate. `loss` (document), in nats per token.
"""

import numpy as np
import xarray as xr

from posterity.axes import FEATURE_PAIRS, FEATURE_PARTS, PULLS
from posterity.results.kind import Kind, find_variable_flaw

KIND = "features"
DIMS_AND_DTYPES = {  # dimensions, and kinds of numpy's dtypes
    "gram": (("document", "layer", "pair"), "f"),
    "loss": (("document",), "f"),
    "text": (("document",), "UO"),
    "document": (("document",), "iu"),
    "layer": (("layer",), "iu"),
    "pair": (("pair",), "UO"),
}
DIRECTION_DIMS_AND_DTYPES = {  # where directions were given
    "pull": (("document", "direction", "pull_term"), "f"),
    "direction": (("direction",), "UO"),
    "direction_layer": (("direction",), "iu"),
    "pull_term": (("pull_term",), "UO"),
}
INFLUENCE_DIMS_AND_DTYPES = {  # where it was asked for
    "influence": (("document", "direction", "part"), "f"),
    "part": (("part",), "UO"),
}
LABELS = {"pair": FEATURE_PAIRS, "part": FEATURE_PARTS, "pull_term": PULLS}
ATTRS = ("context", "positions", "model", "posterity_version")


def _flaw(features: xr.Dataset) -> str | None:
    """Return the first flaw as half a sentence; None if there is none."""
    expected = DIMS_AND_DTYPES
    expected = expected | (DIRECTION_DIMS_AND_DTYPES if "pull" in features else {})
    expected = expected | (INFLUENCE_DIMS_AND_DTYPES if "influence" in features else {})
    if (flaw := find_variable_flaw(features, expected)) is not None:
        return flaw
    if "influence" in features and "pull" not in features:
        return "it has an influence without directions"
    for name, labels in LABELS.items():
        if name in features.coords and tuple(map(str, features[name].values)) != labels:
            return f"its {name!r} is not {', '.join(labels)}"
    if missing := set(ATTRS) - set(features.attrs):
        return f"it does not say its {min(missing)}"
    numbers = [features[name].values for name in ("gram", "pull", "influence", "loss") if name in features]
    if not all(np.isfinite(values).all() for values in numbers):
        return "it holds a number that is not finite"
    return None


FEATURES = Kind(
    name=KIND,
    expected="what posterity.features returns",
    advice="run posterity.features again",
    expected_file="a file of `posterity features`",
    file_advice="it is damaged: run `posterity features` again",
    find_flaw=_flaw,
)
