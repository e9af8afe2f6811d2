"""Row 8: attention that may look only at itself is a linear layer; and which heads a model could do with as such."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posterity.clauses.clause import Clause, Subject, array
from posterity.clauses.drawing import Chart, View, grid, line
from posterity.errors import InputError
from posterity.measurement.head_folding import Costs, Losses, Trial, Windows, head_costs, longest, parts
from posterity.models.attach import watching
from posterity.models.folded_heads import Head, head_counts
from posterity.models.language_model import first_device, frozen, rounding
from posterity.models.linear import as_linear
from posterity.models.watch import Attending, Layer
from posterity.ops.attention import attention
from posterity.ops.mask import Mask
from posterity.results.audit_schema import FAILS, HOLDS, MIXED, Figure, Finding
from posterity.results.formatting import named


def straight(subject: Subject) -> Finding:
    """The layer read off its weights beside the layer run on text under a self-only mask; and the price of each head.

    It holds if both agree to rounding in every layer; layers that are not linear are named.
    """
    plan = subject.plan
    number = max(2, plan.budget // plan.short)
    windows, choosing, others = parts(subject.windows(plan.short, 5 * number), number)
    differences, refused = _differences(subject, windows)
    wrong = np.nan_to_num(differences) > rounding(subject.model.dtype)
    verdict = FAILS if wrong.any() else MIXED if refused else HOLDS
    known = differences[np.isfinite(differences)]
    linear = f"{len(known) - int(wrong.sum())} of {len(differences)} layers under a self-only mask are a linear layer"
    reasons = [f"{linear} to rounding" + (f", not {named(wrong)}" if wrong.any() else ""), *refused]
    figures = [
        Figure(
            "largest difference from a linear layer", float(known.max()) if len(known) else math.nan, math.nan, 0.0,
            "largest |W x + b - output under a self-only mask| over the largest |output|, over layers", "identity",
        )
    ]  # fmt: skip
    variables = {
        "straight_difference": array("layer", differences, "relative difference from the layer under a self-only mask")
    }
    try:
        counts = head_counts(subject.model)
    except InputError as error:  # attention sinks
        reasons.append(str(error))
    else:
        with subject.bar((1 + sum(counts)) * len(windows), "folding", "heads") as advance:
            costs = head_costs(subject.model, windows, advance=advance)
        trial = Trial(subject.model, choosing or windows, costs.order)
        number = longest(trial, len(costs.order), plan.fold)
        losses = [Losses.of(trial.before, trial.after(number))]
        if others:
            again = Trial(subject.model, others, costs.order)
            losses.append(Losses.of(again.before, again.after(number)))
        figures += _prices(costs, number, losses, plan.fold)
        variables |= _variables(costs, trial, set(costs.order[:number]))
        reasons.append(
            f"{number} of {len(costs.order)} heads can look only at themselves together for {losses[-1].change:+.4f} "
            f"nats per token{' on held-out windows' if others else ''}"
        )
    return Finding(figures, verdict, "; ".join(reasons), variables)


def _prices(costs: Costs, number: int, losses: list[Losses], budget: float) -> list[Figure]:
    whole = len(costs.order)
    dearest = costs.order[-1]
    where = ("with these heads together", "with these heads together, held out")
    return [
        Figure(
            "heads that can look only at themselves", float(number), formula="the cheapest alone, as many as together "
            f"stay within {budget:g} nats per token on windows of their own",
        ),
        Figure("share of these heads", number / whole, formula="these heads / all heads"),
        *(
            Figure(f"loss change {name}", one.change, one.error, formula="measured, not summed, a token", units="nats")
            for name, one in zip(where, losses, strict=False)
        ),
        Figure(
            "cost of the dearest head", float(costs.cost[dearest]), float(costs.error[dearest]),
            formula="change of the mean loss when that head alone looks only at itself", units="nats",
        ),
    ]  # fmt: skip


def _variables(costs: Costs, trial: Trial, folded: set[Head]) -> dict[str, Any]:
    taken = [[float(at in folded) for at in ((n, head) for head in range(row.shape[0]))]
             for n, row in enumerate(costs.cost)]  # fmt: skip
    taken = np.where(np.isfinite(costs.cost.numpy()), taken, math.nan)
    numbers = list(trial.joint)
    joint = [Losses.of(trial.before, trial.after(number)) for number in numbers]
    at = {"folded": numbers}
    return {
        "straight_cost": array("layer head", costs.cost, "cost of the head looking only at itself", "nats"),
        "straight_cost_error": array("layer head", costs.error, "standard error over windows", "nats"),
        "straight_folded": array("layer head", taken, "whether the head is among those that can"),
        "straight_joint": array("folded", [one.change for one in joint], "cost of these heads together", "nats", **at),
        "straight_joint_error": array(
            "folded", [one.error for one in joint], "standard error over windows", "nats", **at
        ),
    }


def _differences(subject: Subject, windows: Windows) -> tuple[np.ndarray, list[str]]:
    """By layer: how far its linear layer is from itself under a self-only mask, on the hidden states of text.

    Relative to the largest output; NaN for a layer that has none. And the reasons why some have none.
    """
    model = subject.model
    with watching(model) as watch, frozen(model), torch.no_grad():
        modules = [model.get_submodule(layer.name) for layer in watch.layers]
        linear: dict[nn.Module, nn.Linear] = {}
        refused: dict[str, list[int]] = {}
        for number, module in enumerate(modules):
            try:
                linear[module] = as_linear(module)
            except InputError as error:
                refused.setdefault(str(error), []).append(number)
        found = dict.fromkeys(modules, math.nan)

        def met(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            with watch.replacing(_only_self):
                alone = module.forward(*args, **kwargs)
            alone = alone[0] if isinstance(alone, tuple) else alone
            given = linear[module](hidden.to(linear[module].weight.dtype))
            difference = float((given - alone).abs().max() / alone.abs().max())
            found[module] = np.fmax(found[module], difference)

        hooks = [module.register_forward_hook(met, with_kwargs=True) for module in linear]
        try:
            for ids in windows:
                model(input_ids=ids[None].to(first_device(model)), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    told = [f"{named(_among(numbers, len(modules)))}: {reason}" for reason, numbers in refused.items()]
    return np.array([found[module] for module in modules]), told


def _only_self(_layer: Layer, given: Attending) -> Tensor:
    """The attention call with a mask that leaves the self edge only, scores and softmax and all."""
    mask = Mask(lambda query, key: query == key)
    return attention(given.query, given.key, given.value, given.scale, mask=mask, softcap=given.softcap)


def _among(numbers: list[int], of: int) -> np.ndarray:
    chosen = np.zeros(of, dtype=bool)
    chosen[numbers] = True
    return chosen


def _draw(audit: View) -> list[Chart]:
    charts = []
    if "straight_cost" in audit:
        cost = audit["straight_cost"]
        most = max(float(np.nanpercentile(np.abs(cost.values), 95)), 1e-9)
        charts.append(
            Chart(
                "What it costs when one head may look only at itself",
                "Change of the mean loss in nats per token, one head at a time. Colours end at the 95th percentile "
                f"of the sizes, {most:.2g}; negative: the loss falls.",
                [grid(cost, "cost", zmin=-most, zmax=most, zmid=0, colorscale="RdBu")], "head",
                "layer",
            )
        )  # fmt: skip
    if "straight_joint" in audit:
        joint, error = audit["straight_joint"], audit.get("straight_joint_error")
        charts.append(
            Chart(
                "What it costs when several heads may look only at themselves",
                "Measured together, the cheapest heads first. The points are those of a bisection that looks for the "
                "budget of the audit.",
                [line("together", joint.folded, joint, error)], "heads", "nats per token",
            )
        )  # fmt: skip
    return charts


CLAUSES: tuple[Clause, ...] = (
    Clause(
        8,
        "Self-only is linear",
        "An attention layer that may look only at itself is a linear layer.",
        straight,
        _draw,
    ),
)
