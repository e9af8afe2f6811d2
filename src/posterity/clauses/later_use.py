"""Row 6: keys and values are more useful to later positions than to their own. By forward passes, not by gradients.

An edge, a key or a value is worth what the losses of its window rise by when it is taken away: summed over all loss
positions, in nats. Positions are drawn from 1 to N - 3: the first key is the sink of many heads, and the last two have
no later reader that has a loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from posterity.clauses.clause import Clause, Subject, array, judge
from posterity.clauses.drawing import Chart, View, grid, line, plain
from posterity.errors import InputError
from posterity.models.attach import refuse_other_paths, watching
from posterity.models.patching import (
    LATER_MEAN,
    NO_SELF,
    OWN_MEAN,
    SELF_ONLY,
    SINK_AND_SELF,
    Patch,
    head_counts,
    patched_losses,
)
from posterity.results.audit_schema import MIXED, Figure, Finding
from posterity.results.stats import mean_and_error

EFFECTS = {  # variable: (kind of patch, what it shows, units)
    "no_self": (NO_SELF, "loss change without the self edge", "nats per token"),
    "self_and_first": (SINK_AND_SELF, "loss change with only self and first position", "nats per token"),
    "own_mean": (OWN_MEAN, "loss change where only the own query sees the mean", "nats per replaced position"),
    "later_mean": (LATER_MEAN, "loss change where only later queries see the mean", "nats per replaced position"),
}
PASSES = ("as it is", "no self edges", "self edges only")
SHORTEST = 4


@dataclass
class _Seen:
    """What was measured of each window."""

    heads: list[np.ndarray] = field(default_factory=list)  # (effect, layer, head)
    single: list[np.ndarray] = field(default_factory=list)  # (own or later, layer, position)
    whole: list[np.ndarray] = field(default_factory=list)  # (pass,)


def measure(subject: Subject) -> Finding:
    """Take away edges, keys and values of every head, of single positions, and of the whole model.

    The verdict is that of the layers (share of single positions whose key and value are worth more to later queries
    than to their own, against one half, see `judge`), if the whole model says the same: that self edges alone cost
    more than no self edges. If it does not, the verdict is mixed.

    Raises:
        InputError: Windows of fewer than 4 tokens; a model with other paths between positions.
    """
    plan, seen = subject.plan, _Seen()
    if plan.short < SHORTEST:
        raise InputError(f"row 6 expects windows of at least {SHORTEST} tokens; got short={plan.short}")
    windows = subject.windows(plan.short, max(2, plan.budget // plan.short))
    long = subject.windows(plan.context, plan.limit)
    generator = subject.generator(6)
    with watching(subject.model) as watch:
        refuse_other_paths(watch, "what keys and values are worth to later positions")
        counts = head_counts(subject.model, windows[0])
        each = len(EFFECTS) * sum(counts) + 2 * len(counts) * min(plan.positions, plan.short - 3) + 1
        with subject.bar(len(windows) * each + len(long) * len(PASSES), "patching") as advance:
            for ids in windows:
                _window(subject, ids, counts, generator, seen, advance)
            for ids in long:
                patches = [None, Patch(NO_SELF), Patch(SELF_ONLY)]
                losses = patched_losses(subject.model, ids, patches, batch=1, advance=advance)
                seen.whole.append(losses.mean(1).numpy())
    return _finding(seen)


def _window(
    subject: Subject, ids: Tensor, counts: Sequence[int], generator: torch.Generator, seen: _Seen, advance
) -> None:
    """Every head's effects, and single positions of every layer, on one short window."""
    plan, layers = subject.plan, range(len(counts))
    order = 1 + torch.randperm(len(ids) - 3, generator=generator)  # every position with an own and a later reader
    together = order[: max(1, round(plan.share * len(ids)))]
    single = (1 + torch.randperm(len(ids) - 3, generator=generator))[: plan.positions]
    heads = [(row, layer, head) for row in range(len(EFFECTS)) for layer in layers for head in range(counts[layer])]
    alone = [(row, layer, at) for row in range(2) for layer in layers for at in range(len(single))]
    kinds = [kind for kind, _, _ in EFFECTS.values()]
    patches: list[Patch | None] = [
        Patch(kinds[row], layer, head, together if kinds[row] in (OWN_MEAN, LATER_MEAN) else None)
        for row, layer, head in heads
    ]
    patches += [Patch((OWN_MEAN, LATER_MEAN)[row], layer, None, single[at, None]) for row, layer, at in alone]
    losses = patched_losses(subject.model, ids, [*patches, None], advance=advance).sum(1)
    changes = (losses[:-1] - losses[-1]).numpy()
    by_head = np.full((len(EFFECTS), len(counts), max(counts)), math.nan)
    by_head[tuple(np.array(heads).T)] = changes[: len(heads)]
    by_head /= np.array([len(ids) - 1, len(ids) - 1, len(together), len(together)])[:, None, None]
    seen.heads.append(by_head)
    seen.single.append(changes[len(heads) :].reshape(2, len(counts), len(single)))


