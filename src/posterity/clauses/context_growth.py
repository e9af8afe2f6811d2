"""Row 5: the part of the future grows with the context."""

import math

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from posterity.axes import WRITTEN
from posterity.clauses.clause import Clause, Subject, array, labelled
from posterity.clauses.drawing import Chart, View, line
from posterity.inputs import windows as corpus
from posterity.measurement.measure import measure
from posterity.models.attach import watching
from posterity.results import stats as derived
from posterity.results.audit_schema import FAILS, HOLDS, MIXED, Figure, Finding
from posterity.results.formatting import named

CURVES = ("key credit", "value credit", "W_K", "W_V", "mean a_ii")


def growth(subject: Subject) -> Finding:
    """Self shares of the same text cut into windows of several lengths N, and their exponents in N.

    An exponent is the slope of log(share) over log N by least squares; its error is a jackknife over blocks of the
    text as long as the longest context, each of which holds whole windows of every length. The claim: the exponent is
    negative, so that the future's part grows with the context. Counting gives about -1; on the value path of linear
    read-outs the share would be the mean of a_ii, whose exponent is measured beside it.
    """
    contexts, span = subject.plan.contexts, subject.plan.span
    text = _stretch(subject, span)
    longest = contexts[-1]
    blocks = len(text) // longest
    lines: dict[str, list[np.ndarray]] = {}  # of each curve (part or whole, block), for every context
    by_layer: list[xr.DataArray] = []
    with watching(subject.model), subject.bar(len(contexts) * blocks, "contexts", "blocks") as advance:
        for context in contexts:
            parts = [_block(subject, ids, context) for ids in text[: blocks * longest].split(longest)]
            for name in CURVES:
                lines.setdefault(name, []).append(np.array([_part_and_whole(part, name) for part in parts]).T)
            by_layer.append(_pooled(parts))
            advance(blocks, blocks * longest)
    fits = {name: _exponent(np.stack(values), contexts) for name, values in lines.items()}
    figures = [
        Figure(
            f"exponent of the self share: {name}", *fits[name], -1.0 if name != "mean a_ii" else math.nan,
            "slope of log(self share) over log N", "counting: 2/(N + 1)" if name != "mean a_ii" else "",
        )
        for name in lines
    ]  # fmt: skip
    layers = xr.concat(by_layer, xr.Variable("context", list(contexts))).transpose("context", "stream", "layer")
    first = _future_from(layers)
    claims = {name: fit for name, fit in fits.items() if name != "mean a_ii"}
    falling = [name for name, (slope, error) in claims.items() if slope + 2 * np.nan_to_num(error) < 0]
    rising = [name for name, (slope, error) in claims.items() if slope - 2 * np.nan_to_num(error) > 0]
    verdict = HOLDS if len(falling) == len(claims) else FAILS if not falling else MIXED
    never = {stream: named(np.isnan(first.sel(stream=stream).values)) for stream in WRITTEN}
    reason = (
        f"the self share falls with the context in {len(falling)} of {len(claims)} curves"
        + (f" and rises for {', '.join(rising)}" if rising else "")
        + "".join(
            f"; the {stream} credit of {words} is mostly self up to {longest} tokens"
            for stream, words in never.items()
            if words
        )
    )
    shares = np.stack([[both[0].sum() / both[1].sum() for both in values] for values in lines.values()])
    variables = {
        "growth_share": array("curve context", shares, "self share", curve=list(lines), context=list(contexts)),
        "growth_layer": labelled(layers, "self share of a layer"),
        "growth_from": labelled(first, "context from which on the future has more than half", "tokens"),
    }
    return Finding(figures, verdict, reason, variables)


