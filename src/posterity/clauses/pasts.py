"""Clause 10: a query is trained on average over the pasts it meets. The same tokens behind several pasts."""

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from posterity.clauses.agreement import HALF, Agreement, SegmentVectors
from posterity.clauses.clause import Clause, judge, labelled_array, margin_of_error
from posterity.clauses.drawing import Chart, View, expected_line, growing_colours, head_map, measured_line
from posterity.clauses.subject import Subject, spread_indices
from posterity.decomposition.credit import check_finite
from posterity.errors import InputError
from posterity.models.attach import observe_model
from posterity.models.chunked_loss import token_losses
from posterity.models.language_model import freeze_parameters, input_device
from posterity.models.watch import Layer
from posterity.ops.attention import Backward
from posterity.results.audit_schema import SHARE, Figure, Finding
from posterity.results.formatting import list_parts, percent

LayerGradient = tuple[
    Tensor, Tensor
]  # gradient at the queries of one layer, and the queries: (past, head, offset, dim)


def measure_pasts(subject: Subject) -> Finding:
    """Measure how far the gradients at the queries of the same tokens agree behind several pasts.

    A segment of C tokens stands behind R pasts of equal length, its own and those of other windows; the loss is that of
    the C - 1 predictions inside the segment. agreement = mean of g_r.g_s over pairs r != s, over the mean of |g|²,
    sums over positions (and heads) first: it is |E g|² / E|g|² without bias, 1 if all pasts pull alike, 0 if they have
    nothing in common. Chance is the same between different segments at equal offsets.

    Holds if in (nearly) every layer the agreement is below one half, so that most of the gradient behind one past is
    that past's own and only the average over pasts takes it away, and above chance, so that something is left of it.
    """
    plan, generator = subject.plan, subject.generator(10)
    if plan.future < 2:
        raise InputError(f"row 10 takes segments of at least 2 tokens; got a future of {plan.future}")
    windows = subject.all_windows(plan.prefix + plan.future)
    if len(windows) < 2:
        raise InputError(f"row 10 takes a text of at least two windows of {plan.prefix + plan.future} tokens; got one")
    indices = spread_indices(len(windows), plan.prefixes, generator)
    gradients, queries = SegmentVectors(), SegmentVectors()
    with freeze_parameters(subject.model), subject.progress(len(indices), "pasts", "segments") as advance:
        for index in indices:
            ids = place_behind_pasts(windows, index, plan.prefix, plan.draws, generator)
            layers = query_gradients(subject.model, ids, plan.prefix)
            gradients.add([gradient for gradient, _ in layers])
            queries.add([normalize(query, dim=-1) for _, query in layers])
            advance(1, ids.numel())
    return _finding(gradients.agreement(), queries.agreement())


def place_behind_pasts(windows: list[Tensor], index: int, past: int, draws: int, generator: torch.Generator) -> Tensor:
    """Return the end of a window behind its own past (the first row) and those of other windows: (past, token).

    Args:
        windows: Token ids.
        index: Which window's end.
        past: Tokens of a past.
        draws: How many pasts.
        generator: Draws the other windows.
    """
    order = torch.randperm(len(windows), generator=generator).tolist()
    others = [other for other in order if other != index][: draws - 1]
    return torch.stack([torch.cat((windows[row][:past], windows[index][past:])) for row in (index, *others)])


def query_gradients(model: PreTrainedModel, ids: Tensor, past: int) -> list[LayerGradient]:
    """Return, for each attention layer, the gradients of the losses inside a segment at its queries, and the queries.

    Args:
        model: With frozen parameters (`posterity.models.language_model.freeze_parameters`).
        ids: The same segment behind several pasts, (past, token).
        past: Tokens before the segment. The last query of the segment has no loss after it and is left out.

    Returns:
        Gradients in nats over the units of the query; (past, head, offset, dim) both.
    """
    gradients: dict[Layer, LayerGradient] = {}

    def observe(layer: Layer, back: Backward, projections: object) -> None:
        gradients[layer] = back.grad_query[:, :, past:-1], back.query[:, :, past:-1]

    with observe_model(model, observe) as watch:
        ids = ids.to(input_device(model))
        logits = model(input_ids=ids, use_cache=False).logits[:, past:-1]
        token_losses(logits, ids[:, past + 1 :]).sum().backward()
    for layer, (gradient, _) in gradients.items():
        check_finite(gradient, f"the gradient at the queries of layer {layer}")
    return [gradients[layer] for layer in watch.layers]


