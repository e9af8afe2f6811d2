"""Row 9: a key and a value are trained on average over the futures they may meet."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posterity.axes import WRITTEN
from posterity.clauses.clause import Clause, Subject, array, judge
from posterity.clauses.continuations import Pull, pulls, read, recurring, sample, verify
from posterity.clauses.drawing import Chart, View, line
from posterity.clauses.pasts import COMMON, PASTS, all_windows, pooled, spread
from posterity.decomposition.credit import finite
from posterity.inputs import windows as corpus
from posterity.models.attach import watching
from posterity.models.language_model import frozen
from posterity.results.audit_schema import FAILS, HOLDS, MIXED, Figure, Finding
from posterity.results.formatting import percent
from posterity.results.stats import mean_and_error

NGRAM = 16  # tokens that must recur in the text, with other futures, for real futures to be compared
BROKEN = 4.0  # standard errors of a mean that vanishes by law


def on_average_over_futures(subject: Subject) -> Finding:
    """How each future pulls on a cached key or value, and what is left on average over futures.

    The pull g of a continuation is the gradient of its log-likelihood at the entry. For continuations that the model
    draws itself the mean of g is zero (the score identity), and E|g|² is the Fisher information of the entry about
    its future. For futures of the text it is not. consensus = mean of g_r.g_s over pairs r != s, over the mean of |g|²
    (sums over entries first), is |E g|² / E|g|² without bias: the part of a future's squared pull that all share.

    Holds if futures pull at all (information beyond two standard errors), the law is kept (|z| of at most 4), and where
    the text has n-grams with several futures, their consensus is below one half in (nearly) every layer: then most of
    what one future asks of a key, others do not ask, and training follows the average. Consensus is what decides,
    for the information is positive wherever the future is read at all, and the law only proves the instrument.
    """
    plan, generator = subject.plan, subject.generator(9)
    windows = all_windows(subject, plan.prefix + plan.future)
    windows = [windows[at] for at in spread(len(windows), plan.prefixes, generator)]
    first = _first_tokens(subject)
    length = max(1, min(NGRAM, plan.prefix - len(first)))
    repeated = recurring(_texts(subject, first), length, plan.future, plan.prefixes, plan.draws, generator)
    drawn, real = _Pulls(), _Pulls()
    total = len(windows) + len(repeated)
    with frozen(subject.model), watching(subject.model), subject.bar(total, "futures", "prefixes") as advance:
        for window in windows:
            prefix, future = read(subject.model, window[: plan.prefix]), window[plan.prefix :]
            if window is windows[0]:
                verify(subject.model, prefix, future)
            samples = sample(subject.model, prefix, plan.draws, plan.future, generator)
            drawn.add(pulls(subject.model, prefix, torch.cat((samples, future[None]))), plan.draws)
            advance(1, len(window) + samples.numel())
        for ngram, continuations in repeated:
            prefix = read(subject.model, torch.cat((first, ngram)))
            if ngram is repeated[0][0]:
                verify(subject.model, prefix, continuations[0])
            real.add(pulls(subject.model, prefix, continuations), len(continuations))
            advance(1, continuations.numel())
    return _finding(drawn, real)


def _first_tokens(subject: Subject) -> Tensor:
    """What the tokenizer puts in front of every text; nothing where documents are token ids."""
    words = any(isinstance(document, str) for _, document in corpus.named(subject.documents))
    return corpus.whole("", subject.tokenizer) if words else torch.zeros(0, dtype=torch.int64)


def _texts(subject: Subject, first: Tensor) -> list[Tensor]:
    """Token ids of all documents, without what the tokenizer puts in front of them."""
    documents = [document for _, document in corpus.named(subject.documents)]
    return [corpus.whole(one, subject.tokenizer)[len(first) * isinstance(one, str) :] for one in documents]


class _Pulls:
    """What is kept of the pulls of every prefix: float64, NaN for heads that a layer has not."""

    def __init__(self):
        self.products: list[np.ndarray] = []  # of each prefix: (layer, written, kv_head, draw, draw)
        self.squares: list[np.ndarray] = []  # of each prefix, mean over draws: (layer, written, kv_head, position)
        self.others: list[np.ndarray] = []  # squared pull of the continuation after the draws: (layer, written)

    def add(self, layers: list[Pull], draws: int) -> None:
        """The pulls of one prefix, of which the first `draws` are draws."""
        heads = max(x.shape[1] for pair in layers for x in pair)
        squares = np.full((len(layers), 2, heads, layers[0][0].shape[2]), math.nan)
        products = np.full((len(layers), 2, heads, draws, draws), math.nan)
        others = np.full((len(layers), 2), math.nan)
        for at, pair in enumerate(layers):
            for stream, grads in enumerate(pair):
                x = grads.detach().cpu().double().transpose(0, 1)  # head, draw, position, dim
                finite(x, "the gradient at cached keys and values")
                flat = x[:, :draws].flatten(2)
                products[at, stream, : len(x)] = (flat @ flat.mT).numpy()
                squares[at, stream, : len(x)] = x[:, :draws].square().sum(-1).mean(1).numpy()
                others[at, stream] = x[:, draws:].square().sum().item()
        self.products.append(products)
        self.squares.append(squares)
        self.others.append(others)

    def consensus(self) -> tuple[np.ndarray, np.ndarray]:
        """|mean pull|² over mean |pull|², sums over heads and positions, and its error: (layer, written)."""
        both = [unbiased(np.nansum(one, 2)) for one in self.products]
        return pooled(*(np.stack(one) for one in zip(*both, strict=True)))

    def whole_consensus(self) -> tuple[np.ndarray, np.ndarray]:
        """The same, with sums over layers: (written,)."""
        both = [unbiased(np.nansum(one, (0, 2))) for one in self.products]
        return pooled(*(np.stack(one) for one in zip(*both, strict=True)))


def unbiased(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean inner product of two different draws, and mean squared norm, from all products (..., draw, draw)."""
    draws = products.shape[-1]
    own = np.trace(products, axis1=-2, axis2=-1)
    return (products.sum((-2, -1)) - own) / (draws * (draws - 1)), own / draws


