"""Clause 3: how many readers a key effectively has."""

import numpy as np
import torch
from torch import Tensor

from posterity.clauses.clause import Clause, common_verdict, judge, labelled_array, margin_of_error
from posterity.clauses.drawing import Chart, View, expected_line, measured_line
from posterity.clauses.subject import Subject
from posterity.decomposition.accumulator import stack_layers
from posterity.decomposition.edge_blocks import KINDS
from posterity.decomposition.participation import participation_ratio
from posterity.models.attach import observe_model
from posterity.models.chunked_loss import window_losses
from posterity.models.language_model import freeze_parameters
from posterity.models.watch import Layer
from posterity.ops.attention import Backward
from posterity.results.audit_schema import Figure, Finding
from posterity.results.stats import mean_and_error


def measure_readers(subject: Subject) -> Finding:
    """Measure the participation ratio of every key's edges, beside the number of its queries.

    Holds if in (nearly) every layer the mean key has more than two readers by every measure, so that more than one of
    them is a later one; fails if in none.
    """
    ratios = _ParticipationRatios()
    windows = subject.windows(subject.plan.context, subject.plan.limit)
    with (
        freeze_parameters(subject.model),
        observe_model(subject.model, ratios.observe) as watch,
        subject.progress(len(windows), "readers", "windows") as advance,
    ):
        for ids in windows:
            ratios.start_window()
            window_losses(subject.model, ids[None]).sum().backward()
            advance(1, len(ids))
    by_layer, by_position, by_head = ratios.means(watch.layers)
    available = (subject.plan.context + 1) / 2
    mean, error = mean_and_error(by_layer.nanmean(1))
    layers, layer_errors = mean_and_error(by_layer)
    margins = margin_of_error(layer_errors, len(windows))
    verdicts = [judge(layers[:, index], margins[:, index], 2.0) for index in range(len(KINDS))]
    low, high = int(np.argmin(mean)), int(np.argmax(mean))
    reason = (
        f"of {available:.1f} readers that a key has on average, {mean[low]:.0f} (by {KINDS[low]}) to {mean[high]:.0f} "
        f"(by {KINDS[high]}) really count"
    )
    for kind, (_, contradicting, _) in zip(KINDS, verdicts, strict=True):
        reason += f"; by {kind} at most two in {contradicting}" if contradicting else ""
    kinds, units = {"kind": list(KINDS)}, "queries"
    variables = {
        "by_layer": labelled_array("layer kind", layers, "readers of a key", units, **kinds),
        "by_layer_error": labelled_array("layer kind", layer_errors, "standard error over windows", units, **kinds),
        "by_head": labelled_array("layer head kind", by_head.nanmean(0), "readers of a key", units, **kinds),
        "by_position": labelled_array(
            "position kind", by_position.nanmean(0), "readers of the key at a position", units, **kinds
        ),
    }
    figures = [_figure(kind, mean[index], error[index], available, len(windows)) for index, kind in enumerate(KINDS)]
    return Finding(figures, common_verdict([verdict for verdict, _, _ in verdicts]), reason, variables)


class _ParticipationRatios:
    """The participation ratio of every key of every window, by layer, kind and head."""

    def __init__(self):
        self.windows: list[dict[Layer, Tensor]] = []  # (kind, head, key)

    def start_window(self) -> None:
        self.windows.append({})

    def observe(self, layer: Layer, back: Backward, projections: object) -> None:
        self.windows[-1][layer] = participation_ratio(back)[:, 0].cpu()

    def means(self, layers: tuple[Layer, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return means over keys and heads, over layers and heads, and over keys.

        Returns:
            (document, layer, kind), (document, position, kind), (document, layer, head, kind).
        """
        by_layer, by_position, by_head = [], [], []
        for window in self.windows:
            ratios = [window[layer] for layer in layers]
            by_layer.append(torch.stack([x.nanmean((1, 2)) for x in ratios]))
            by_position.append(torch.cat(ratios, 1).nanmean(1).mT)
            by_head.append(stack_layers([x.nanmean(2).mT for x in ratios], 0))
        return torch.stack(by_layer), torch.stack(by_position), torch.stack(by_head)


def _figure(kind: str, value: float, error: float, available: float, windows: int) -> Figure:
    return Figure(
        f"readers of a key by {kind}",
        value=value,
        error=error,
        windows=windows,
        baseline=available,
        formula="(sum of |w|)² / (sum of w²) over a key's edges, mean over keys and heads",
        expected="mean of N − j",
        units="queries",
    )


def _draw_readers(audit: View) -> list[Chart]:
    by_layer, error, by_position = (audit[f"readers_by_{name}"] for name in ("layer", "layer_error", "position"))
    kinds = by_layer.kind.values
    length = by_position.sizes["position"]
    traces = [measured_line(str(kind), by_layer.layer, by_layer.sel(kind=kind), error.sel(kind=kind)) for kind in kinds]
    position = by_position.position
    curves = [measured_line(str(kind), position, by_position.sel(kind=kind), mode="lines") for kind in kinds]
    curves.append(expected_line("N − j", position, length - np.arange(length), mode="lines"))
    return [
        Chart("Readers of a key, by layer", "Mean over keys and heads; all queries from the key on would be "
              f"{(length + 1) / 2:.0f}.", traces, "layer", "readers", log="y"),
        Chart("Readers of the key at a position", "Mean over layers and heads, beside the number of queries that could "
              "read it.", curves, "position of the key", "readers", log="y"),
    ]  # fmt: skip


READERS = Clause(
    number=3,
    name="Readers",
    statement="A key has many readers: the query at its own position and all later ones.",
    prefix="readers",
    measure=measure_readers,
    draw=_draw_readers,
)