def _finding(seen: _Seen) -> Finding:
    heads, single, whole = np.stack(seen.heads), np.stack(seen.single), np.stack(seen.whole)
    effect, effect_error = mean_and_error(heads)
    share, share_error = later_share(single)
    cost, cost_error = mean_and_error(whole[:, 2] - whole[:, 1])
    of_layers, against, holding = judge(share, share_error)
    of_whole, _, _ = judge([cost], [cost_error], 0.0)
    variables = {}
    for row, (name, (_, long_name, units)) in enumerate(EFFECTS.items()):
        variables[f"later_use_{name}"] = array("layer head", effect[row], long_name, units)
        variables[f"later_use_{name}_error"] = array(
            "layer head", effect_error[row], "its standard error over windows", units
        )
    variables["later_use_share"] = array("layer", share, "share of positions worth more to later queries")
    variables["later_use_share_error"] = array("layer", share_error, "its standard error, at least that of chance")
    for row, name in enumerate(("own", "later")):
        worth = single[:, row].mean((0, 2))
        long_name = f"loss change where the {name} quer{'y' if row == 0 else 'ies'} of a position see the mean"
        variables[f"later_use_position_{name}"] = array("layer", worth, long_name, "nats per position")
    losses, errors = mean_and_error(whole)
    coords = {"later_use_pass": list(PASSES)}
    variables["later_use_loss"] = array("later_use_pass", losses, "loss of the whole model", "nats per token", **coords)
    variables["later_use_loss_error"] = array(
        "later_use_pass", errors, "its standard error over windows", "nats per token", **coords
    )
    words = f"most in {holding} of {len(share)} layers{f', few in {against}' if against else ''}"
    reason = (
        f"{100 * share.mean():.1f} % of single keys and values are worth more to later queries than to their own "
        f"({words}); self edges alone cost the whole model {losses[2] - losses[0]:.3f} nats per token, their absence "
        f"{losses[1] - losses[0]:.3f}"
    )
    verdict = of_layers if of_layers == of_whole else MIXED
    return Finding(_figures(heads, single, whole), verdict, reason, variables)


def later_share(single: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of (window, position) cases, by layer, in which later use is worth more than own use; ties count half.

    The error is that over windows, and at least that of as many coins: with few cases all may agree by chance.

    Args:
        single: Loss changes (window, own or later, layer, position).
    """
    cases = np.heaviside(single[:, 1] - single[:, 0], 0.5)  # window, layer, position
    share, error = mean_and_error(cases.mean(2))
    return share, np.fmax(error, 0.5 / math.sqrt(cases.shape[0] * cases.shape[2]))


def _figures(heads: np.ndarray, single: np.ndarray, whole: np.ndarray) -> list[Figure]:
    losses, errors = mean_and_error(whole)
    nats = "nats per token"
    found = [Figure("loss", losses[0], errors[0], formula="mean of l_t", units=nats)]
    for at, (name, formula) in enumerate(
        (("no self edges", "no edge (i, i)"), ("self edges only", "no edge but (i, i)")), 1
    ):
        found.append(
            Figure(f"loss with {name}", losses[at], errors[at], losses[0], formula, "the loss as it is", units=nats)
        )
    for row, (_, long_name, units) in enumerate(EFFECTS.values()):
        value, error = mean_and_error(np.nanmean(heads[:, row], (1, 2)))
        found.append(
            Figure(
                f"{long_name}, mean over heads", value, error, formula="one head at a time: not additive", units=units
            )
        )
    cases = np.heaviside(single[:, 1] - single[:, 0], 0.5)
    name, formula = "positions worth more later", "share of (layer, position) with later worth > own worth"
    share, error = mean_and_error(cases.mean((1, 2)))
    error = np.fmax(error, 0.5 / math.sqrt(cases.size))  # as in `later_share`
    found.append(Figure(name, share, error, 0.5, formula, "no difference"))
    known = np.isfinite(heads[:, 0])
    back = np.heaviside(heads[:, 1] - heads[:, 0], 0.5).sum((1, 2), where=known) / known.sum((1, 2))
    formula = "share of heads, mean over windows: only self and first costs more than no self edge"
    found.append(Figure("heads that need the look-back more", *mean_and_error(back), 0.5, formula, "no difference"))
    return found


def draw(audit: View) -> list[Chart]:
    """The three losses, the share of positions by layer, and a map of each effect."""
    charts = []
    if "later_use_loss" in audit:
        losses = audit["later_use_loss"]
        bars = {"type": "bar", "x": losses.later_use_pass.values.tolist(), "y": plain(losses)}
        if "later_use_loss_error" in audit:
            bars["error_y"] = {"type": "data", "array": plain(audit["later_use_loss_error"])}
        text = "Loss of the whole model with all of its edges, without self edges, and with self edges only."
        charts.append(Chart("What the edges are worth", text, [bars], "edges", "nats per token"))
    if "later_use_share" in audit:
        share = audit["later_use_share"]
        lines = [
            line("later > own", share.layer, share, audit.get("later_use_share_error")),
            line("no difference", share.layer, np.full(len(share), 0.5), mode="lines", line={"dash": "dot"}),
        ]
        text = "Share of single positions whose key and value are worth more to later queries than to their own."
        charts.append(Chart("Worth more later", text, lines, "layer", "share of positions"))
    for name, (kind, long_name, units) in EFFECTS.items():
        if f"later_use_{name}" in audit:
            values = audit[f"later_use_{name}"].transpose("layer", "head")
            at = {"x": values["head"].values.tolist(), "y": values["layer"].values.tolist()}
            text = f"{long_name[0].upper()}{long_name[1:]}, one head at a time, in {units}."
            trace = grid(values, kind, colorscale="RdBu", zmid=0, **at)
            charts.append(Chart(f"Patch: {kind}", text, [trace], "head", "layer"))
    return charts


CLAUSES: tuple[Clause, ...] = (
    Clause(
        6,
        "More useful later than now",
        "Keys and values are more useful to later positions than to their own: what attention is good for is to move "
        "information between positions.",
        measure,
        draw,
    ),
)
