"""Row 10: a query is trained on average over the pasts it meets. The same tokens behind several pasts."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, pad
from transformers import PreTrainedModel

from posterity.clauses.clause import Clause, Subject, array, judge
from posterity.clauses.drawing import Chart, View, grid, line
from posterity.decomposition.credit import finite
from posterity.errors import InputError
from posterity.inputs import windows as corpus
from posterity.measurement.measure import check_context, check_tokens
from posterity.models.attach import watched
from posterity.models.language_model import first_device, frozen
from posterity.models.watch import Layer
from posterity.ops.attention import Backward, working
from posterity.results.audit_schema import Figure, Finding
from posterity.results.formatting import named, percent
from posterity.results.stats import ratio

COMMON = 0.5  # of the squared gradient: with more, one past (or future) tells most of what all tell together


def on_average_over_pasts(subject: Subject) -> Finding:
    """How far the gradients at the queries of the same tokens agree behind several pasts.

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
    windows = all_windows(subject, plan.prefix + plan.future)
    if len(windows) < 2:
        raise InputError(f"row 10 takes a text of at least two windows of {plan.prefix + plan.future} tokens; got one")
    chosen = spread(len(windows), plan.prefixes, generator)
    pulled, asked = _Segments(), _Segments()
    with frozen(subject.model), subject.bar(len(chosen), "pasts", "segments") as advance:
        for own in chosen:
            ids = behind_pasts(windows, own, plan.prefix, plan.draws, generator)
            layers = query_gradients(subject.model, ids, plan.prefix)
            pulled.add([grad for grad, _ in layers])
            asked.add([normalize(query, dim=-1) for _, query in layers])
            advance(1, ids.numel())
    return _finding(pulled.agreement(), asked.agreement())


def all_windows(subject: Subject, context: int) -> list[Tensor]:
    """Token ids of all windows of a length, which the model is able to read."""
    check_context(subject.model, context)
    windows = corpus.windows(subject.documents, subject.tokenizer, context)
    check_tokens(subject.model, windows)
    return [window.ids for window in windows]


