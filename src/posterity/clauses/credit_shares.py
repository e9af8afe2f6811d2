"""Clauses 1, 2 and 4: look-back, look-ahead, and the weights: shares of the gradients in one ledger."""

from collections.abc import Callable

import xarray as xr

from posterity.axes import WRITTEN
from posterity.clauses.clause import Clause, common_verdict, judge, margin_of_error, with_long_name
from posterity.clauses.drawing import Chart, View, expected_line, measured_line
from posterity.clauses.subject import Subject
from posterity.results import stats
from posterity.results.audit_schema import HOLDS, MIXED, SHARE, Figure, Finding
from posterity.results.formatting import percent


def measure_look_back(subject: Subject) -> Finding:
    """Measure the share of the query credit that arrives over edges to earlier keys: all edges but the self edge."""
    return _measure_side(subject, ("query",), "to earlier keys")


def measure_look_ahead(subject: Subject) -> Finding:
    """Measure the share of key and value credit that arrives over edges from later queries: all but the self edge."""
    return _measure_side(subject, WRITTEN, "from later queries")


def _measure_side(subject: Subject, streams: tuple[str, ...], edges: str) -> Finding:
    """Test the claim that edges other than the self edge have more than half of the credit, in each stream and layer.

    Holds if it does for the whole model in each stream and no layer contradicts; fails if it does for no stream.
    """
    result = subject.ledger
    pooled = stats.shares(result).sel(side="other")
    layers = stats.shares(result, ("layer",)).sel(side="other", stream=list(streams)).transpose("stream", "layer")
    profile = stats.profile(result)
    windows = result.sizes["document"]
    verdicts = {stream: _verdict(pooled.sel(stream=stream), layers.sel(stream=stream), windows) for stream in streams}
    contradiction = {stream: f", though not in {words}" if words else "" for stream, (_, words) in verdicts.items()}
    reason = "; ".join(
        f"{percent(float(pooled.share.sel(stream=stream)), float(pooled.error.sel(stream=stream)), windows)} of the "
        f"{stream} credit arrives over edges {edges}{contradiction[stream]}"
        for stream in streams
    )
    density = (profile.share / profile.width).sel(stream=list(streams))
    variables = {
        "share": with_long_name(layers.share, f"share of the credit over edges {edges}"),
        "error": with_long_name(layers.error, "standard error over windows"),
        "density": with_long_name(density, "share of the credit a lag"),
        "counted": with_long_name(profile.counted / profile.width, "share of the edges a lag"),
    }
    figures = _side_figures(pooled, profile, streams, edges, windows)
    return Finding(figures, common_verdict([verdict for verdict, _ in verdicts.values()]), reason, variables)


def _side_figures(
    pooled: xr.Dataset, profile: xr.Dataset, streams: tuple[str, ...], edges: str, windows: int
) -> list[Figure]:
    """Return the share of these edges and the median lag of each stream, beside those of the edges."""
    median = stats.median_lag(profile.share)
    figures = []
    for stream in streams:
        figures += [
            Figure(
                f"{stream} credit over edges {edges}",
                value=float(pooled.share.sel(stream=stream)),
                error=float(pooled.error.sel(stream=stream)),
                windows=windows,
                baseline=1 - float(profile.counted.isel(lag=0)),
                formula=f"sum over edges of lag > 0 of their credit, over the whole |d{stream[0]}|²",
                expected="share of these edges",
                units=SHARE,
            ),
            Figure(
                f"median lag of {stream} credit",
                value=float(median.sel(stream=stream)),
                baseline=float(stats.median_lag(profile.counted)),
                formula="lag at which the credit from lag 0 on reaches half",
                expected="median lag of all edges",
                units="tokens",
            ),
        ]
    return figures


def _verdict(pooled: xr.Dataset, layers: xr.Dataset, windows: int, above: bool = True) -> tuple[str, str]:
    """Return the verdict of the whole model, mixed where it holds but layers contradict; and those layers in words."""
    verdict, _, _ = judge([float(pooled.share)], [margin_of_error(pooled.error, windows)], above=above)
    _, contradicting, _ = judge(layers.share, margin_of_error(layers.error, windows), above=above)
    return MIXED if verdict == HOLDS and contradicting else verdict, contradicting


def _draw_lags(prefix: str, edges: str, side: str) -> Callable[[View], list[Chart]]:
    def draw(audit: View) -> list[Chart]:
        density, share, error = (audit[f"{prefix}_{name}"] for name in ("density", "share", "error"))
        lags = density.lag.values
        streams = density.stream.values
        traces = [measured_line(str(stream), lags[1:], density.sel(stream=stream)[1:]) for stream in streams]
        traces.append(expected_line("edges", lags[1:], audit[f"{prefix}_counted"][1:]))
        layers = [
            measured_line(str(stream), share.layer, share.sel(stream=stream), error.sel(stream=stream))
            for stream in share.stream.values
        ]
        return [
            Chart(
                f"Share of the credit over edges {edges}, by layer",
                "Above one half, most of the gradient comes over edges other than the self edge.",
                layers, "layer", "share", y_range=(min(0.0, float(share.min())) - 0.02, 1.05),
            ),
            Chart(
                f"Where in the {side} they end",
                "Share of the credit at one lag, beside the share of the edges, which counting alone predicts. "
                "Lags whose credit is negative have no point.",
                traces, "lag", "share at one lag", log="xy",
            ),
        ]  # fmt: skip

    return draw


