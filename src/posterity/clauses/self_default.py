"""Row 7: attending to oneself may serve as the default when nothing else matches.

Everything is dense here, N x N in float64, of short windows. Scores s_ij are those that enter the softmax: scaled, and
soft-capped where the model does so. The best other match of a query is max s_ij over 0 < j < i: the first position is
the other candidate for a default. A learned sink takes weight too and is a place of its own.
"""

import math

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from posterity.clauses.clause import Clause, Subject, array, judge
from posterity.clauses.drawing import Chart, View, grid, line
from posterity.errors import InputError
from posterity.models.attach import watched
from posterity.models.chunked_loss import run
from posterity.models.language_model import frozen
from posterity.models.patching import dense_edges
from posterity.models.watch import Attending, Layer, Watch
from posterity.ops.attention import Backward, dot, one_edge
from posterity.results.audit_schema import Figure, Finding
from posterity.results.formatting import named
from posterity.results.stats import mean_and_error

LONGEST, SHORTEST = 256, 4
SINK = 0.3  # mean attention to the first position from which on a head counts as a sink
NONE, SELF, FIRST = 0, 1, 2
PLACES = ("self", "first", "rest", "learned sink")
NUMBERS = {  # of every layer and head
    "correlation": "rank correlation of the self weight with the best other match",
    "permuted": "the same with own scores permuted among the queries",
    "weight": "mean self weight",
    "first": "mean attention to the first position",
    "cosine": "cosine of the output with the own value",
    "identity": "largest error of ds_ii = -(sum of the other ds), relative to the largest |ds|",
}


def measure(subject: Subject) -> Finding:
    """Where the weight of every head goes when nothing else matches, and whether self weight falls with other matches.

    A head's default is self (the first position) if, among the quarter of queries with the weakest best other match,
    self (the first position) has the largest mean weight of self, first, the rest together, and a learned sink. The
    verdict is `judge`'s for the share of heads with self as default, layer by layer, against one half.

    Raises:
        InputError: Windows of fewer than 4 tokens; a layer that is not called once per pass.
    """
    context = min(subject.plan.context, LONGEST)
    if context < SHORTEST:
        raise InputError(f"row 7 expects windows of at least {SHORTEST} tokens; got context={context}")
    windows = subject.windows(context, subject.plan.limit)
    seen = _Seen(subject.generator(7))
    with (
        frozen(subject.model),
        watched(subject.model, seen.observe) as watch,
        watch.replacing(seen.note),
        subject.bar(len(windows), "defaults", "windows") as advance,
    ):
        for ids in windows:
            seen.found.clear()
            run(subject.model, ids[None]).sum().backward()
            seen.keep(watch)
            advance(1, len(ids))
    return _finding(seen)


