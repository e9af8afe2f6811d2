"""Kinds of modules: what the same module of every layer is called, and what its parameters learn from."""

from collections import Counter
from collections.abc import Iterable

import xarray as xr

from posterity.results import stats

Place = tuple[str, int | None]  # kind and layer; None: in no layer


def shares_by_kind(result: xr.Dataset) -> tuple[list[Place], xr.Dataset]:
    """Return kind and layer of the modules that have parameters, and their `stats.parameter_shares`.

    Modules of one kind in one layer (experts) are added up before the division.
    """
    places = [split_name(str(name)) for name in result.parameter.values]
    groups: dict[Place, list[int]] = {}
    for index, place in enumerate(places):
        groups.setdefault(place, []).append(index)
    terms = result.parameter_by_document
    sums = [terms.isel(parameter=group).sum("parameter", skipna=False) for group in groups.values()]
    labels = _labels({kind for kind, layer in groups if layer is not None})
    shares = stats.parameter_shares(xr.Dataset({"parameter_by_document": xr.concat(sums, "parameter")}))
    return [(kind if layer is None else labels[kind], layer) for kind, layer in groups], shares


def split_name(name: str) -> Place:
    """Split the name of a module into its kind and its layer: the first number in it; None if it has none."""
    words = name.split(".")
    numbers = [word.isascii() and word.isdecimal() and len(word) < 6 for word in words]
    layer = next((int(word) for word, number in zip(words, numbers, strict=True) if number), None)
    return ".".join("*" if number else word for word, number in zip(words, numbers, strict=True)), layer


def _labels(kinds: Iterable[str]) -> dict[str, str]:
    """Shorten each kind to what follows the number of the layer, where no other kind is shortened to the same."""
    short = {kind: kind.partition("*.")[2] or kind for kind in kinds}
    count = Counter(short.values())
    return {kind: label if count[label] == 1 else kind for kind, label in short.items()}
