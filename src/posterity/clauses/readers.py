"""Row 3: how many readers a key really has."""

import math

import numpy as np
import torch
from torch import Tensor

from posterity.clauses.clause import Clause, Subject, array, judge
from posterity.clauses.drawing import Chart, View, line
from posterity.decomposition.participation import KINDS, readers
from posterity.models.attach import watched
from posterity.models.chunked_loss import run
from posterity.models.language_model import frozen
from posterity.models.watch import Layer
from posterity.ops.attention import Backward
from posterity.results.audit_schema import MIXED, Figure, Finding
from posterity.results.stats import mean_and_error


def many_readers(subject: Subject) -> Finding:
    """Participation ratio of every key's edges. The claim: more than one reader, in all heads; beside it, the count.

    Holds if in (nearly) every layer the mean key has more than two readers by every measure, so that more than one of
    them is a later one; fails if in none.
    """
    found = _Readers()
    windows = subject.windows(subject.plan.context, subject.plan.limit)
    with (
        frozen(subject.model),
        watched(subject.model, found.observe) as watch,
        subject.bar(len(windows), "readers", "windows") as advance,
    ):
        for ids in windows:
            found.start()
            run(subject.model, ids[None]).sum().backward()
            advance(1, len(ids))
    by_layer, by_position, by_head = found.arrays(watch.layers)  # with documents first
    available = (subject.plan.context + 1) / 2
    mean, error = mean_and_error(by_layer.nanmean(1))
    figures = [
        Figure(
            f"readers of a key by {kind}", mean[at], error[at], available,
            "(sum of |w|)² / (sum of w²) over a key's edges, mean over keys and heads", "mean of N - j", "queries",
        )
        for at, kind in enumerate(KINDS)
    ]  # fmt: skip
    layers, errors = mean_and_error(by_layer)
    verdicts = [judge(layers[:, at], errors[:, at], 2.0) for at in range(len(KINDS))]
    few = {kind: words for kind, (_, words, _) in zip(KINDS, verdicts, strict=True) if words}
    names = {verdict for verdict, _, _ in verdicts}
    low, high = int(np.argmin(mean)), int(np.argmax(mean))
    reason = (
        f"of {available:.1f} readers that a key has on average, {mean[low]:.0f} (by {KINDS[low]}) to {mean[high]:.0f} "
        f"(by {KINDS[high]}) really count"
        + "".join(f"; by {kind} at most two in {words}" for kind, words in few.items())
    )
    kinds = {"kind": list(KINDS)}
    variables = {
        "readers_by_layer": array("layer kind", layers, "readers of a key", "queries", **kinds),
        "readers_by_layer_error": array("layer kind", errors, "standard error over windows", "queries", **kinds),
        "readers_by_head": array("layer head kind", by_head.nanmean(0), "readers of a key", "queries", **kinds),
        "readers_by_position": array(
            "position kind", by_position.nanmean(0), "readers of the key at a position", "queries", **kinds
        ),
    }
    return Finding(figures, names.pop() if len(names) == 1 else MIXED, reason, variables)


class _Readers:
    """Means over keys of each layer and head, and over layers and heads of each position, window by window."""

    def __init__(self):
        self.windows: list[dict[Layer, Tensor]] = []

    def start(self) -> None:
        self.windows.append({})

    def observe(self, layer: Layer, back: Backward, project: object) -> None:
        self.windows[-1][layer] = readers(back)[:, 0].cpu()  # kind, head, key

    def arrays(self, layers: tuple[Layer, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """(document, layer, kind), (document, position, kind), (document, layer, head, kind)."""
        heads = max(x.shape[1] for window in self.windows for x in window.values())
        by_layer, by_position, by_head = [], [], []
        for window in self.windows:
            rows = [window[layer] for layer in layers]
            by_layer.append(torch.stack([x.nanmean((1, 2)) for x in rows]))
            by_position.append(torch.cat(rows, 1).nanmean(1).mT)
            padded = [
                torch.nn.functional.pad(x.nanmean(2).mT, (0, 0, 0, heads - x.shape[1]), value=math.nan) for x in rows
            ]
            by_head.append(torch.stack(padded))
        return torch.stack(by_layer), torch.stack(by_position), torch.stack(by_head)


def _draw_readers(audit: View) -> list[Chart]:
    by_layer, error, by_position = (audit[f"readers_by_{name}"] for name in ("layer", "layer_error", "position"))
    kinds = by_layer.kind.values
    length = by_position.sizes["position"]
    traces = [line(str(kind), by_layer.layer, by_layer.sel(kind=kind), error.sel(kind=kind)) for kind in kinds]
    smooth = [line(str(kind), by_position.position, by_position.sel(kind=kind), mode="lines") for kind in kinds]
    smooth.append(line("N - j", by_position.position, length - np.arange(length), mode="lines", line={"dash": "dot"}))
    return [
        Chart("Readers of a key, by layer", "Mean over keys and heads; all queries from the key on would be "
              f"{(length + 1) / 2:.0f}.", traces, "layer", "readers", {"yaxis": {"type": "log"}}),
        Chart("Readers of the key at a position", "Mean over layers and heads, beside the number of queries that could "
              "read it.", smooth, "position of the key", "readers", {"yaxis": {"type": "log"}}),
    ]  # fmt: skip


READERS = Clause(
    3,
    "Readers",
    "A key has many readers: the query at its own position and all later ones.",
    many_readers,
    _draw_readers,
)
