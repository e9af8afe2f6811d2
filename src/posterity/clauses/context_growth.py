"""Clause 5: the part of the future grows with the context."""

import math

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from posterity.axes import WRITTEN
from posterity.clauses.clause import Clause, labelled_array, margin_of_error, with_long_name
from posterity.clauses.drawing import Chart, View, expected_line, measured_line
from posterity.clauses.subject import Subject
from posterity.measurement.measure import measure
from posterity.models.attach import watch_model
from posterity.results import stats
from posterity.results.audit_schema import FAILS, HOLDS, MIXED, Figure, Finding
from posterity.results.formatting import list_parts

CLAIMS = ("key credit", "value credit", "W_K", "W_V")  # curves whose exponent decides
SELF_WEIGHT = "mean a_ii"
CURVES = (*CLAIMS, SELF_WEIGHT)


def measure_growth(subject: Subject) -> Finding:
    """Measure self shares of the same text cut into windows of several lengths N, and their exponents in N.

    An exponent is the slope of log(share) over log N by least squares; its error is a jackknife over blocks of the
    text as long as the longest context, each of which holds whole windows of every length. The claim: the exponent is
    negative, so that the part of the edges from later queries grows. Counting gives about -1; on the value path of
    linear read-outs the share would be the mean of a_ii, whose exponent is measured beside it.
    """
    contexts = subject.plan.contexts
    blocks = _blocks(subject)
    fractions: dict[str, list[np.ndarray]] = {name: [] for name in CURVES}  # (part or whole, block), for every context
    layer_shares: list[xr.DataArray] = []
    steps = len(contexts) * len(blocks)
    with watch_model(subject.model), subject.progress(steps, "contexts", "blocks") as advance:
        for context in contexts:
            results = [_measure_block(subject, ids, context) for ids in blocks]
            for name in CURVES:
                fractions[name].append(np.array([_part_and_whole(result, name) for result in results]).T)
            layer_shares.append(_layer_shares(results))
            advance(len(blocks), len(blocks) * contexts[-1])
    fits = {name: _exponent(np.stack(values), contexts) for name, values in fractions.items()}
    layers = xr.concat(layer_shares, xr.Variable("context", list(contexts))).transpose("context", "stream", "layer")
    crossover = _crossover(layers)
    verdict, reason = _judge(fits, crossover, contexts[-1], len(blocks))
    shares = np.stack([[part.sum() / total.sum() for part, total in values] for values in fractions.values()])
    variables = {
        "share": labelled_array("curve context", shares, "self share", curve=list(CURVES), context=list(contexts)),
        "layer": with_long_name(layers, "self share of a layer"),
        "from": with_long_name(crossover, "context from which on the self edge has less than half", "tokens"),
    }
    return Finding([_figure(name, *fit, len(blocks)) for name, fit in fits.items()], verdict, reason, variables)


