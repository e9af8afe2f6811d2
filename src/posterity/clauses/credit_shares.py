"""Rows 1, 2 and 4: look-back, look-ahead, the count and the weights: what the gradients of one ledger say."""

import math
from collections.abc import Callable

import xarray as xr

from posterity.axes import WRITTEN
from posterity.clauses.clause import Clause, Subject, judge, labelled
from posterity.clauses.drawing import Chart, View, line
from posterity.results import stats as derived
from posterity.results.audit_schema import HOLDS, MIXED, Figure, Finding
from posterity.results.formatting import percent


def look_back(subject: Subject) -> Finding:
    """Query credit that comes from the past: all edges but the self edge."""
    return _by_lag(subject, "look_back", ("query",), "past")


def look_ahead(subject: Subject) -> Finding:
    """Key and value credit that comes from later queries: all edges but the self edge."""
    return _by_lag(subject, "look_ahead", WRITTEN, "future")


def _by_lag(subject: Subject, prefix: str, streams: tuple[str, ...], side: str) -> Finding:
    """The claim, for each stream and layer: the share of the edges other than the self edge is above one half."""
    result = subject.ledger
    whole, layers = derived.shares(result).sel(side="other"), derived.shares(result, ("layer",)).sel(side="other")
    profile = derived.profile(result)
    middle = derived.median_lag(profile.share)
    counted = 1 - float(profile.counted.isel(lag=0))
    figures = []
    for stream in streams:
        one = whole.sel(stream=stream)
        figures += [
            Figure(
                f"{stream} credit from the {side}", float(one.share), float(one.error), counted,
                f"sum over edges of lag > 0 of their credit, over the whole |d{stream[0]}|²", "share of these edges",
            ),
            Figure(
                f"median lag of {stream} credit", float(middle.sel(stream=stream)), math.nan,
                float(derived.median_lag(profile.counted)), "lag at which the credit from lag 0 on reaches half",
                "median lag of all edges", "tokens",
            ),
        ]  # fmt: skip
    chosen = layers.sel(stream=list(streams)).transpose("stream", "layer")
    verdict, against = _over_streams(whole, chosen, streams)
    reason = "; ".join(
        f"{percent(float(whole.share.sel(stream=stream)), float(whole.error.sel(stream=stream)))} of the {stream} "
        f"credit comes from the {side}{against[stream]}"
        for stream in streams
    )
    variables = {
        f"{prefix}_share": labelled(chosen.share, f"share of the credit from the {side}"),
        f"{prefix}_error": labelled(chosen.error, "standard error over windows"),
        f"{prefix}_density": labelled(
            (profile.share / profile.width).sel(stream=list(streams)), "share of the credit a lag"
        ),
        f"{prefix}_counted": labelled(profile.counted / profile.width, "share of the edges a lag"),
    }
    return Finding(figures, verdict, reason, variables)


