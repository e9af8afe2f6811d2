"""What the numbers of `posterity.features` say: shares of the parts, and the pull on directions, with their errors."""

import numpy as np
import xarray as xr

from posterity.axes import FEATURE_PARTS
from posterity.results.feature_schema import FEATURES
from posterity.results.ratios import describe, mean_and_error, ratio


def part_shares(features: xr.Dataset) -> xr.Dataset:
    """Return each part's share of the gradient of the parameters, and how far direct and pre-cached part agree.

    A share is the inner product of the part with the whole gradient, over the squared norm of the whole: shares sum to
    1. It is a ratio of sums over documents (`ratios.ratio`).

    Returns:
        `share`, `error` (layer, part), and `cosine`, `cosine_error` (layer) between direct and pre-cached part, means
        over documents; units 1.

    Raises:
        InputError: It is not what `posterity.features` returns.
    """
    gram = FEATURES.check(features).gram
    credit = np.stack([_with_whole(gram, part).values for part in FEATURE_PARTS], -1)
    credit = xr.DataArray(credit, {"layer": gram.layer, "part": [*FEATURE_PARTS]}, ("document", "layer", "part"))
    shares = ratio(credit, credit.sum("part"))
    direct, pre_cached = (gram.sel(pair=part, drop=True) for part in FEATURE_PARTS[:2])
    product = gram.sel(pair=_pair(*FEATURE_PARTS[:2]), drop=True)
    cosine, error = _mean(_cosine(product, direct, pre_cached))
    return shares.assign(
        cosine=describe(cosine, "cosine between direct and pre-cached part"),
        cosine_error=describe(error, "standard error over documents"),
    )


def direction_pulls(features: xr.Dataset) -> xr.Dataset:
    """Return what own and later losses want of each direction.

    Returns:
        Dims (direction): `later_share` and `later_share_error`, the later losses' part of the two squared pulls, a
        ratio of sums over documents; `cosine` and `cosine_error`, between own and later pulls over positions; `own`,
        `own_error`, `later`, `later_error`, the mean pulls in nats per length of 1, positive where gradient descent
        makes the component larger. With an influence `influence` and `influence_error` (direction, part).

    Raises:
        InputError: It is not what `posterity.features` returns.
    """
    pull = FEATURES.check(features).pull
    own, later = (pull.sel(pull_term=f"{name} . {name}", drop=True) for name in ("own", "later"))
    shares = ratio(later, own + later)
    cosine, cosine_error = _mean(_cosine(pull.sel(pull_term="own . later", drop=True), own, later))
    variables = {
        "later_share": describe(shares.share, "share of later losses in the squared pull"),
        "later_share_error": shares.error,
        "cosine": describe(cosine, "cosine between own and later pull over positions"),
        "cosine_error": describe(cosine_error, "standard error over documents"),
    }
    for name in ("own", "later"):
        mean, error = _mean(pull.sel(pull_term=name, drop=True))
        variables[name] = describe(mean, f"mean pull of {name} losses", "nats")
        variables[f"{name}_error"] = describe(error, "standard error over documents", "nats")
    if "influence" in features:
        mean, error = _mean(features.influence)
        variables["influence"] = describe(mean, "change of the mean component per learning rate", "nats")
        variables["influence_error"] = describe(error, "standard error over documents", "nats")
    return xr.Dataset(variables)


def _with_whole(gram: xr.DataArray, part: str) -> xr.DataArray:
    """Return the inner product of a part with the whole gradient."""
    others = [_pair(part, other) for other in FEATURE_PARTS if other != part]
    return gram.sel(pair=[part, *others]).sum("pair")


def _pair(part: str, other: str) -> str:
    first, second = sorted((part, other), key=FEATURE_PARTS.index)
    return f"{first} . {second}"


def _cosine(product: xr.DataArray, left: xr.DataArray, right: xr.DataArray) -> xr.DataArray:
    """Return the cosine of each document; NaN where a norm is 0."""
    norm = (left * right) ** 0.5
    return product / norm.where(norm > 0)


def _mean(values: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    mean, error = mean_and_error(values, values.get_axis_num("document"))
    template = values.isel(document=0, drop=True)
    return template.copy(data=mean), template.copy(data=error)