def measure_weights(subject: Subject) -> Finding:
    """Measure how much of the squared gradients of W_K and W_V the self edges make, beside 2/(N + 1).

    The claim: less than one half in the gradient of one window, in every layer; that of the mean stands beside it.
    """
    result = subject.ledger
    pooled, layers = stats.weight_shares(result), stats.weight_shares(result, ("layer",))
    edge_counts = result.edges.sum("reader_of")
    self_edges, edges = (float(x) for x in (edge_counts.isel(lag=0).mean(), edge_counts.sum("lag").mean()))
    figures = [
        Figure(
            "later terms for one own",
            value=(edges - self_edges) / self_edges,
            baseline=(subject.plan.context - 1) / 2,
            formula="edges of lag > 0 over edges of lag 0, a mean over layers",
            expected="(N − 1)/2 without windows",
        )
    ]
    verdicts, words, windows = [], [], result.sizes["document"]
    for stream in WRITTEN:
        verdict, contradicting = _verdict(pooled.sel(stream=stream), layers.sel(stream=stream), windows, above=False)
        verdicts.append(verdict)
        share, error, mean = (float(pooled[name].sel(stream=stream)) for name in ("share", "error", "share_mean"))
        figures += _weight_figures(_weight_name(stream), share, error, mean, self_edges / edges, windows)
        words.append(
            f"{percent(share, error, windows)} of {_weight_name(stream)} is self (mean over windows {percent(mean)})"
            + (f", most of it in {contradicting}" if contradicting else "")
        )
    variables = {
        "share": with_long_name(layers.share, "self share of the weight gradient, one window"),
        "share_error": with_long_name(layers.error, "standard error over windows"),
        "share_mean": with_long_name(layers.share_mean, "self share of the mean weight gradient"),
    }
    reason = f"counting alone gives {percent(self_edges / edges)}; " + "; ".join(words)
    return Finding(figures, common_verdict(verdicts), reason, variables)


def _weight_name(stream: str) -> str:
    return f"W_{stream[0].upper()}"


def _weight_figures(name: str, share: float, error: float, mean: float, counted: float, windows: int) -> list[Figure]:
    """Return the self share in the gradient of one weight, for one window and for the mean over windows."""
    formula = f"(|self|² + self·other) / |gradient of {name}|²"
    baseline = {"baseline": counted, "expected": "share of the edges", "units": SHARE}
    return [
        Figure(
            f"self share of {name}, one window",
            value=share,
            error=error,
            formula=formula,
            windows=windows,
            **baseline,
        ),
        Figure(
            f"self share of {name}, mean gradient",
            value=mean,
            formula=formula + ", of the mean over windows",
            **baseline,
        ),
    ]


def _draw_weights(audit: View) -> list[Chart]:
    share, error, mean = (audit[f"weights_{name}"] for name in ("share", "share_error", "share_mean"))
    traces = []
    for stream in WRITTEN:
        name, single, pooled = _weight_name(stream), share.sel(stream=stream), mean.sel(stream=stream)
        traces.append(measured_line(f"{name}, one window", share.layer, single, error.sel(stream=stream)))
        traces.append(measured_line(f"{name}, mean gradient", share.layer, pooled, line={"dash": "dot"}))
    text = (
        "Part of the squared gradient that the self edges make, for one window and for the mean gradient over windows."
    )
    return [Chart("Self share of the weights' gradients, by layer", text, traces, "layer", "self share")]


LOOK_BACK = Clause(
    number=1,
    name="Look-back",
    statement="The gradient of a query arrives mostly over edges to earlier keys.",
    prefix="look_back",
    measure=measure_look_back,
    draw=_draw_lags("look_back", "to earlier keys", "past"),
    reads_ledger=True,
)
LOOK_AHEAD = Clause(
    number=2,
    name="Look-ahead",
    statement="The gradient of a key and a value arrives mostly over edges from later queries.",
    prefix="look_ahead",
    measure=measure_look_ahead,
    draw=_draw_lags("look_ahead", "from later queries", "future"),
    reads_ledger=True,
)
WEIGHTS = Clause(
    number=4,
    name="The count and the weights",
    statement="W_K and W_V get one gradient term from every reader, on average (N − 1)/2 later ones for each own one, "
    "so that the later ones dominate.",
    prefix="weights",
    measure=measure_weights,
    draw=_draw_weights,
    reads_ledger=True,
)
