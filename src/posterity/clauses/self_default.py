"""Clause 7: attending to oneself may serve as the default when nothing else matches.

Everything is measured densely, on short windows: see `dense_attention`.
"""

import math
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from posterity.clauses.clause import Clause, judge, labelled_array, margin_of_error
from posterity.clauses.dense_attention import PLACES, DenseAttention
from posterity.clauses.drawing import (
    Chart,
    View,
    category_colours,
    category_map,
    centred_colours,
    growing_colours,
    head_map,
    measured_line,
)
from posterity.clauses.subject import Subject
from posterity.decomposition.accumulator import stack_layers
from posterity.errors import InputError
from posterity.models.attach import observe_model
from posterity.models.chunked_loss import window_losses
from posterity.models.interception import AttentionCall
from posterity.models.language_model import freeze_parameters
from posterity.models.watch import Layer, Watch
from posterity.ops.attention import Backward
from posterity.results.audit_schema import SHARE, Figure, Finding
from posterity.results.formatting import list_parts
from posterity.results.stats import mean_and_error

MAX_CONTEXT, MIN_CONTEXT = 256, 4
SINK = 0.3  # mean attention to the first position from which on a head counts as a sink
NONE, SELF, FIRST = 0, 1, 2
DEFAULTS = {NONE: "elsewhere", SELF: "self", FIRST: "first"}
HEAD_NUMBERS = {  # of every layer and head
    "correlation": "rank correlation of the self weight with the best other match",
    "permuted": "the same with own scores permuted among the queries",
    "weight": "mean self weight",
    "first": "mean attention to the first position",
    "cosine": "cosine of the output with the own value",
    "identity": "largest error of ds_ii = -(sum of the other ds), relative to the largest |ds|",
}


def measure_self_default(subject: Subject) -> Finding:
    """Measure where a head's weight goes when nothing else matches, and if self weight falls with other matches.

    A head's default is self (the first position) if, among the quarter of queries with the weakest best other match,
    self (the first position) has the largest mean weight of self, first, the rest together, and a learned sink. The
    verdict is `judge`'s for the share of heads with self as default, layer by layer, against one half.

    Raises:
        InputError: Windows of fewer than 4 tokens; a layer that is not called once per pass.
    """
    context = min(subject.plan.context, MAX_CONTEXT)
    if context < MIN_CONTEXT:
        raise InputError(f"row 7 expects windows of at least {MIN_CONTEXT} tokens; got context={context}")
    windows = subject.windows(context, subject.plan.limit)
    measures = _HeadMeasures(subject.generator(7))
    with (
        freeze_parameters(subject.model),
        observe_model(subject.model, measures.observe) as watch,
        watch.replace_outputs(measures.record_sinks),
        subject.progress(len(windows), "defaults", "windows") as advance,
    ):
        for ids in windows:
            window_losses(subject.model, ids[None]).sum().backward()
            measures.finish_window(watch)
            advance(1, len(ids))
    return _finding({name: np.stack(rows) for name, rows in measures.numbers.items()}, np.stack(measures.place_weights))