def _stretch(subject: Subject, span: int) -> Tensor:
    """The first tokens of the text as one row, cut to whole blocks of the longest context."""
    longest = subject.plan.contexts[-1]
    windows = corpus.windows(subject.documents, subject.tokenizer, longest, max(1, span // longest))
    return torch.cat([window.ids for window in windows])


def _block(subject: Subject, ids: Tensor, context: int) -> xr.Dataset:
    """The result of one block of the text, cut into windows of a length."""
    windows = ids[: len(ids) // context * context].view(-1, context)
    return measure(
        subject.model, None, windows, context=context, lags="self", batch=max(1, min(16, 512 // context)),
        progress=False, seed=subject.plan.seed,
    )  # fmt: skip


def _part_and_whole(result: xr.Dataset, curve: str) -> tuple[float, float]:
    """Numerator and denominator of a self share, over all layers, heads and windows."""
    if curve == "mean a_ii":
        heads, own = float(derived.present(result).sum()), result.attention.isel(lag=0)
        return float(own.sum()), heads * result.sizes["document"] * result.sizes["position"]
    if curve.startswith("W_"):
        norms = result.weight_by_document.sel(stream={"W_K": "key", "W_V": "value"}[curve]).sum(("document", "layer"))
        own, other, inner = (float(norms.sel(term=term)) for term in ("self", "other", "inner"))
        return own + inner, own + other + 2 * inner
    credit = result.credit_by_document.sel(stream=curve.split()[0]).sum(("document", "layer", "head"))
    return float(credit.sel(side="self")), float(credit.sum())


def _pooled(parts: list[xr.Dataset]) -> xr.DataArray:
    """Self share of the credit by layer and stream, over all blocks."""
    blocks: list[xr.DataArray] = [part.credit_by_document.sum(("document", "head")) for part in parts]
    credit = xr.concat(blocks, "block").sum("block")
    return (credit.sel(side="self", drop=True) / credit.sum("side")).sel(stream=list(WRITTEN))


def _exponent(values: np.ndarray, contexts: tuple[int, ...]) -> tuple[float, float]:
    """Slope of log(share) over log N, its jackknife error over blocks; `values`: (context, part or whole, block)."""

    def slope(kept: np.ndarray) -> float:
        share = values[:, 0, kept].sum(-1) / values[:, 1, kept].sum(-1)
        if (share <= 0).any() or not np.isfinite(share).all():
            return math.nan
        return float(np.polyfit(np.log(contexts), np.log(share), 1)[0])

    blocks = np.arange(values.shape[-1])
    if len(blocks) < 2:
        return slope(blocks), math.nan
    left = np.array([slope(blocks[blocks != one]) for one in blocks])
    return slope(blocks), float(np.sqrt((len(blocks) - 1) / len(blocks) * ((left - left.mean()) ** 2).sum()))


def _future_from(share: xr.DataArray) -> xr.DataArray:
    """The smallest context from which on the self share is below one half, by stream and layer; NaN for none."""
    below = (share < 0.5).transpose("context", ...)
    lasting = np.flip(np.logical_and.accumulate(np.flip(below.values, 0), 0), 0)
    contexts = share.context.values.astype(float)
    first = np.where(lasting.any(0), contexts[lasting.argmax(0)], math.nan)
    return share.isel(context=0, drop=True).transpose(*below.dims[1:]).copy(data=first)


def _draw_growth(audit: View) -> list[Chart]:
    share, layers = audit.growth_share, audit.growth_layer
    contexts = share.context.values
    traces = [line(str(curve), contexts, share.sel(curve=curve)) for curve in share.curve.values]
    traces.append(line("counting: 2/(N + 1)", contexts, 2 / (contexts + 1), line={"dash": "dot"}))
    charts = [
        Chart("Self share against the length of the context", "The same text, cut into windows of N tokens. A straight "
              "line is a power of N; counting alone falls like 1/N.", traces, "context N", "self share",
              {"xaxis": {"type": "log"}, "yaxis": {"type": "log"}}),
    ]  # fmt: skip
    for stream in WRITTEN:
        one = layers.sel(stream=stream)
        each = [line(f"N = {context}", one.layer, one.sel(context=context)) for context in contexts]
        charts.append(
            Chart(
                f"Self share of the {stream} credit by layer",
                "Below one half, the future dominates.",
                each,
                "layer",
                "self share",
            )
        )
    return charts


GROWTH = Clause(
    5, "It grows with the context", "The longer the context, the more the later readers outweigh the own one.", growth,
    _draw_growth,
)  # fmt: skip
