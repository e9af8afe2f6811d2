"""Clause 9: a key and a value are trained on average over the futures they may meet."""

import math
from typing import Any

import numpy as np
import torch
import xarray as xr
from plotly.graph_objects import Scatter
from torch import Tensor

from posterity.axes import WRITTEN
from posterity.clauses.agreement import HALF, pooled_ratio
from posterity.clauses.clause import Clause, common_verdict, judge, labelled_array, margin_of_error
from posterity.clauses.continuations import pulls, read_prefix, sample_continuations, verify_cache
from posterity.clauses.drawing import Chart, View, measured_line
from posterity.clauses.ngrams import recurring_ngrams
from posterity.clauses.pull_products import PullProducts, mean_pull_z
from posterity.clauses.subject import Subject, spread_indices
from posterity.inputs.documents import document_ids
from posterity.inputs.named_documents import name_documents
from posterity.models.attach import watch_model
from posterity.models.language_model import freeze_parameters
from posterity.results.audit_schema import FAILS, HOLDS, MIXED, SHARE, Figure, Finding
from posterity.results.formatting import percent
from posterity.results.stats import mean_and_error

NGRAM = 16  # tokens that must recur in the text, with other futures, for real futures to be compared
MAX_Z = 4.0  # standard errors of a mean that vanishes by law

Estimate = tuple[np.ndarray, np.ndarray]  # values and their standard errors


def measure_futures(subject: Subject) -> Finding:
    """Measure how each future pulls on a cached key or value, and what is left on average over futures.

    The pull g of a continuation is the gradient of its log-likelihood at the entry. For continuations that the model
    draws itself the mean of g is zero (the score identity), and E|g|² is the Fisher information of the entry about
    its future. For futures of the text it is not. consensus = mean of g_r.g_s over pairs r != s, over the mean of |g|²
    (sums over entries first), is |E g|² / E|g|² without bias: the part of a future's squared pull that all share.

    Holds if futures pull at all (information beyond the margin of error), the law is kept (|z| of at most 4), and where
    the text has n-grams with several futures, their consensus is below one half in (nearly) every layer: then most of
    what one future asks of a key, others do not ask, and training follows the average. Consensus is what decides,
    for the information is positive wherever the future is read at all, and the law only proves the instrument.
    """
    plan, model, generator = subject.plan, subject.model, subject.generator(9)
    windows = subject.all_windows(plan.prefix + plan.future)
    windows = [windows[index] for index in spread_indices(len(windows), plan.prefixes, generator)]
    special_tokens = _special_tokens(subject)
    length = max(1, min(NGRAM, plan.prefix - len(special_tokens)))
    ngrams = recurring_ngrams(
        _document_bodies(subject, len(special_tokens)), length, plan.future, plan.prefixes, plan.draws, generator
    )
    drawn, real = PullProducts(), PullProducts()
    prefixes = len(windows) + len(ngrams)
    with freeze_parameters(model), watch_model(model), subject.progress(prefixes, "futures", "prefixes") as advance:
        for index, window in enumerate(windows):
            prefix, future = read_prefix(model, window[: plan.prefix]), window[plan.prefix :]
            if index == 0:
                verify_cache(model, prefix, future)
            samples = sample_continuations(model, prefix, plan.draws, plan.future, generator)
            drawn.add(pulls(model, prefix, torch.cat((samples, future[None]))), plan.draws)
            advance(1, len(window) + samples.numel())
        for index, (ngram, futures) in enumerate(ngrams):
            prefix = read_prefix(model, torch.cat((special_tokens, ngram)))
            if index == 0:
                verify_cache(model, prefix, futures[0])
            real.add(pulls(model, prefix, futures), len(futures))
            advance(1, futures.numel())
    return _finding(drawn, real)


def _special_tokens(subject: Subject) -> Tensor:
    """Return the tokens that the tokenizer puts before every text; none where documents are token ids."""
    has_text = any(isinstance(document, str) for _, document in name_documents(subject.documents))
    return document_ids("", subject.tokenizer) if has_text else torch.zeros(0, dtype=torch.int64)


def _document_bodies(subject: Subject, special_tokens: int) -> list[Tensor]:
    """Return the token ids of all documents, without the special tokens before a text."""
    documents = [document for _, document in name_documents(subject.documents)]
    return [
        document_ids(document, subject.tokenizer)[special_tokens * isinstance(document, str) :]
        for document in documents
    ]