def _finding(gradients: Agreement, queries: Agreement) -> Finding:
    value, error, chance, _ = (float(x) for x in gradients.over(1, 2, 3))
    cosine, cosine_error, cosine_chance, _ = (float(x) for x in queries.over(1, 2, 3))
    figures = [
        Figure(
            "agreement of query gradients over pasts",
            value=value,
            error=error,
            windows=len(gradients.norms),
            baseline=chance,
            formula="mean of g_r·g_s over pairs of pasts, over the mean of |g|²",
            expected="between segments at equal offsets",
            units=SHARE,
        ),
        Figure(
            "cosine between queries over pasts",
            value=cosine,
            error=cosine_error,
            windows=len(gradients.norms),
            baseline=cosine_chance,
            formula="mean cosine over pairs of pasts",
            expected="between segments at equal offsets",
        ),
    ]
    verdict, words = _judge(*gradients.over(2, 3), segments=len(gradients.norms))
    reason = (
        f"{percent(value, error, len(gradients.norms))} of the squared gradient behind one past is common to all pasts "
        f"(chance {percent(chance)}); the queries themselves have a cosine of {cosine:.2f}; {words}"
    )
    return Finding(figures, verdict, reason, _variables(gradients, queries))


def _variables(gradients: Agreement, queries: Agreement) -> dict[str, xr.DataArray]:
    layers, heads, offsets = gradients.over(2, 3), gradients.over(3), gradients.over(1, 2)
    agreement, chance = "agreement of query gradients over pasts", "agreement between segments"
    error, cosine = "standard error over segments", "cosine between queries over pasts"
    return {
        "agreement": labelled_array("layer head", heads[0], agreement),
        "agreement_error": labelled_array("layer head", heads[1], error),
        "chance": labelled_array("layer head", heads[2], chance),
        "by_layer": labelled_array("layer", layers[0], agreement),
        "by_layer_error": labelled_array("layer", layers[1], error),
        "chance_by_layer": labelled_array("layer", layers[2], chance),
        "by_offset": labelled_array("offset", offsets[0], f"{agreement}, by position in the segment"),
        "by_offset_error": labelled_array("offset", offsets[1], error),
        "chance_by_offset": labelled_array("offset", offsets[2], chance),
        "by_head_and_offset": labelled_array("layer head offset", gradients.over()[0], agreement),
        "cosine": labelled_array("layer head", queries.over(3)[0], cosine),
        "cosine_by_layer": labelled_array("layer", queries.over(2, 3)[0], cosine),
        "cosine_by_offset": labelled_array("offset", queries.over(1, 2)[0], cosine),
    }


def _judge(
    value: np.ndarray, error: np.ndarray, chance: np.ndarray, chance_error: np.ndarray, *, segments: int
) -> tuple[str, str]:
    """Judge each layer by the weaker of two claims: below one half, and above chance (0 where that is not known)."""
    margins = np.stack((HALF - value, value - np.nan_to_num(chance)))
    errors = np.stack((error, np.hypot(error, np.nan_to_num(chance_error))))
    weaker = np.argmin(margins, 0)[None]
    margin, margin_error = (np.take_along_axis(x, weaker, 0)[0] for x in (margins, errors))
    least = margin_of_error(margin_error, segments)
    verdict, _, confirming = judge(margin, least, 0.0)
    contradicting = (margin < 0) & (np.abs(margin) > least)
    alike, nothing = (list_parts(contradicting & (weaker[0] == claim)) for claim in (0, 1))
    words = [f"{confirming} of {len(value)} layers hold it"]
    words += [f"more than half is common in {alike}"] if alike else []
    words += [f"no more than chance in {nothing}"] if nothing else []
    return verdict, "; ".join(words)


def _draw_pasts(audit: View) -> list[Chart]:
    charts = []
    for axis, x, text in (
        ("layer", "layer", "At 1 every past pulls alike; at 0 pasts have nothing in common."),
        ("offset", "position in the segment", "The further into the segment, the more of the past is the same."),
    ):
        if f"pasts_by_{axis}" not in audit:
            continue
        value, chance = audit[f"pasts_by_{axis}"], audit.get(f"pasts_chance_by_{axis}")
        traces = [measured_line("gradients", value[axis], value, audit.get(f"pasts_by_{axis}_error"))]
        if (cosine := audit.get(f"pasts_cosine_by_{axis}")) is not None:
            traces.append(measured_line("queries (cosine)", cosine[axis], cosine))
        if chance is not None:
            traces.append(expected_line("gradients of other segments", chance[axis], chance))
        charts.append(Chart(f"Agreement over pasts, by {x}", text, traces, x, "agreement"))
    if "pasts_agreement" in audit:
        text = "How far the gradients at a head's queries agree behind several pasts."
        title, trace = "Agreement over pasts, by layer and head", head_map(audit["pasts_agreement"])
        charts.append(Chart(title, text, [trace], "head", "layer", colours=growing_colours()))
    return charts


PASTS = Clause(
    number=10,
    name="On average over pasts",
    statement="Queries are trained on average over the pasts they meet.",
    prefix="pasts",
    measure=measure_pasts,
    draw=_draw_pasts,
)