class _HeadMeasures:
    """The numbers of every head, window by window; heads that a layer does not have are NaN."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.sinks: dict[Layer, Tensor | None] = {}
        self.layers: dict[Layer, dict[str, Tensor]] = {}  # of the present window
        self.numbers: dict[str, list[np.ndarray]] = {name: [] for name in HEAD_NUMBERS}  # (layer, head)
        self.place_weights: list[np.ndarray] = []  # (place, layer, head)

    def record_sinks(self, layer: Layer, call: AttentionCall) -> None:
        """Record the learned sinks of a forward pass; the attention call stays as it is."""
        self.sinks[layer] = call.sinks

    def observe(self, layer: Layer, back: Backward, projections: object) -> None:
        """Measure one layer."""
        if layer in self.layers:
            raise InputError(f"layer {layer} was sent back twice in one pass: its heads cannot be told apart")
        dense = DenseAttention(back, self.sinks[layer])
        place_weights, permuted = dense.place_weights(), dense.permuted_self_weight(self.generator)
        numbers = {
            "correlation": dense.correlation(dense.self_weight), "permuted": dense.correlation(permuted),
            "weight": dense.self_weight[:, 1:].mean(1), "first": dense.weight[:, 1:, 0].mean(1),
            "cosine": dense.cosine(), "identity": dense.identity_error(),
        }  # fmt: skip
        self.layers[layer] = {name: x.cpu() for name, x in {**numbers, "places": place_weights}.items()}

    def finish_window(self, watch: Watch) -> None:
        """Append the numbers of a window, layers in order."""
        missing = [str(layer) for layer in watch.layers if layer not in self.layers]
        if missing:
            raise InputError(
                f"no gradient came back to the attention of {', '.join(missing)}: row 7 cannot be measured"
            )
        layers = [self.layers[layer] for layer in watch.layers]
        for name, rows in self.numbers.items():
            rows.append(stack_layers([numbers[name] for numbers in layers], 0).numpy())
        self.place_weights.append(stack_layers([numbers["places"] for numbers in layers], 1).numpy())
        self.layers.clear()


def default_places(place_weights: np.ndarray) -> np.ndarray:
    """Return `SELF` where self has the largest weight of the places (the first axis), `FIRST` where position 0 has it.

    Elsewhere `NONE`; NaN where a weight is.
    """
    finite = np.isfinite(place_weights).all(0)
    largest = np.where(finite, place_weights, 0).argmax(0)
    default = np.where(largest == 0, SELF, np.where(largest == 1, FIRST, NONE)).astype(float)
    return np.where(finite, default, math.nan)


def _share(mask: np.ndarray, existing: np.ndarray) -> np.ndarray:
    """Return the share of True entries among existing heads, over the last axis."""
    return (mask & existing).sum(-1) / existing.sum(-1)


def _finding(numbers: dict[str, np.ndarray], place_weights: np.ndarray) -> Finding:
    """Return the finding, from numbers (window, layer, head) and place weights (window, place, layer, head)."""
    default = default_places(mean_and_error(place_weights)[0])
    by_window = np.stack([default_places(window) for window in place_weights])
    share = _share(default == SELF, np.isfinite(default))
    _, error = mean_and_error(_share(by_window == SELF, np.isfinite(by_window)))
    verdict, _, confirming = judge(share, margin_of_error(error, len(place_weights)))
    heads, is_self = int(np.isfinite(default).sum()), default == SELF
    names = f" ({list_parts(is_self, 'head')})" if is_self.any() else ""
    reason = (
        f"self is the default of {int(is_self.sum())} of {heads} heads{names}, of most heads in {confirming} of "
        f"{len(share)} layers; the first position is that of {int((default == FIRST).sum())}"
    )
    variables = {
        "default": labelled_array("layer head", default, "0: none, 1: self, 2: the first position"),
        **_variables(numbers, place_weights),
        "share": labelled_array("layer", share, "share of heads with self as default"),
        "share_error": labelled_array("layer", error, "standard error of its single-window values"),
    }
    return Finding(_figures(numbers, default, by_window), verdict, reason, variables)


def _variables(numbers: dict[str, np.ndarray], place_weights: np.ndarray) -> dict[str, xr.DataArray]:
    window_error = "its standard error over windows"
    variables = {}
    for name, long_name in HEAD_NUMBERS.items():
        mean, error = mean_and_error(numbers[name])
        if name == "identity":
            variables[name] = labelled_array("layer head", numbers[name].max(0), long_name)
            continue
        variables[name] = labelled_array("layer head", mean, long_name)
        variables[f"{name}_error"] = labelled_array("layer head", error, window_error)
    mean, error = mean_and_error(place_weights)
    dims = "self_default_place layer head"
    coords: dict[str, Any] = {"self_default_place": list(PLACES)}
    variables["places"] = labelled_array(dims, mean, "weight where nothing else matches", **coords)
    variables["places_error"] = labelled_array(dims, error, window_error, **coords)
    return variables


def _figures(numbers: dict[str, np.ndarray], default: np.ndarray, by_window: np.ndarray) -> list[Figure]:
    """Return the figures. Shares are those of the means over windows; their errors those of single windows' shares."""

    def flatten_heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:-2], -1)

    def share(name: str, pooled: np.ndarray, single: np.ndarray, formula: str) -> Figure:
        existing = np.isfinite(flatten_heads(numbers["weight"]))
        error = mean_and_error(_share(flatten_heads(single), existing))[1]
        value = float(_share(flatten_heads(pooled), existing[0]))
        return Figure(name, value=value, error=error, formula=formula, windows=len(by_window), units=SHARE)

    def mean(name: str, number: str, formula: str, **baseline) -> Figure:
        value, error = mean_and_error(np.nanmean(numbers[number], (1, 2)))
        return Figure(name, value=value, error=error, formula=formula, windows=len(by_window), **baseline)

    weakest = "largest mean weight in the quarter of queries with the weakest max of s_ij, 0 < j < i"
    first = numbers["first"]
    return [
        share("heads with self as default", default == SELF, by_window == SELF, f"self has the {weakest}"),
        share("heads with the first as default", default == FIRST, by_window == FIRST, f"position 0 has the {weakest}"),
        share("sinks", first.mean(0) > SINK, first > SINK, f"mean a_i0 > {SINK}, i > 0"),
        mean(
            "rank correlation",
            "correlation",
            "Spearman of a_ii and max of s_ij, 0 < j < i; mean over heads",
            baseline=float(np.nanmean(numbers["permuted"])),
            expected="own scores permuted among the queries",
        ),
        mean("self weight", "weight", "mean of a_ii, i > 0, over heads"),
        mean("output along the own value", "cosine", "cos(o_i, v_i), i > 0, mean over heads"),
        Figure(
            "error of the identity",
            value=float(np.nanmax(numbers["identity"])),
            baseline=0.0,
            formula="max |ds_ii + sum of the other ds| / max |ds|",
            expected="exact arithmetic",
        ),
    ]