def _finding(drawn: PullProducts, real: PullProducts) -> Finding:
    squares, products = np.stack(drawn.squares), np.stack(drawn.products)
    information = mean_and_error(np.nanmean(squares, (1, 3, 4)))
    z = mean_pull_z(np.nansum(products, (1, 3)))
    norms, text_squares = np.nansum(squares, (3, 4)), np.stack(drawn.text_squares)
    if real.products:
        consensus, layer_consensus = real.model_consensus(), real.consensus()
    else:  # no n-gram recurs
        consensus, layer_consensus = _unknown_estimate(2), _unknown_estimate(norms.shape[1:])
    ratio = pooled_ratio(text_squares.sum(1), norms.sum(1))
    verdict, reason = _judge(information, z, consensus, layer_consensus, len(squares), len(real.products))
    figures = _figures(information, z, drawn.model_consensus(), consensus, ratio, len(squares), len(real.products))
    variables = _information_variables(squares) | _layer_variables(
        products, drawn.consensus(), layer_consensus, pooled_ratio(text_squares, norms)
    )
    return Finding(figures, verdict, reason, variables)


def _unknown_estimate(shape: int | tuple[int, ...]) -> Estimate:
    return np.full(shape, math.nan), np.full(shape, math.nan)


def _figures(
    information: Estimate,
    z: np.ndarray,
    drawn_consensus: Estimate,
    real_consensus: Estimate,
    ratio: Estimate,
    prefixes: int,
    ngrams: int,
) -> list[Figure]:
    """Return the figures of keys, then of values; all estimates are (written,)."""
    figures = []
    for index, stream in enumerate(WRITTEN):
        figures += [
            Figure(
                f"information of a {stream} about its future",
                value=information[0][index],
                error=information[1][index],
                windows=prefixes,
                baseline=0.0,
                formula="E|g|² of the model's own futures, a mean over entries",
                expected="no future reads it",
                units="nats²",
            ),
            Figure(
                f"z of the mean pull on {stream}s",
                value=z[index],
                error=1.0,
                baseline=0.0,
                formula="sum of g_r·g_s over pairs of draws, over its standard error",
                expected="zero by law (the score identity)",
            ),
            Figure(
                f"consensus of drawn futures on {stream}s",
                value=drawn_consensus[0][index],
                error=drawn_consensus[1][index],
                windows=prefixes,
                baseline=0.0,
                formula="mean of g_r·g_s over pairs, over the mean of |g|²",
                expected="zero by law (the score identity)",
                units=SHARE,
            ),
            Figure(
                f"consensus of real futures on {stream}s",
                value=real_consensus[0][index],
                error=real_consensus[1][index],
                windows=ngrams,
                baseline=0.0,
                formula="the same, over different futures of n-grams that recur",
                expected="nothing in common",
                units=SHARE,
            ),
            Figure(
                f"real over drawn squared pull on {stream}s",
                value=ratio[0][index],
                error=ratio[1][index],
                windows=prefixes,
                baseline=1.0,
                formula="|g|² of the real future over E|g|² of drawn ones",
                expected="text like the model's own",
            ),
        ]
    return figures


def _judge(
    information: Estimate,
    z: np.ndarray,
    consensus: Estimate,
    layer_consensus: Estimate,
    prefixes: int,
    ngrams: int,
) -> tuple[str, str]:
    """Return verdict and reason, from the consensus of real futures (written,) and by layer (layer, written)."""
    if not (np.abs(z) <= MAX_Z).all():
        worst = z[np.argmax(np.nan_to_num(np.abs(z), nan=math.inf))]
        expected = "the mean gradient of continuations that the model draws should vanish"
        return MIXED, f"{expected}, but z = {worst:.1f}: nothing is said"
    if not (information[0] > margin_of_error(information[1], prefixes)).all():
        return FAILS, "no gradient of a continuation at keys and values is seen beyond the margin of error"
    law = f"the gradients of drawn continuations cancel on average as they must (|z| up to {np.abs(z).max():.1f}); "
    if not ngrams:
        return HOLDS, law + "what real futures have in common is not known: no n-gram recurs with different futures"
    verdicts, words = [], []
    for index, stream in enumerate(WRITTEN):
        value, error = (x[:, index] for x in layer_consensus)
        verdict, contradicting, _ = judge(value, margin_of_error(error, ngrams), HALF, above=False)
        verdicts.append(verdict)
        layers = f" (above one half in {contradicting})" if contradicting else ""
        words.append(f"{percent(consensus[0][index], consensus[1][index], ngrams)} for {stream}s{layers}")
    reason = (
        f"{law}for {ngrams} n-grams that recur with different continuations, so much of the squared gradient is common "
        f"to all: {' and '.join(words)}"
    )
    return common_verdict(verdicts), reason


