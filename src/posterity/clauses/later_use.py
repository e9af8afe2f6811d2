"""Clause 6: keys and values are more useful to later positions than to their own. By forward passes, not by gradients.

The worth of an edge, a key or a value is the rise of the losses of its window when it is taken away, summed over all
loss positions, in nats. Positions are drawn from 1 to N - 3: the first key is the sink of many heads, and the last two
have no later reader that has a loss.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from posterity.clauses.clause import Clause, judge, labelled_array, margin_of_error
from posterity.clauses.drawing import Chart, View, bars, centred_colours, expected_line, head_map, measured_line
from posterity.clauses.subject import Subject
from posterity.errors import InputError
from posterity.models.attach import head_counts, refuse_other_paths, watch_model
from posterity.models.patching import (
    LATER_MEAN,
    NO_SELF,
    OWN_MEAN,
    SELF_ONLY,
    SINK_AND_SELF,
    Patch,
    patched_losses,
)
from posterity.results.audit_schema import MIXED, SHARE, Figure, Finding
from posterity.results.stats import mean_and_error

EFFECTS = {  # variable: (kind of patch, what it shows, units)
    "no_self": (NO_SELF, "loss change without the self edge", "nats per token"),
    "self_and_first": (SINK_AND_SELF, "loss change with only self and first position", "nats per token"),
    "own_mean": (OWN_MEAN, "loss change where only the own query sees the mean", "nats per replaced position"),
    "later_mean": (LATER_MEAN, "loss change where only later queries see the mean", "nats per replaced position"),
}
PASSES = {"as it is": None, "no self edges": Patch(NO_SELF), "self edges only": Patch(SELF_ONLY)}
MIN_CONTEXT = 4


@dataclass
class _LossChanges:
    """Losses and loss changes of each window."""

    heads: list[np.ndarray] = field(default_factory=list)  # (effect, layer, head)
    single: list[np.ndarray] = field(default_factory=list)  # (own or later, layer, position)
    model: list[np.ndarray] = field(default_factory=list)  # losses, (pass,)


def measure_later_use(subject: Subject) -> Finding:
    """Take away edges, keys and values of every head, of single positions, and of the whole model.

    The verdict is that of the layers (share of single positions whose key and value are worth more to later queries
    than to their own, against one half, see `judge`), if the whole model says the same: that self edges alone cost
    more than no self edges. If it does not, the verdict is mixed.

    Raises:
        InputError: Windows of fewer than 4 tokens; a model with other paths between positions.
    """
    plan, changes = subject.plan, _LossChanges()
    if plan.short < MIN_CONTEXT:
        raise InputError(f"row 6 expects windows of at least {MIN_CONTEXT} tokens; got short={plan.short}")
    short_windows = subject.windows(plan.short, max(2, plan.pass_tokens // plan.short))
    long_windows = subject.windows(plan.context, plan.limit)
    generator = subject.generator(6)
    with watch_model(subject.model) as watch:
        refuse_other_paths(watch, "what keys and values are worth to later positions")
        counts = head_counts(subject.model)
        window_passes = len(EFFECTS) * sum(counts) + 2 * len(counts) * min(plan.positions, plan.short - 3) + 1
        passes = len(short_windows) * window_passes + len(long_windows) * len(PASSES)
        with subject.progress(passes, "patching") as advance:
            for ids in short_windows:
                _measure_heads_and_positions(subject, ids, counts, generator, changes, advance)
            for ids in long_windows:
                losses = patched_losses(subject.model, ids, list(PASSES.values()), batch=1, advance=advance)
                changes.model.append(losses.mean(1).numpy())
    return _finding(np.stack(changes.heads), np.stack(changes.single), np.stack(changes.model))


def _measure_heads_and_positions(
    subject: Subject,
    ids: Tensor,
    counts: Sequence[int],
    generator: torch.Generator,
    changes: _LossChanges,
    advance: Callable[[int, int], None],
) -> None:
    """Measure the effects on every head, and on single positions of every layer, on one short window."""
    plan, layers = subject.plan, range(len(counts))
    order = 1 + torch.randperm(len(ids) - 3, generator=generator)  # every position with an own and a later reader
    replaced = order[: max(1, round(plan.share * len(ids)))]
    single = (1 + torch.randperm(len(ids) - 3, generator=generator))[: plan.positions]
    heads = [(row, layer, head) for row in range(len(EFFECTS)) for layer in layers for head in range(counts[layer])]
    kinds = [kind for kind, _, _ in EFFECTS.values()]
    patches: list[Patch | None] = [
        Patch(kinds[row], layer, head, replaced if kinds[row] in (OWN_MEAN, LATER_MEAN) else None)
        for row, layer, head in heads
    ]
    patches += [
        Patch(kind, layer, None, position[None])
        for kind in (OWN_MEAN, LATER_MEAN)
        for layer in layers
        for position in single
    ]
    losses = patched_losses(subject.model, ids, [*patches, None], advance=advance).sum(1)
    rises = (losses[:-1] - losses[-1]).numpy()
    by_head = np.full((len(EFFECTS), len(counts), max(counts)), math.nan)
    by_head[tuple(np.array(heads).T)] = rises[: len(heads)]
    by_head /= np.array([len(ids) - 1, len(ids) - 1, len(replaced), len(replaced)])[:, None, None]
    changes.heads.append(by_head)
    changes.single.append(rises[len(heads) :].reshape(2, len(counts), len(single)))


def _finding(heads: np.ndarray, single: np.ndarray, model: np.ndarray) -> Finding:
    """Return the finding, from the arrays of `_LossChanges` with a leading dimension of windows."""
    share, _ = later_share(single)
    cases = np.heaviside(single[:, 1] - single[:, 0], 0.5).mean(2)
    margin = np.fmax(margin_of_error(mean_and_error(cases)[1], len(single)), 2 * _chance_error(single))
    layer_verdict, contradicting, confirming = judge(share, margin)
    cost, cost_error = mean_and_error(model[:, 2] - model[:, 1])
    model_verdict, _, _ = judge([cost], [margin_of_error(cost_error, len(model))], 0.0)
    losses, _ = mean_and_error(model)
    layers = f"most in {confirming} of {len(share)} layers{f', few in {contradicting}' if contradicting else ''}"
    reason = (
        f"{100 * share.mean():.1f} % of single keys and values are worth more to later queries than to their own "
        f"({layers}); self edges alone cost the whole model {losses[2] - losses[0]:.3f} nats per token, their absence "
        f"{losses[1] - losses[0]:.3f}"
    )
    verdict = layer_verdict if layer_verdict == model_verdict else MIXED
    figures = [*_loss_figures(model), *_effect_figures(heads), *_share_figures(heads, single)]
    return Finding(figures, verdict, reason, _variables(heads, single, model))


def later_share(single: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of (window, position) cases in which later use is worth more than own use; ties count half.

    Args:
        single: Loss changes (window, own or later, layer, position).

    Returns:
        The share and its standard error, (layer,). The error is that over windows, and at least that of as many coins:
        with few cases all may agree by chance.
    """
    cases = np.heaviside(single[:, 1] - single[:, 0], 0.5)  # window, layer, position
    share, error = mean_and_error(cases.mean(2))
    return share, np.fmax(error, _chance_error(single))