class _Seen:
    """What was measured of each window."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.sinks: dict[Layer, Tensor | None] = {}
        self.found: dict[Layer, dict[str, Tensor]] = {}  # of the present window
        self.numbers: dict[str, list[np.ndarray]] = {name: [] for name in NUMBERS}  # (layer, head)
        self.places: list[np.ndarray] = []  # (place, layer, head)

    def note(self, layer: Layer, given: Attending) -> None:
        """Keep the learned sinks of a forward pass; the attention call stays as it is."""
        self.sinks[layer] = given.sinks

    def observe(self, layer: Layer, back: Backward, project: object) -> None:
        """Measure one layer."""
        if layer in self.found:
            raise InputError(f"layer {layer} was sent back twice in one pass: its heads cannot be told apart")
        dense = Dense(back, self.sinks[layer])
        weak, permuted = dense.places(), dense.permuted(self.generator)
        numbers = {
            "correlation": dense.correlation(dense.own_weight), "permuted": dense.correlation(permuted),
            "weight": dense.own_weight[:, 1:].mean(1), "first": dense.weight[:, 1:, 0].mean(1),
            "cosine": dense.cosine(), "identity": dense.identity(),
        }  # fmt: skip
        self.found[layer] = {name: x.cpu() for name, x in {**numbers, "places": weak}.items()}

    def keep(self, watch: Watch) -> None:
        """End a window; heads that a layer does not have are NaN."""
        missing = [str(layer) for layer in watch.layers if layer not in self.found]
        if missing:
            raise InputError(
                f"no gradient came back to the attention of {', '.join(missing)}: row 7 cannot be measured"
            )
        heads = max(len(found["weight"]) for found in self.found.values())

        def fit(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, heads - x.shape[-1]), value=math.nan)

        layers = [self.found[layer] for layer in watch.layers]
        for name, rows in self.numbers.items():
            rows.append(torch.stack([fit(found[name]) for found in layers]).numpy())
        self.places.append(torch.stack([fit(found["places"]) for found in layers], 1).numpy())


class Dense:
    """One attention call and its gradients of one window, of size N x N, in float64; all heads side by side."""

    def __init__(self, back: Backward, sinks: Tensor | None):
        query, self.grad = back.query[0].double(), back.grad_output[0].double()
        key, self.value = (back.repeat(x)[0].double() for x in (back.key, back.value))
        score = back.scale * query @ key.mT
        if back.softcap is not None:
            score = back.softcap * torch.tanh(score / back.softcap)
        self.edges = dense_edges(back.mask, back.query)[0]
        self.score = score.masked_fill(~self.edges, -torch.inf)
        self.heads, self.length = score.shape[:2]
        sink = score.new_full((self.heads,), -torch.inf) if sinks is None else sinks.detach().to(score)
        self.sink = sink[:, None, None].expand(-1, self.length, 1)
        weight = torch.softmax(torch.cat((self.score, self.sink), -1), -1)
        self.weight, self.sink_weight = weight[..., :-1], weight[..., -1]
        self.own_weight = self.weight.diagonal(0, 1, 2)
        self.back = back
        others = self.edges.tril(-1)
        others[..., 0] = False
        self.best = self.score.masked_fill(~others, -torch.inf).amax(-1)  # (head, query)
        self.asked = others.any(-1) & self.edges.diagonal(0, 1, 2)  # queries with a self edge and another match

    def correlation(self, own: Float64[Tensor, "head query"]) -> Float64[Tensor, " head"]:
        """Rank correlation of own weights with the best other match, over the queries that have both."""
        return torch.stack(
            [spearman(own[h, asked], self.best[h, asked]) for h, asked in enumerate(self.asked)]
        )  # fmt: skip

    def permuted(self, generator: torch.Generator) -> Float64[Tensor, "head query"]:
        """Own weights if own scores were those of other queries, all other scores as they are."""
        own = self.score.diagonal(0, 1, 2).clone()
        for h, asked in enumerate(self.asked):
            at = asked.nonzero().squeeze(1)
            own[h, at] = own[h, at[torch.randperm(len(at), generator=generator).to(at.device)]]
        strict = self.edges.tril(-1)
        rest = torch.cat((self.score.masked_fill(~strict, -torch.inf), self.sink), -1).logsumexp(-1)
        return torch.sigmoid(own - rest)

    def places(self) -> Float64[Tensor, "place head"]:
        """Mean weight on self, the first position, the rest and a learned sink, where nothing else matches."""
        first = self.weight[..., 0]
        rest = 1 - self.own_weight - first - self.sink_weight
        of_query = torch.stack((self.own_weight, first, rest.clamp(min=0), self.sink_weight))
        columns = []
        for h, asked in enumerate(self.asked):
            at = asked.nonzero().squeeze(1)
            weakest = at[self.best[h, at].argsort(stable=True)[: -(-len(at) // 4)]]
            columns.append(of_query[:, h, weakest].mean(1))
        return torch.stack(columns, 1)

    def cosine(self) -> Float64[Tensor, " head"]:
        """Cosine of output and own value, mean over the queries after the first."""
        output = self.back.output[0].double()
        return torch.cosine_similarity(output[:, 1:], self.value[:, 1:], -1).mean(1)

    def identity(self) -> Float64[Tensor, " head"]:
        """How far the self score's gradient is from minus the sum of all others, the learned sink's included.

        The left side is the operator's, in its precision, from its log-sum-exp and output; the right side is dense.
        """
        back = self.back
        weight, _ = one_edge(back.query, back.repeat(back.key), back.lse, back, None)
        slope = dot(back.grad_output, back.repeat(back.value)) - dot(back.grad_output, back.output)
        left = (weight * slope)[0].double() * self.edges.diagonal(0, 1, 2)
        product = self.grad @ self.value.mT
        delta = (self.weight * product).sum(-1)  # do.o, without the operator's output
        terms = self.weight * (product - delta[..., None])
        right = self.sink_weight * delta - terms.tril(-1).sum(-1)
        largest = terms.abs().amax((1, 2))
        return (left - right).abs().amax(1) / torch.where(largest > 0, largest, 1)


def spearman(x: Float64[Tensor, " query"], y: Float64[Tensor, " query"]) -> Float64[Tensor, ""]:
    """Correlation of ranks, ties with their mean rank; NaN if one of them is constant or there is one query only."""
    ranks = [_ranks(one) for one in (x, y)]
    one, two = (rank - rank.mean() for rank in ranks)
    return (one * two).sum() / (one.square().sum() * two.square().sum()).sqrt()


def _ranks(x: Float64[Tensor, " query"]) -> Float64[Tensor, " query"]:
    _, at, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[at]


def defaults(places: np.ndarray) -> np.ndarray:
    """1 where self has the largest weight of the places (the first axis), 2 where the first position has it, else 0."""
    known = np.isfinite(places).all(0)
    largest = np.where(known, places, 0).argmax(0)
    found = np.where(largest == 0, SELF, np.where(largest == 1, FIRST, NONE)).astype(float)
    return np.where(known, found, math.nan)


def _share(chosen: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Share of chosen ones among those known, over the last axis."""
    return (chosen & known).sum(-1) / known.sum(-1)


