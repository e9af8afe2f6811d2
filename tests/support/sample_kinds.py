"""A synthetic audit, comparison and eviction, and a result as a file of an earlier version gives it."""

import numpy as np
import xarray as xr

from posterity.axes import FEATURE_PAIRS, FEATURE_PARTS, PULLS
from posterity.results.feature_schema import FEATURES
from posterity.results.schema import RESULT

CLAUSES = {1: "Look-back", 3: "Readers", 6: "More useful later than now"}
MEASURES = {  # of which clause, units
    "query credit from the past": (1, "1"),
    "readers of a key by attention": (3, "queries"),
    "readers of a key by value credit": (3, "queries"),
    "loss with self edges only": (6, "nats per token"),
    "positions worth more later": (6, "1"),
}


def sample_audit(models=("tiny/sample", "random weights"), seed=0) -> xr.Dataset:
    """Build an audit of three clauses; one figure has no error, one no baseline, one is not known."""
    random = np.random.default_rng(seed)
    shape = (len(models), len(MEASURES))
    figure, error, baseline = random.random(shape), random.random(shape) / 10, random.random(shape)
    error[:, 1], baseline[:, 3], figure[-1, 4] = np.nan, np.nan, np.nan
    verdicts = np.array([["holds", "fails", "mixed"], ["holds", "holds", "not measured"]])[: len(models)]
    empty = [""] * len(MEASURES)
    of_clause, units = zip(*MEASURES.values(), strict=True)
    return xr.Dataset(
        {
            "figure": (("model", "measure"), figure), "error": (("model", "measure"), error),
            "baseline": (("model", "measure"), baseline), "verdict": (("model", "clause"), verdicts),
            "reason": (("model", "clause"), np.full(verdicts.shape, "so it is")),
            "name": ("clause", list(CLAUSES.values())), "statement": ("clause", ["it does"] * 3),
            "formula": ("measure", empty), "expected": ("measure", empty), "units_of": ("measure", list(units)),
        },
        {"model": list(models), "clause": list(CLAUSES), "measure": list(MEASURES),
         "of_clause": ("measure", list(of_clause))},
        {"kind": "audit", "kind_version": 1},
    )  # fmt: skip


def sample_comparison(seeds=2, documents=3, positions=5) -> xr.Dataset:
    """Build a comparison of plain and myopic runs."""
    random = np.random.default_rng(0)
    arms = ["vanilla", "myopic"]
    loss = 3 + random.random((2 * seeds, documents, positions))
    return xr.Dataset(
        {
            "loss": (("run", "document", "position"), loss, {"units": "nats"}),
            "folder": ("run", [f"run{index}" for index in range(2 * seeds)]),
            "arm": ("run", np.repeat(arms, seeds)), "seed": ("run", np.tile(np.arange(seeds), 2)),
        },
        {"document": np.arange(documents), "position": np.arange(positions)},
        {"kind": "comparison", "data": "text", "steps": 1},
    )  # fmt: skip


def sample_eviction(documents=4) -> xr.Dataset:
    """Build an eviction by two scores, under two budgets, at two shares."""
    random = np.random.default_rng(0)
    dims = ("document", "scorer", "budget", "kept")
    numbers = random.random((2, documents, 2, 2, 2)) / 10
    return xr.Dataset(
        {
            "divergence": (dims, numbers[0], {"units": "nats per token"}),
            "loss_change": (dims, numbers[1] - 0.02, {"units": "nats per token"}),
            "correlation": (dims[:2], random.random((documents, 2)), {"units": "1"}),
            "loss": ("document", 2 + random.random(documents), {"units": "nats per token"}),
        },
        {
            "document": np.arange(documents), "text": ("document", [f"text {index}" for index in range(documents)]),
            "scorer": ["predicted price", "SnapKV"], "budget": ["one threshold", "equal"], "kept": [0.5, 0.25],
        },
        {"kind": "eviction", "prefix": 32, "continuation": 16, "task": "copy", "model": "tiny/sample",
         "posterity_version": "0"},
    )  # fmt: skip


def sample_features(documents=4, influence=True) -> xr.Dataset:
    """Build the parts of a gradient at two layers and three directions, from random gradients."""
    random = np.random.default_rng(0)
    parts = random.normal(size=(documents, 2, 3, 50)) + 0.3
    pairs = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
    pulls = random.normal(size=(documents, 3, 2, 40))
    own, later = pulls[:, :, 0], pulls[:, :, 1]
    variables = {
        "gram": (("document", "layer", "pair"),
                 np.stack([(parts[:, :, x] * parts[:, :, y]).sum(-1) for x, y in pairs], -1), {"units": "nats^2"}),
        "loss": ("document", 2 + random.random(documents), {"units": "nats per token"}),
        "pull": (("document", "direction", "pull_term"),
                 np.stack([own, later, own**2, later**2, own * later], -1).mean(2), {"units": "nats"}),
    }  # fmt: skip
    if influence:
        numbers = random.normal(size=(documents, 3, 3))
        variables["influence"] = (("document", "direction", "part"), numbers, {"units": "nats"})
    coords = {
        "document": np.arange(documents), "text": ("document", [f"text {index}" for index in range(documents)]),
        "layer": [0, 5], "pair": [*FEATURE_PAIRS], "direction": ["layers.0", "layers.5[0]", "layers.5[1]"],
        "direction_layer": ("direction", [0, 5, 5]), "pull_term": [*PULLS],
        **({"part": [*FEATURE_PARTS]} if influence else {}),
    }  # fmt: skip
    attrs = {"kind": "features", "context": 64, "positions": "0:63", "model": "tiny/sample", "posterity_version": "0"}
    return FEATURES.check(xr.Dataset(variables, coords, attrs))


def earlier_version(result: xr.Dataset) -> xr.Dataset:
    """Return a result that does not tell first keys apart, nor which key/value head a head has."""
    new = ["tail_moment", "mass_by_document", "attention_by_document", "kv_head", "group", "moment", "quantity"]
    kept = result.drop_vars(new, errors="ignore")
    variables = {
        name: variable.sum("reader_of", skipna=False, keep_attrs=True)
        .expand_dims(reader_of=["all"])
        .transpose(*variable.dims)
        for name, variable in kept.data_vars.items()
        if "reader_of" in variable.dims
    }
    attrs = {name: value for name, value in result.attrs.items() if name != "sinks"}
    return RESULT.check(kept.drop_dims("reader_of").assign(variables).drop_attrs(deep=False).assign_attrs(attrs))