def _over_streams(whole: xr.Dataset, layers: xr.Dataset, streams: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """Holds if it does for the whole model in each stream and no layer contradicts; fails if it does for no stream."""
    held, words = [], {}
    for stream in streams:
        verdict, against = _pooled_verdict(whole.sel(stream=stream), layers.sel(stream=stream))
        words[stream] = f", though not in {against}" if against else ""
        held.append(verdict)
    return held[0] if len(set(held)) == 1 else MIXED, words


def _pooled_verdict(pooled: xr.Dataset, layers: xr.Dataset, more: bool = True) -> tuple[str, str]:
    """The whole model's verdict, mixed where it holds but layers contradict; and these layers in words."""
    verdict, _, _ = judge([float(pooled.share)], [float(pooled.error)], more=more)
    _, against, _ = judge(layers.share, layers.error, more=more)
    return MIXED if verdict == HOLDS and against else verdict, against


def _draw_lags(prefix: str, side: str) -> Callable[[View], list[Chart]]:
    def draw(audit: View) -> list[Chart]:
        density, share, error = (audit[f"{prefix}_{name}"] for name in ("density", "share", "error"))
        lags = density.lag.values
        traces = [line(str(stream), lags[1:], density.sel(stream=stream)[1:]) for stream in density.stream.values]
        traces.append(line("edges", lags[1:], audit[f"{prefix}_counted"][1:], line={"dash": "dot"}))
        layers = [
            line(str(stream), share.layer, share.sel(stream=stream), error.sel(stream=stream))
            for stream in share.stream.values
        ]
        log = {"xaxis": {"type": "log"}, "yaxis": {"type": "log"}}
        return [
            Chart(
                f"Share of the credit from the {side}, by layer",
                "Above one half, most of the gradient comes over edges other than the self edge.",
                layers, "layer", "share", {"yaxis": {"range": [min(0.0, float(share.min())) - 0.02, 1.05]}},
            ),
            Chart(
                f"Where in the {side} it comes from",
                "Share of the credit at one lag, beside the share of the edges, which counting alone predicts. "
                "Lags whose credit is negative have no point.",
                traces, "lag", "share at one lag", log,
            ),
        ]  # fmt: skip

    return draw


def weights(subject: Subject) -> Finding:
    """The gradients of W_K and W_V: how much of their squared norm the self edges make, beside 2/(N + 1).

    The claim: less than one half in the gradient of one window, in every layer; that of the mean stands beside it.
    """
    result = subject.ledger
    found, layers = derived.weights(result), derived.weights(result, ("layer",))
    own, all_edges = (float(x) for x in (result.edges.isel(lag=0).mean(), result.edges.sum("lag").mean()))
    figures = [
        Figure(
            "later terms for one own", (all_edges - own) / own, math.nan, (subject.plan.context - 1) / 2,
            "edges of lag > 0 over edges of lag 0, a mean over layers", "(N - 1)/2 without windows",
        )
    ]  # fmt: skip
    words, held = [], []
    for stream in WRITTEN:
        one, each = found.sel(stream=stream), layers.sel(stream=stream)
        name = f"W_{stream[0].upper()}"
        share, error, mean = float(one.share), float(one.error), float(one.share_mean)
        formula = f"(|self|² + self·other) / |gradient of {name}|²"
        figures += [
            Figure(f"self share of {name}, one window", share, error, own / all_edges, formula, "share of the edges"),
            Figure(f"self share of {name}, mean gradient", mean, math.nan, own / all_edges,
                   formula + ", of the mean over windows", "share of the edges"),
        ]  # fmt: skip
        verdict, against = _pooled_verdict(one, each, more=False)
        held.append(verdict)
        beside = f" (mean over windows {percent(mean)})"
        words.append(
            f"{percent(share, error)} of {name} is self{beside}" + (f", most of it in {against}" if against else "")
        )
    variables = {
        "weights_share": labelled(layers.share, "self share of the weight gradient, one window"),
        "weights_share_error": labelled(layers.error, "standard error over windows"),
        "weights_share_mean": labelled(layers.share_mean, "self share of the mean weight gradient"),
    }
    reason = f"counting alone gives {percent(own / all_edges)}; " + "; ".join(words)
    return Finding(figures, held[0] if len(set(held)) == 1 else MIXED, reason, variables)


def _draw_weights(audit: View) -> list[Chart]:
    share, error, mean = (audit[f"weights_{name}"] for name in ("share", "share_error", "share_mean"))
    traces = []
    for stream in WRITTEN:
        name = f"W_{stream[0].upper()}"
        one = {"stream": stream}
        traces.append(line(f"{name}, one window", share.layer, share.sel(one), error.sel(one)))
        traces.append(line(f"{name}, mean gradient", share.layer, mean.sel(one), line={"dash": "dot"}))
    text = (
        "Part of the squared gradient that the self edges make, for one window and for the mean gradient over windows."
    )
    return [Chart("Self share of the weights' gradients, by layer", text, traces, "layer", "self share")]


LOOK_BACK = Clause(
    1, "Look-back", "A query is trained for what it finds in the past.", look_back, _draw_lags("look_back", "past")
)
LOOK_AHEAD = Clause(
    2, "Look-ahead", "A key and a value are trained for the queries that will find them at later positions.",
    look_ahead, _draw_lags("look_ahead", "future"),
)  # fmt: skip
WEIGHTS = Clause(
    4, "The count and the weights",
    "W_K and W_V get one gradient term from every reader, on average (N - 1)/2 later ones for each own one, so that "
    "the later ones dominate.", weights, _draw_weights,
)  # fmt: skip