def score(products: np.ndarray) -> np.ndarray:
    """z of the law that the mean pull of the model's own futures is zero; from products (prefix, ..., draw, draw).

    T = sum of g_r.g_s over pairs r < s of draws of the same prefix has mean zero, for draws are independent and each
    has mean zero. For the same reason two different pairs are uncorrelated, also if they share a draw (given the shared
    one, the product is linear in one of mean zero), as are pairs of different prefixes: the variance of T is the sum of
    the mean squares of its terms, and the sum of their squares is an unbiased estimate of it.
    """
    one, two = np.triu_indices(products.shape[-1], 1)
    pairs = products[..., one, two]
    with np.errstate(invalid="ignore", divide="ignore"):
        return pairs.sum((0, -1)) / np.sqrt((pairs**2).sum((0, -1)))


def _finding(drawn: _Pulls, real: _Pulls) -> Finding:
    squares, products = np.stack(drawn.squares), np.stack(drawn.products)
    information, information_error = mean_and_error(np.nanmean(squares, (1, 3, 4)))
    z = score(np.nansum(products, (1, 3)))
    norms = np.nansum(squares, (3, 4))
    others = np.stack(drawn.others)
    ratio, ratio_error = pooled(others.sum(1), norms.sum(1))
    known = bool(real.products)
    nothing = np.full(2, math.nan), np.full(2, math.nan)
    own, common = drawn.whole_consensus(), real.whole_consensus() if known else nothing
    figures = []
    for at, stream in enumerate(WRITTEN):
        figures += [
            Figure(f"information of a {stream} about its future", information[at], information_error[at], 0.0,
                   "E|g|² of the model's own futures, a mean over entries", "no future reads it", "nats²"),
            Figure(f"z of the mean pull on {stream}s", z[at], 1.0, 0.0,
                   "sum of g_r·g_s over pairs of draws, over its standard error", "zero by law (the score identity)"),
            Figure(f"consensus of drawn futures on {stream}s", own[0][at], own[1][at], 0.0,
                   "mean of g_r·g_s over pairs, over the mean of |g|²", "zero by law (the score identity)"),
            Figure(f"consensus of real futures on {stream}s", common[0][at], common[1][at], 0.0,
                   "the same, over different futures of n-grams that recur", "nothing in common"),
            Figure(f"real over drawn squared pull on {stream}s", ratio[at], ratio_error[at], 1.0,
                   "|g|² of the real future over E|g|² of drawn ones", "text like the model's own"),
        ]  # fmt: skip
    by_layer = real.consensus() if known else tuple(np.full(norms.shape[1:], math.nan) for _ in range(2))
    verdict, reason = _judged(information, information_error, z, common, by_layer, len(real.products))
    variables = _variables(squares, products, drawn.consensus(), by_layer, pooled(others, norms))
    return Finding(figures, verdict, reason, variables)