def _blocks(subject: Subject) -> tuple[Tensor, ...]:
    """Return the token ids of the first blocks of the text, each as long as the longest context."""
    longest = subject.plan.contexts[-1]
    text = torch.cat(subject.windows(longest, max(1, subject.plan.span // longest)))
    return text.split(longest)


def _measure_block(subject: Subject, ids: Tensor, context: int) -> xr.Dataset:
    """Return the result of one block of the text, cut into windows of a length."""
    windows = ids[: len(ids) // context * context].view(-1, context)
    return measure(
        subject.model, None, windows, context=context, limit=None, lags="self", batch=max(1, min(16, 512 // context)),
        progress=False, seed=subject.plan.seed,
    )  # fmt: skip


def _part_and_whole(result: xr.Dataset, curve: str) -> tuple[float, float]:
    """Return numerator and denominator of a self share, over all layers, heads and windows."""
    if curve == SELF_WEIGHT:
        heads, self_weight = float(stats.existing_heads(result).sum()), result.attention.isel(lag=0)
        return float(self_weight.sum()), heads * result.sizes["document"] * (int(result.position_end[-1]) + 1)
    if curve.startswith("W_"):
        norms = result.weight_by_document.sel(stream={"W_K": "key", "W_V": "value"}[curve]).sum(
            ("document", "layer"), skipna=False
        )
        own, other, inner = (float(norms.sel(term=term)) for term in ("self", "other", "inner"))
        return own + inner, own + other + 2 * inner
    credit = result.credit_by_document.sel(stream=curve.split()[0]).sum(("document", "layer", "head", "reader_of"))
    return float(credit.sel(side="self")), float(credit.sum())


def _layer_shares(results: list[xr.Dataset]) -> xr.DataArray:
    """Return the self share of the credit by layer and stream, over all blocks."""
    summed = ("document", "head", "reader_of")
    by_block: list[xr.DataArray] = [result.credit_by_document.sum(summed) for result in results]
    credit = xr.concat(by_block, "block").sum("block")
    return (credit.sel(side="self", drop=True) / credit.sum("side")).sel(stream=list(WRITTEN))


def _exponent(fractions: np.ndarray, contexts: tuple[int, ...]) -> tuple[float, float]:
    """Return the slope of log(share) over log N, and its jackknife error over blocks.

    Args:
        fractions: (context, part or whole, block).
        contexts: The lengths N.
    """

    def slope(blocks: np.ndarray) -> float:
        share = fractions[:, 0, blocks].sum(-1) / fractions[:, 1, blocks].sum(-1)
        if (share <= 0).any() or not np.isfinite(share).all():
            return math.nan
        return float(np.polyfit(np.log(contexts), np.log(share), 1)[0])

    blocks = np.arange(fractions.shape[-1])
    if len(blocks) < 2:
        return slope(blocks), math.nan
    slopes = np.array([slope(blocks[blocks != omitted]) for omitted in blocks])
    return slope(blocks), float(np.sqrt((len(blocks) - 1) / len(blocks) * ((slopes - slopes.mean()) ** 2).sum()))


def _crossover(share: xr.DataArray) -> xr.DataArray:
    """Return the smallest context from which on the self share is below one half, by stream and layer; NaN for none."""
    below = (share < 0.5).transpose("context", ...)
    from_here_on = np.flip(np.logical_and.accumulate(np.flip(below.values, 0), 0), 0)
    contexts = share.context.values.astype(float)
    first = np.where(from_here_on.any(0), contexts[from_here_on.argmax(0)], math.nan)
    return share.isel(context=0, drop=True).transpose(*below.dims[1:]).copy(data=first)


def _figure(curve: str, slope: float, error: float, blocks: int) -> Figure:
    counting = curve != SELF_WEIGHT
    return Figure(
        f"exponent of the self share: {curve}",
        value=slope,
        error=error,
        windows=blocks,
        baseline=-1.0 if counting else math.nan,
        formula="slope of log(self share) over log N",
        expected="counting: 2/(N + 1)" if counting else "",
    )


def _judge(fits: dict[str, tuple[float, float]], crossover: xr.DataArray, longest: int, blocks: int) -> tuple[str, str]:
    """Return the verdict and the reason, from slopes with errors, and from where each layer crosses one half."""
    claims = {name: fits[name] for name in CLAIMS}
    falling = [name for name, (slope, error) in claims.items() if slope + margin_of_error(error, blocks) < 0]
    rising = [name for name, (slope, error) in claims.items() if slope - margin_of_error(error, blocks) > 0]
    verdict = HOLDS if len(falling) == len(claims) else FAILS if not falling else MIXED
    reason = f"the self share falls with the context in {len(falling)} of {len(claims)} curves"
    reason += f" and rises for {', '.join(rising)}" if rising else ""
    for stream in WRITTEN:
        layers = list_parts(np.isnan(crossover.sel(stream=stream).values))
        reason += f"; the {stream} credit of {layers} is mostly self up to {longest} tokens" if layers else ""
    return verdict, reason


def _draw_growth(audit: View) -> list[Chart]:
    share, layers = audit.growth_share, audit.growth_layer
    contexts = share.context.values
    traces = [measured_line(str(curve), contexts, share.sel(curve=curve)) for curve in share.curve.values]
    traces.append(expected_line("counting: 2/(N + 1)", contexts, 2 / (contexts + 1)))
    charts = [
        Chart("Self share against the length of the context", "The same text, cut into windows of N tokens. A straight "
              "line is a power of N; counting alone falls like 1/N.", traces, "context N", "self share",
              log="xy"),
    ]  # fmt: skip
    for stream in WRITTEN:
        by_layer = layers.sel(stream=stream)
        lines = [measured_line(f"N = {context}", by_layer.layer, by_layer.sel(context=context)) for context in contexts]
        charts.append(
            Chart(
                f"Self share of the {stream} credit by layer",
                "Below one half, most arrives over edges from later queries.",
                lines,
                "layer",
                "self share",
            )
        )
    return charts


GROWTH = Clause(
    number=5,
    name="It grows with the context",
    statement="The longer the context, the smaller the part of the gradient that arrives over the self edge.",
    prefix="growth",
    measure=measure_growth,
    draw=_draw_growth,
    cost=3,
)