def _chance_error(single: np.ndarray) -> float:
    """Return the standard error of the share of a layer's cases if every one were a coin."""
    return 0.5 / math.sqrt(single.shape[0] * single.shape[3])


def _variables(heads: np.ndarray, single: np.ndarray, model: np.ndarray) -> dict[str, xr.DataArray]:
    effect, effect_error = mean_and_error(heads)
    share, share_error = later_share(single)
    losses, loss_errors = mean_and_error(model)
    window_error, nats = "its standard error over windows", "nats per token"
    variables = {}
    for row, (name, (_, long_name, units)) in enumerate(EFFECTS.items()):
        variables[name] = labelled_array("layer head", effect[row], long_name, units)
        variables[f"{name}_error"] = labelled_array("layer head", effect_error[row], window_error, units)
    variables["share"] = labelled_array("layer", share, "share of positions worth more to later queries")
    variables["share_error"] = labelled_array("layer", share_error, "its standard error, at least that of chance")
    for row, (name, queries) in enumerate((("own", "own query"), ("later", "later queries"))):
        long_name = f"loss change where the {queries} of a position see the mean"
        variables[f"position_{name}"] = labelled_array(
            "layer", single[:, row].mean((0, 2)), long_name, "nats per position"
        )
    dim, coords = "later_use_pass", {"later_use_pass": list(PASSES)}
    variables["loss"] = labelled_array(dim, losses, "loss of the whole model", nats, **coords)
    variables["loss_error"] = labelled_array(dim, loss_errors, window_error, nats, **coords)
    return variables