def spread(available: int, wanted: int, generator: torch.Generator) -> list[int]:
    """Windows spread over a text: one at random from each of `wanted` equal parts; all of them if there are fewer."""
    if available <= wanted:
        return list(range(available))
    within = torch.rand(wanted, generator=generator, dtype=torch.float64).tolist()
    edges = [available * part // wanted for part in range(wanted + 1)]
    return [low + int(u * (high - low)) for u, low, high in zip(within, edges[:-1], edges[1:], strict=True)]


def behind_pasts(windows: list[Tensor], own: int, past: int, draws: int, generator: torch.Generator) -> Tensor:
    """The end of a window behind its own past (the first row) and those of other windows: (past, token)."""
    order = torch.randperm(len(windows), generator=generator).tolist()
    others = [one for one in order if one != own][: draws - 1]
    return torch.stack([torch.cat((windows[one][:past], windows[own][past:])) for one in (own, *others)])


def query_gradients(model: PreTrainedModel, ids: Tensor, past: int) -> list[tuple[Tensor, Tensor]]:
    """Gradients of the losses inside a segment (nats) at its queries, and these: (past, head, offset, dim) each.

    Args:
        model: With frozen parameters (`posterity.models.language_model.frozen`).
        ids: The same segment behind several pasts, (past, token).
        past: Tokens before the segment. The last query of the segment has no loss after it and is left out.

    Returns:
        A pair for each attention layer.
    """
    found: dict[Layer, tuple[Tensor, Tensor]] = {}

    def observe(layer: Layer, back: Backward, project: object) -> None:
        found[layer] = back.grad_query[:, :, past:-1], back.query[:, :, past:-1]

    with watched(model, observe) as watch:
        ids = ids.to(first_device(model))
        logits = model(input_ids=ids, use_cache=False).logits[:, past:-1]
        targets = ids[:, past + 1 :].flatten().to(logits.device)
        cross_entropy(logits.to(working(logits.dtype)).flatten(0, 1), targets, reduction="sum").backward()
    for layer, (grad, _) in found.items():
        finite(grad, f"the gradient at the queries of layer {layer}")
    return [found[layer] for layer in watch.layers]


@dataclass(frozen=True)
class Agreement:
    """Of each segment: (document, layer, head, offset), NaN for heads that a layer has not."""

    pairs: np.ndarray  # mean inner product between two pasts
    norms: np.ndarray  # mean squared norm
    beside: np.ndarray  # mean inner product with another segment; NaN for one segment

    def over(self, *axes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Agreement and its error, chance and its error, with sums over axes (the document is 0)."""
        pairs, norms, beside = (np.nansum(x, axes) if axes else x for x in (self.pairs, self.norms, self.beside))
        beside = np.where(len(beside) > 1, beside, math.nan)
        return *pooled(pairs, norms), *_chance(beside, norms)


def pooled(part: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ratio of two sums over documents (the first axis), and its standard error."""
    dims = ["document", *(f"dim_{axis}" for axis in range(1, part.ndim))]
    with np.errstate(invalid="ignore", divide="ignore"):
        found = ratio(xr.DataArray(part, dims=dims), xr.DataArray(whole, dims=dims))
    return found.share.values, found.error.values


def _chance(beside: np.ndarray, norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean product between two segments over the mean squared norm; error by leaving out one segment at a time.

    Each pair of segments is in the sum of both, so that they are not independent; without segment a the pairs' sum
    loses its own n - 1 products twice.
    """
    number = len(norms)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = beside.sum(0) / norms.sum(0)
        if number < 3:
            return value, np.full_like(value, math.nan)
        pairs = (number - 1) * beside.sum(0) - 2 * (number - 1) * beside
        without = pairs / ((number - 1) * (number - 2)) / ((norms.sum(0) - norms) / (number - 1))
    return value, np.sqrt((number - 1) / number * ((without - without.mean(0)) ** 2).sum(0))


class _Segments:
    """Collects vectors of segments behind several pasts, layer by layer: (past, head, offset, dim)."""

    def __init__(self):
        self.pairs: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.means: list[list[Tensor]] = []

    def add(self, layers: list[Tensor]) -> None:
        """One more segment."""
        pairs, norms, means = [], [], []
        for x in layers:
            x = x.detach().cpu().double()
            rows, own, summed = len(x), x.square().sum((0, 3)), x.sum(0)
            pairs.append((summed.square().sum(-1) - own) / (rows * (rows - 1)))
            norms.append(own / rows)
            means.append(summed / rows)
        self.pairs.append(_stacked(pairs, 0))
        self.norms.append(_stacked(norms, 0))
        self.means.append(means)

    def agreement(self) -> Agreement:
        """Of all segments."""
        beside = []
        for layer in zip(*self.means, strict=True):
            means = torch.stack(layer)
            others = (means * (means.sum(0) - means)).sum(-1)
            beside.append(others / (len(means) - 1 or math.nan))
        pairs, norms = torch.stack(self.pairs), torch.stack(self.norms)
        return Agreement(pairs.numpy(), norms.numpy(), _stacked(beside, 1).numpy())


def _stacked(layers: list[Tensor], at: int) -> Tensor:
    """Layers side by side, at axis `at`; heads (the axis there before) that a layer has not are NaN."""
    heads = max(x.shape[at] for x in layers)
    return torch.stack([pad(x, (0, 0, 0, heads - x.shape[at]), value=math.nan) for x in layers], at)


def _finding(pulled: Agreement, asked: Agreement) -> Finding:
    value, error, chance, _ = pulled.over(1, 2, 3)
    cosine, cosine_error, cosine_chance, _ = asked.over(1, 2, 3)
    figures = [
        Figure("agreement of query gradients over pasts", float(value), float(error), float(chance),
               "mean of g_r·g_s over pairs of pasts, over the mean of |g|²", "between segments at equal offsets"),
        Figure("cosine between queries over pasts", float(cosine), float(cosine_error), float(cosine_chance),
               "mean cosine over pairs of pasts", "between segments at equal offsets"),
    ]  # fmt: skip
    layers, heads, offsets = pulled.over(2, 3), pulled.over(3), pulled.over(1, 2)
    verdict, words = _judged(*layers)
    reason = (
        f"{percent(float(value), float(error))} of the squared gradient behind one past is common to all pasts (chance "
        f"{percent(float(chance))}); the queries themselves have a cosine of {float(cosine):.2f}; {words}"
    )
    said = "agreement of query gradients over pasts"
    variables = {
        "pasts_agreement": array("layer head", heads[0], said),
        "pasts_agreement_error": array("layer head", heads[1], "standard error over segments"),
        "pasts_chance": array("layer head", heads[2], "agreement between segments"),
        "pasts_by_layer": array("layer", layers[0], said),
        "pasts_by_layer_error": array("layer", layers[1], "standard error over segments"),
        "pasts_chance_by_layer": array("layer", layers[2], "agreement between segments"),
        "pasts_by_offset": array("offset", offsets[0], f"{said}, by position in the segment"),
        "pasts_by_offset_error": array("offset", offsets[1], "standard error over segments"),
        "pasts_chance_by_offset": array("offset", offsets[2], "agreement between segments"),
        "pasts_by_head_and_offset": array("layer head offset", pulled.over()[0], said),
        "pasts_cosine": array("layer head", asked.over(3)[0], "cosine between queries over pasts"),
        "pasts_cosine_by_layer": array("layer", asked.over(2, 3)[0], "cosine between queries over pasts"),
        "pasts_cosine_by_offset": array("offset", asked.over(1, 2)[0], "cosine between queries over pasts"),
    }
    return Finding(figures, verdict, reason, variables)


def _judged(value: np.ndarray, error: np.ndarray, chance: np.ndarray, chance_error: np.ndarray) -> tuple[str, str]:
    """The claim of each layer is the weaker of two: below one half, and above chance (0 where that is not known)."""
    margins = np.stack((COMMON - value, value - np.nan_to_num(chance)))
    errors = np.stack((error, np.hypot(error, np.nan_to_num(chance_error))))
    weaker = np.argmin(margins, 0)[None]
    margin, spread_ = (np.take_along_axis(x, weaker, 0)[0] for x in (margins, errors))
    verdict, _, holding = judge(margin, spread_, 0.0)
    against = (margin < 0) & (np.abs(margin) > 2 * np.nan_to_num(spread_))
    alike, nothing = named(against & (weaker[0] == 0)), named(against & (weaker[0] == 1))
    words = [f"{holding} of {len(value)} layers hold it"]
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
        traces = [line("gradients", value[axis], value, audit.get(f"pasts_by_{axis}_error"))]
        if (cosine := audit.get(f"pasts_cosine_by_{axis}")) is not None:
            traces.append(line("queries (cosine)", cosine[axis], cosine))
        if chance is not None:
            traces.append(line("gradients of other segments", chance[axis], chance, line={"dash": "dot"}))
        charts.append(Chart(f"Agreement over pasts, by {x}", text, traces, x, "agreement"))
    if "pasts_agreement" in audit:
        heads = grid(audit["pasts_agreement"], "agreement", colorscale="Viridis")
        text = "How far the gradients at a head's queries agree behind several pasts."
        charts.append(Chart("Agreement over pasts, by layer and head", text, [heads], "head", "layer"))
    return charts


PASTS = Clause(
    10, "On average over pasts", "Queries are trained on average over the pasts they meet.",
    on_average_over_pasts, _draw_pasts,
)  # fmt: skip