def _judged(information, information_error, z, common, by_layer, ngrams: int) -> tuple[str, str]:
    """Verdict and reason; `common` (written,) and `by_layer` (layer, written) are pairs of real consensus and error."""
    if not (np.abs(z) <= BROKEN).all():
        worst = z[np.argmax(np.nan_to_num(np.abs(z), nan=math.inf))]
        return MIXED, f"the mean pull of the model's own futures should vanish, but z = {worst:.1f}: nothing is said"
    if not (information > 2 * np.nan_to_num(information_error)).all():
        return FAILS, "no pull of the future on keys and values is seen beyond two standard errors"
    start = f"futures pull on keys and values and cancel on average as they must (|z| up to {np.abs(z).max():.1f}); "
    if not ngrams:
        return HOLDS, start + "what real futures have in common is not known: no n-gram recurs with different futures"
    verdicts = [judge(by_layer[0][:, at], by_layer[1][:, at], COMMON, more=False) for at in range(len(WRITTEN))]
    parts = []
    for at, stream in enumerate(WRITTEN):
        against = f" (above one half in {verdicts[at][1]})" if verdicts[at][1] else ""
        parts.append(f"{percent(common[0][at], common[1][at])} for {stream}s{against}")
    names = {verdict for verdict, _, _ in verdicts}
    reason = f"{start}real futures of {ngrams} recurring n-grams share of their squared pull {' and '.join(parts)}"
    return names.pop() if len(names) == 1 else MIXED, reason


def _variables(squares, products, own, common, ratio) -> dict:
    """Everything by layer; `own`, `common` (consensus of drawn and of real futures) and `ratio` with their errors."""
    written: dict[str, Any] = {"written": list(WRITTEN)}
    positions = squares.shape[-1]
    lags = positions + 1 - np.arange(positions)  # the first predicted token stands at `positions` + 1
    layers, layers_error = mean_and_error(np.nanmean(squares, (3, 4)))
    by_lag = np.nanmean(squares, (0, 3))[..., ::-1]
    heads = np.moveaxis(squares.mean((0, 4)), 1, 2)
    label, error = "Fisher information of an entry about its future", "standard error over prefixes"
    consensus = [np.stack(one, -1) for one in zip(own, common, strict=True)]
    source: dict[str, Any] = written | {"future": ["drawn", "real"]}
    return {
        "futures_information": array("layer written lag", by_lag, label, "nats²", **written, lag=lags[::-1]),
        "futures_information_by_layer": array("layer written", layers, label, "nats²", **written),
        "futures_information_by_layer_error": array("layer written", layers_error, error, "nats²", **written),
        "futures_information_by_head": array("layer kv_head written", heads, label, "nats²", **written),
        "futures_z": array("layer written", score(np.nansum(products, 3)), "z of the mean pull", **written),
        "futures_consensus": array("layer written future", consensus[0], "consensus of futures", **source),
        "futures_consensus_error": array("layer written future", consensus[1], error, **source),
        "futures_ratio": array("layer written", ratio[0], "squared pull, real over drawn", **written),
        "futures_ratio_error": array("layer written", ratio[1], error, **written),
    }


def _draw_futures(audit: View) -> list[Chart]:
    charts = []
    log = {"yaxis": {"type": "log"}}
    if "futures_information" in audit:
        found = audit["futures_information"].mean("layer")
        traces = [line(str(one), found.lag, found.sel(written=one)) for one in found.written.values]
        text = (
            "E|gradient|² of a future's log-likelihood at an entry, by its distance to the first token of the future."
        )
        charts.append(Chart("Information about the future, by lag", text, traces, "lag", "nats²", log))
    if "futures_information_by_layer" in audit:
        traces = _by_layer(audit, "futures_information_by_layer")
        text = "Mean over the entries of a layer."
        charts.append(Chart("Information about the future, by layer", text, traces, "layer", "nats²", log))
    if "futures_consensus" in audit:
        traces = _by_layer(audit, "futures_consensus")
        text = "At 1 all futures pull alike, at 0 they have nothing in common. Drawn futures have none, by law."
        charts.append(Chart("Consensus of futures, by layer", text, traces, "layer", "consensus"))
    if "futures_z" in audit:
        text = "The mean pull of the model's own futures is zero; in standard errors, most layers lie within 2."
        charts.append(Chart("The law of the mean pull", text, _by_layer(audit, "futures_z"), "layer", "z"))
    return charts


def _by_layer(audit: View, name: str) -> list[dict]:
    """A line for each stream, and for each kind of future."""
    found, error = audit[name], audit.get(f"{name}_error")
    errors = None if error is None else error.reindex_like(found)
    places = [{"written": stream} for stream in found.written.values]
    if "future" in found.dims:
        places = [one | {"future": future} for one in places for future in found.future.values]
    return [
        line(", ".join(map(str, at.values())), found.layer, found.sel(at), None if errors is None else errors.sel(at))
        for at in places
    ]


FUTURES = Clause(
    9, "On average over futures", "A key and a value are trained on average over the futures they may meet.",
    on_average_over_futures, _draw_futures,
)  # fmt: skip
CLAUSES: tuple[Clause, ...] = (FUTURES, PASTS)