def draw_self_default(audit: View) -> list[Chart]:
    """Draw the maps of defaults, of rank correlations and of sinks, then self weight and cosine by layer."""
    charts = []
    maps = {
        "default": ("Defaults", "Where the weight goes when nothing else matches.", category_colours(DEFAULTS)),
        "correlation": ("Self weight against other matches", "Rank correlation over queries: below 0, self weight is "
                        "larger where the best other match is weaker.", centred_colours(1)),
        "first": ("Sinks", f"Mean attention to the first position; above {SINK} a head counts as a sink.",
                  growing_colours(cmin=0, cmax=1)),
    }  # fmt: skip
    for name, (title, text, colours) in maps.items():
        if f"self_default_{name}" in audit:
            values = audit[f"self_default_{name}"]
            trace = category_map(values, DEFAULTS) if name == "default" else head_map(values)
            charts.append(Chart(title, text, [trace], "head", "layer", colours=colours))
    lines = []
    for name, words in (("weight", "self weight"), ("cosine", "cosine of output and own value")):
        if f"self_default_{name}" in audit:
            values = audit[f"self_default_{name}"]
            lines.append(measured_line(words, values["layer"].values, values.mean("head")))
    if lines:
        text = "Mean self weight, and cosine of the output with the own value, over queries and heads."
        charts.append(Chart("Self by layer", text, lines, "layer", "mean over heads"))
    return charts


SELF_DEFAULT = Clause(
    number=7,
    name="Self as the default",
    statement="Attending to oneself may serve as the default when nothing else matches.",
    prefix="self_default",
    measure=measure_self_default,
    draw=draw_self_default,
)