def _loss_figures(model: np.ndarray) -> list[Figure]:
    losses, errors = mean_and_error(model)
    units = "nats per token"
    figures = [Figure("loss", value=losses[0], error=errors[0], formula="mean of l_t", units=units, windows=len(model))]
    formulas = {"no self edges": "no edge (i, i)", "self edges only": "no edge but (i, i)"}
    for index, (name, formula) in enumerate(formulas.items(), 1):
        figures.append(
            Figure(
                f"loss with {name}",
                value=losses[index],
                error=errors[index],
                windows=len(model),
                baseline=losses[0],
                formula=formula,
                expected="the loss as it is",
                units=units,
            )
        )
    return figures


def _effect_figures(heads: np.ndarray) -> list[Figure]:
    figures = []
    for row, (_, long_name, units) in enumerate(EFFECTS.values()):
        value, error = mean_and_error(np.nanmean(heads[:, row], (1, 2)))
        formula = "one head at a time: not additive"
        figures.append(
            Figure(
                f"{long_name}, mean over heads",
                value=value,
                error=error,
                formula=formula,
                units=units,
                windows=len(heads),
            )
        )
    return figures


def _share_figures(heads: np.ndarray, single: np.ndarray) -> list[Figure]:
    cases = np.heaviside(single[:, 1] - single[:, 0], 0.5)
    share, share_error = mean_and_error(cases.mean((1, 2)))
    share_error = np.fmax(share_error, 0.5 / math.sqrt(cases.size))  # as in `later_share`
    existing = np.isfinite(heads[:, 0])
    by_window = np.heaviside(heads[:, 1] - heads[:, 0], 0.5).sum((1, 2), where=existing) / existing.sum((1, 2))
    look_back, look_back_error = mean_and_error(by_window)
    return [
        Figure(
            "positions worth more later",
            value=share,
            error=share_error,
            windows=len(single),
            baseline=0.5,
            formula="share of (layer, position) with later worth > own worth",
            expected="no difference",
            units=SHARE,
        ),
        Figure(
            "heads that need the look-back more",
            value=look_back,
            error=look_back_error,
            windows=len(heads),
            baseline=0.5,
            formula="share of heads, mean over windows: only self and first costs more than no self edge",
            expected="no difference",
            units=SHARE,
        ),
    ]


def draw_later_use(audit: View) -> list[Chart]:
    """Draw the three losses, the share of positions by layer, and a map of each effect."""
    charts = []
    if "later_use_loss" in audit:
        losses = audit["later_use_loss"]
        trace = bars(losses.later_use_pass.values, losses, audit.get("later_use_loss_error"))
        text = "Loss of the whole model with all of its edges, without self edges, and with self edges only."
        charts.append(Chart("What the edges are worth", text, [trace], "edges", "nats per token"))
    if "later_use_share" in audit:
        share = audit["later_use_share"]
        lines = [
            measured_line("later > own", share.layer, share, audit.get("later_use_share_error")),
            expected_line("no difference", share.layer, np.full(len(share), 0.5), mode="lines"),
        ]
        text = "Share of single positions whose key and value are worth more to later queries than to their own."
        charts.append(Chart("Worth more later", text, lines, "layer", "share of positions"))
    for name, (kind, long_name, units) in EFFECTS.items():
        if f"later_use_{name}" in audit:
            trace = head_map(audit[f"later_use_{name}"])
            text = f"{long_name[0].upper()}{long_name[1:]}, one head at a time, in {units}."
            charts.append(Chart(f"Patch: {kind}", text, [trace], "head", "layer", colours=centred_colours()))
    return charts


LATER_USE = Clause(
    number=6,
    name="More useful later than now",
    statement="Keys and values are more useful to later positions than to their own: what attention is good for is to "
    "move information between positions.",
    prefix="later_use",
    measure=measure_later_use,
    draw=draw_later_use,
    cost=8,
)