def _information_variables(squares: np.ndarray) -> dict[str, xr.DataArray]:
    """Return the information of entries about their future; squares: (prefix, layer, written, head, position)."""
    coords: dict[str, Any] = {"written": list(WRITTEN)}
    positions = squares.shape[-1]
    lags = positions + 1 - np.arange(positions)  # the first predicted token stands at `positions` + 1
    layers, layers_error = mean_and_error(np.nanmean(squares, (3, 4)))
    by_lag = np.nanmean(squares, (0, 3))[..., ::-1]
    heads = np.moveaxis(squares.mean((0, 4)), 1, 2)
    information, error, units = (
        "Fisher information of an entry about its future",
        "standard error over prefixes",
        "nats²",
    )
    return {
        "information": labelled_array("layer written lag", by_lag, information, units, **coords, lag=lags[::-1]),
        "information_by_layer": labelled_array("layer written", layers, information, units, **coords),
        "information_by_layer_error": labelled_array("layer written", layers_error, error, units, **coords),
        "information_by_head": labelled_array("layer kv_head written", heads, information, units, **coords),
    }


def _layer_variables(
    products: np.ndarray, drawn_consensus: Estimate, real_consensus: Estimate, ratio: Estimate
) -> dict[str, xr.DataArray]:
    """Return z, consensus and ratio by layer; the estimates are (layer, written)."""
    coords: dict[str, Any] = {"written": list(WRITTEN)}
    futures: dict[str, Any] = coords | {"future": ["drawn", "real"]}
    z = mean_pull_z(np.nansum(products, 3))
    consensus, consensus_error = (np.stack(pair, -1) for pair in zip(drawn_consensus, real_consensus, strict=True))
    error = "standard error over prefixes"
    return {
        "z": labelled_array("layer written", z, "z of the mean pull", **coords),
        "consensus": labelled_array("layer written future", consensus, "consensus of futures", **futures),
        "consensus_error": labelled_array("layer written future", consensus_error, error, **futures),
        "ratio": labelled_array("layer written", ratio[0], "squared pull, real over drawn", **coords),
        "ratio_error": labelled_array("layer written", ratio[1], error, **coords),
    }


def _draw_futures(audit: View) -> list[Chart]:
    charts = []
    if "futures_information" in audit:
        information = audit["futures_information"].mean("layer")
        traces = [
            measured_line(str(stream), information.lag, information.sel(written=stream))
            for stream in information.written.values
        ]
        text = (
            "E|gradient|² of a future's log-likelihood at an entry, by its distance to the first token of the future."
        )
        charts.append(Chart("Information about the future, by lag", text, traces, "lag", "nats²", log="y"))
    if "futures_information_by_layer" in audit:
        traces = _by_layer(audit, "futures_information_by_layer")
        text = "Mean over the entries of a layer."
        charts.append(Chart("Information about the future, by layer", text, traces, "layer", "nats²", log="y"))
    if "futures_consensus" in audit:
        traces = _by_layer(audit, "futures_consensus")
        text = "At 1 all futures pull alike, at 0 they have nothing in common. Drawn futures have none, by law."
        charts.append(Chart("Consensus of futures, by layer", text, traces, "layer", "consensus"))
    if "futures_z" in audit:
        text = "The mean pull of the model's own futures is zero; in standard errors, most layers lie within 2."
        charts.append(Chart("The law of the mean pull", text, _by_layer(audit, "futures_z"), "layer", "z"))
    return charts


def _by_layer(audit: View, name: str) -> list[Scatter]:
    """Return a line for each stream, and for each kind of future."""
    values, errors = audit[name], audit.get(f"{name}_error")
    errors = None if errors is None else errors.reindex_like(values)
    labels = [{"written": stream} for stream in values.written.values]
    if "future" in values.dims:
        labels = [stream | {"future": future} for stream in labels for future in values.future.values]
    lines = []
    for label in labels:
        error = None if errors is None else errors.sel(label)
        lines.append(measured_line(", ".join(map(str, label.values())), values.layer, values.sel(label), error))
    return lines


FUTURES = Clause(
    number=9,
    name="On average over futures",
    statement="A key and a value are trained on average over the futures they may meet.",
    prefix="futures",
    measure=measure_futures,
    draw=_draw_futures,
)