def _finding(seen: _Seen) -> Finding:
    numbers = {name: np.stack(rows) for name, rows in seen.numbers.items()}  # (window, layer, head)
    places, places_error = mean_and_error(np.stack(seen.places))
    default, single = defaults(places), np.stack([defaults(one) for one in seen.places])
    share = _share(default == SELF, np.isfinite(default))
    _, error = mean_and_error(_share(single == SELF, np.isfinite(single)))
    verdict, _, holding = judge(share, error)
    variables = {"self_default_default": array("layer head", default, "0: none, 1: self, 2: the first position")}
    for name, words in NUMBERS.items():
        mean, spread = mean_and_error(numbers[name])
        if name == "identity":
            variables["self_default_identity"] = array("layer head", numbers[name].max(0), words)
            continue
        variables[f"self_default_{name}"] = array("layer head", mean, words)
        variables[f"self_default_{name}_error"] = array("layer head", spread, "its standard error over windows")
    coords = {"self_default_place": list(PLACES)}
    dims, words = "self_default_place layer head", "weight where nothing else matches"
    variables["self_default_places"] = array(dims, places, words, "1", **coords)
    variables["self_default_places_error"] = array(dims, places_error, "its standard error over windows", "1", **coords)
    variables["self_default_share"] = array("layer", share, "share of heads with self as default")
    variables["self_default_share_error"] = array("layer", error, "standard error of its single-window values")
    heads, chosen = int(np.isfinite(default).sum()), default == SELF
    which = f" ({named(chosen, 'head')})" if chosen.any() else ""
    reason = (
        f"self is the default of {int(chosen.sum())} of {heads} heads{which}, of most heads in {holding} of "
        f"{len(share)} layers; the first position is that of {int((default == FIRST).sum())}"
    )
    return Finding(_figures(numbers, default, single), verdict, reason, variables)


