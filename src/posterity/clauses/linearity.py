"""Clause 8: attention that may look only at itself is a linear layer; and which heads a model could spare as such."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from posterity.clauses.clause import Clause, labelled_array
from posterity.clauses.drawing import Chart, View, centred_colours, head_map, measured_line
from posterity.clauses.subject import Subject
from posterity.errors import InputError
from posterity.measurement.head_folding import (
    HeadCosts,
    LossChange,
    PrefixLosses,
    Windows,
    largest_within_budget,
    split_windows,
)
from posterity.models.attach import watch_model
from posterity.models.folded_heads import HeadIndex, foldable_head_counts
from posterity.models.interception import AttentionCall
from posterity.models.language_model import freeze_parameters, input_device, language_model, rounding
from posterity.models.linear import as_linear
from posterity.models.patching import SELF_ONLY, Patch, patched_losses
from posterity.models.watch import Layer
from posterity.ops.attention import attention
from posterity.ops.mask import Mask
from posterity.results.audit_schema import FAILS, HOLDS, MIXED, SHARE, Figure, Finding
from posterity.results.formatting import list_parts


def measure_linearity(subject: Subject) -> Finding:
    """Compare the layer read off the weights with the layer run on text under a self-only mask; and cost every head.

    It holds if both agree to rounding in every layer; layers that are not linear are named.
    """
    plan = subject.plan
    number = max(2, plan.pass_tokens // plan.short)
    windows, selection, held_out = split_windows(subject.windows(plan.short, 5 * number), number)
    differences, refusals = _differences(subject, windows)
    nonlinear = np.nan_to_num(differences) > rounding(subject.model.dtype)
    verdict = FAILS if nonlinear.any() else MIXED if refusals else HOLDS
    compared = int(np.isfinite(differences).sum())
    reasons = [
        f"{compared - int(nonlinear.sum())} of {len(differences)} layers under a self-only mask are a linear layer to "
        f"rounding{f', not {list_parts(nonlinear)}' if nonlinear.any() else ''}",
        *refusals,
    ]
    figures = [_difference_figure(differences)]
    long_name = "relative difference from the layer under a self-only mask"
    variables = {"difference": labelled_array("layer", differences, long_name)}
    try:
        counts = foldable_head_counts(subject.model)
    except InputError as error:  # attention sinks
        reasons.append(str(error))
    else:
        with watch_model(subject.model):  # verified once for all that is folded
            with subject.progress((1 + sum(counts)) * len(windows), "folding", "heads") as advance:
                costs = head_costs(subject.model, windows, advance=advance)
            trial = PrefixLosses(subject.model, selection or windows, costs.order)
            number = largest_within_budget(trial.change, len(costs.order), plan.fold)
            changes = [LossChange.of(trial.before, trial.after(number))]
            if held_out:
                repeat = PrefixLosses(subject.model, held_out, costs.order)
                changes.append(LossChange.of(repeat.before, repeat.after(number)))
        sizes = len(windows), len(selection or windows), len(held_out or ())
        figures += _cost_figures(costs, number, changes, plan.fold, sizes)
        variables |= _cost_variables(costs, trial, set(costs.order[:number]))
        reasons.append(
            f"{number} of {len(costs.order)} heads can look only at themselves together for {changes[-1].change:+.4f} "
            f"nats per token{' on held-out windows' if held_out else ''}"
        )
    return Finding(figures, verdict, "; ".join(reasons), variables)


def _differences(subject: Subject, windows: Windows) -> tuple[np.ndarray, list[str]]:
    """Compare each layer's linear layer with the layer under a self-only mask, on the hidden states of text.

    Returns:
        The largest difference by layer, relative to the largest output, NaN for a layer that has no linear layer; and
        why some have none, a sentence for each reason.
    """
    model = subject.model
    with watch_model(model) as watch, freeze_parameters(model), torch.no_grad():
        modules = [model.get_submodule(layer.name) for layer in watch.layers]
        linear: dict[nn.Module, nn.Linear] = {}
        refusals: dict[str, list[int]] = {}
        for index, module in enumerate(modules):
            try:
                linear[module] = as_linear(module)
            except InputError as error:
                refusals.setdefault(str(error), []).append(index)
        differences = dict.fromkeys(modules, math.nan)

        def compare(module: nn.Module, args: tuple, kwargs: dict, _output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            with watch.replace_outputs(_self_only_output):
                output = module.forward(*args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            linear_output = linear[module](hidden.to(linear[module].weight.dtype))
            difference = float((linear_output - output).abs().max() / output.abs().max())
            differences[module] = np.fmax(differences[module], difference)

        hooks = [module.register_forward_hook(compare, with_kwargs=True) for module in linear]
        try:
            for ids in windows:
                model(input_ids=ids[None].to(input_device(model)), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    layers = np.arange(len(modules))
    sentences = [f"{list_parts(np.isin(layers, indices))}: {reason}" for reason, indices in refusals.items()]
    return np.array([differences[module] for module in modules]), sentences


def _self_only_output(_layer: Layer, call: AttentionCall) -> Tensor:
    """Run the attention call with a mask that leaves the self edge only; scores and softmax are still computed."""
    mask = Mask(lambda query, key: query == key)
    return attention(call.query, call.key, call.value, call.scale, mask=mask, softcap=call.softcap)


def head_costs(
    model: nn.Module, windows: Windows, *, batch: int = 8, advance: Callable[[int, int], None] | None = None
) -> HeadCosts:
    """Measure how much the mean loss grows when one head alone is folded, for every head.

    Args:
        model: A causal language model of transformers.
        windows: Token ids of windows of text.
        batch: Heads that are tried at once.
        advance: Is told the heads that are done, and their tokens.
    """
    counts = foldable_head_counts(model)
    heads = [(layer, head) for layer, count in enumerate(counts) for head in range(count)]
    patches = [None, *(Patch(SELF_ONLY, layer, head) for layer, head in heads)]
    layers, numbers = torch.tensor(heads).unbind(1)
    by_window = []
    for ids in windows:
        losses = patched_losses(language_model(model), ids, patches, batch=batch, advance=advance)
        table = torch.full((len(counts), max(counts)), math.nan, dtype=torch.float64)
        table[layers, numbers] = losses[1:].mean(1) - losses[0].mean()
        by_window.append(table)
    return HeadCosts.of(by_window)


def _difference_figure(differences: np.ndarray) -> Figure:
    finite = differences[np.isfinite(differences)]
    return Figure(
        "largest difference from a linear layer",
        value=float(finite.max()) if len(finite) else math.nan,
        baseline=0.0,
        formula="largest |W x + b − output under a self-only mask| over the largest |output|, over layers",
        expected="identity",
    )


def _cost_figures(
    costs: HeadCosts, number: int, changes: list[LossChange], budget: float, windows: tuple[int, int, int]
) -> list[Figure]:
    """Return how many heads can look only at themselves, what that costs, and what the dearest head costs alone.

    Args:
        costs: The cost of each head alone.
        number: How many heads can look only at themselves.
        changes: What they cost together, on the windows that chose their number and on those held out.
        budget: What they may cost, in nats per token.
        windows: How many there are: for the costs, for the number, held out.
    """
    dearest = costs.order[-1]
    names = ("loss change with these heads together", "loss change with these heads together, held out")
    return [
        Figure(
            "heads that can look only at themselves",
            value=float(number),
            formula="the cheapest alone, as many as together "
            f"stay within {budget:g} nats per token on windows of their own",
        ),
        Figure("share of these heads", value=number / len(costs.order), formula="these heads / all heads", units=SHARE),
        *(
            Figure(
                name,
                value=change.change,
                error=change.error,
                formula="measured, not summed, a token",
                units="nats",
                windows=size,
            )
            for name, change, size in zip(names, changes, windows[1:], strict=False)
        ),
        Figure(
            "cost of the dearest head",
            value=float(costs.cost[dearest]),
            error=float(costs.error[dearest]),
            windows=windows[0],
            formula="change of the mean loss when that head alone looks only at itself",
            units="nats",
        ),
    ]


def _cost_variables(costs: HeadCosts, trial: PrefixLosses, folded: set[HeadIndex]) -> dict[str, xr.DataArray]:
    layers, heads = costs.cost.shape
    is_folded = [[float((layer, head) in folded) for head in range(heads)] for layer in range(layers)]
    is_folded = np.where(np.isfinite(costs.cost.numpy()), is_folded, math.nan)
    numbers = list(trial.joint)
    joint = [LossChange.of(trial.before, trial.after(number)) for number in numbers]
    change, error = [loss.change for loss in joint], [loss.error for loss in joint]
    window_error, coords = "standard error over windows", {"folded": numbers}
    return {
        "cost": labelled_array("layer head", costs.cost, "cost of the head looking only at itself", "nats"),
        "cost_error": labelled_array("layer head", costs.error, window_error, "nats"),
        "folded": labelled_array("layer head", is_folded, "whether the head is among those that can"),
        "joint": labelled_array("folded", change, "cost of these heads together", "nats", **coords),
        "joint_error": labelled_array("folded", error, window_error, "nats", **coords),
    }


def _draw_linearity(audit: View) -> list[Chart]:
    charts = []
    if "straight_cost" in audit:
        cost = audit["straight_cost"]
        most = max(float(np.nanpercentile(np.abs(cost.values), 95)), 1e-9)
        charts.append(
            Chart(
                "What it costs when one head may look only at itself",
                "Change of the mean loss in nats per token, one head at a time. Colours end at the 95th percentile "
                f"of the sizes, {most:.2g}; negative: the loss falls.",
                [head_map(cost)], "head", "layer", colours=centred_colours(most),
            )
        )  # fmt: skip
    if "straight_joint" in audit:
        joint, error = audit["straight_joint"], audit.get("straight_joint_error")
        charts.append(
            Chart(
                "What it costs to replace the attention of several heads by a linear map",
                "Measured together, the cheapest heads first. The points are those of a bisection that looks for the "
                "budget of the audit.",
                [measured_line("together", joint.folded, joint, error)], "heads", "nats per token",
            )
        )  # fmt: skip
    return charts


LINEARITY = Clause(
    number=8,
    name="Self-only is linear",
    statement="An attention layer that may look only at itself is a linear layer.",
    prefix="straight",
    measure=measure_linearity,
    draw=_draw_linearity,
    cost=3,
)