def _figures(numbers: dict[str, np.ndarray], default: np.ndarray, single: np.ndarray) -> list[Figure]:
    """Shares are those of the means over windows; their errors those of single windows' shares."""

    def flat(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:-2], -1)

    def share(name: str, whole: np.ndarray, parts: np.ndarray, formula: str) -> Figure:
        known = np.isfinite(flat(numbers["weight"]))
        error = mean_and_error(_share(flat(parts), known))[1]
        return Figure(name, float(_share(flat(whole), known[0])), error, formula=formula)

    def mean(name: str, of: str, formula: str, baseline: float = math.nan, expected: str = "") -> Figure:
        return Figure(name, *mean_and_error(np.nanmean(numbers[of], (1, 2))), baseline, formula, expected)

    weakest = "largest mean weight in the quarter of queries with the weakest max of s_ij, 0 < j < i"
    permuted = float(np.nanmean(numbers["permuted"]))
    return [
        share("heads with self as default", default == SELF, single == SELF, f"self has the {weakest}"),
        share("heads with the first as default", default == FIRST, single == FIRST, f"position 0 has the {weakest}"),
        share("sinks", numbers["first"].mean(0) > SINK, numbers["first"] > SINK, f"mean a_i0 > {SINK}, i > 0"),
        mean(
            "rank correlation", "correlation", "Spearman of a_ii and max of s_ij, 0 < j < i; mean over heads",
            permuted, "own scores permuted among the queries",
        ),
        mean("self weight", "weight", "mean of a_ii, i > 0, over heads"),
        mean("output along the own value", "cosine", "cos(o_i, v_i), i > 0, mean over heads"),
        Figure(
            "error of the identity", float(np.nanmax(numbers["identity"])), baseline=0.0,
            formula="max |ds_ii + sum of the other ds| / max |ds|", expected="exact arithmetic",
        ),
    ]  # fmt: skip


def draw(audit: View) -> list[Chart]:
    """The map of defaults, of rank correlations and of sinks; self weight and cosine by layer."""
    charts = []
    maps = {
        "default": ("Defaults", "Where the weight goes when nothing else matches.", {
                        "zmin": -0.5, "zmax": 2.5, "colorscale": _steps("#c9ced4", "#c25a00", "#1c5f9e"),
                        "colorbar": {"tickvals": [0, 1, 2], "ticktext": ["elsewhere", "self", "first"]},
                    }),
        "correlation": ("Self weight against other matches", "Rank correlation over queries: below 0, self weight is "
                        "larger where the best other match is weaker.",
                        {"colorscale": "RdBu", "zmin": -1, "zmax": 1, "zmid": 0}),
        "first": ("Sinks", f"Mean attention to the first position; above {SINK} a head counts as a sink.",
                  {"colorscale": "Viridis", "zmin": 0, "zmax": 1}),
    }  # fmt: skip
    for name, (title, text, style) in maps.items():
        if f"self_default_{name}" in audit:
            values = audit[f"self_default_{name}"].transpose("layer", "head")
            at = {"x": values["head"].values.tolist(), "y": values["layer"].values.tolist()}
            charts.append(Chart(title, text, [grid(values, title, **style, **at)], "head", "layer"))
    lines = []
    for name, words in (("weight", "self weight"), ("cosine", "cosine of output and own value")):
        if f"self_default_{name}" in audit:
            values = audit[f"self_default_{name}"]
            lines.append(line(words, values["layer"].values, values.mean("head")))
    if lines:
        text = "Mean self weight, and cosine of the output with the own value, over queries and heads."
        charts.append(Chart("Self by layer", text, lines, "layer", "mean over heads"))
    return charts


def _steps(*colours: str) -> list[list]:
    """A scale of a few colours with sharp edges."""
    number = len(colours)
    return [[(at + end) / number, colour] for at, colour in enumerate(colours) for end in (0, 1)]


CLAUSES: tuple[Clause, ...] = (
    Clause(
        7,
        "Self as the default",
        "Attending to oneself may serve as the default when nothing else matches.",
        measure,
        draw,
    ),
)
