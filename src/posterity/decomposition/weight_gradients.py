"""The gradient of W_Q, W_K and W_V, split into the part a position sends to itself and the rest.

The projections of a layer are run once more from its saved input, and the two parts of dq, dk and dv are sent back
through them. What lies between weights and queries (norms, rotary embedding, a fused matrix) needs no case of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.axes import SIDES, STREAMS
from posterity.decomposition.accumulator import Accumulator
from posterity.decomposition.adapter_gradients import AdapterSplit
from posterity.decomposition.credit import SelfEdgeGradients, self_edge_gradients
from posterity.decomposition.gram import gram_terms
from posterity.ops.attention import Backward
from posterity.ops.heads import sum_heads
from posterity.ops.precision import working_dtype


@dataclass(frozen=True)
class Projections:
    """Query, key and value of one document, recomputed from `parameters` with a graph between them."""

    streams: tuple[Tensor, Tensor, Tensor]
    parameters: list[Tensor]
    adapters: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # each parameter, and what stands for it
    packed: list[Tensor] = field(default_factory=list)  # a zero added to the output of each projection without gradient


class WeightSplit:
    """Squared norms and inner product of the two sides for one layer: of each document, and of their mean."""

    def __init__(self, sums: Accumulator, layer: str, adapters: AdapterSplit):
        """Accumulate rows "weight_by_document" (stream, term) and the gradients' sums into `sums`, under `layer`."""
        self.sums, self.layer, self.adapters = sums, layer, adapters
        self._dependencies: list[list[int]] = [[], [], []]  # of each stream, the parameters that it depends on

    def add(self, back: Backward, self_part: SelfEdgeGradients, project: Callable[[int], Projections]) -> None:
        """Account for the documents of one backward pass; `project` recomputes the projections of one of them.

        A query, key or value that later calls read too brings what these send to the weights as well.
        """
        totals = [back.stream_gradient(stream) for stream in range(3)]
        parts = _self_gradients(back, self_part)
        self.adapters.start_layer(self.layer, len(back.query))
        for document in range(len(back.query)):
            with torch.enable_grad():
                projections = project(document)
            row = [
                gram_terms((), ()).to(total.device)  # in the row of the call that the tensor was made for
                if _is_borrowed(back, stream)
                else self._add_stream(stream, document, projections, part[document, None], total[document, None])
                for stream, (part, total) in enumerate(zip(parts, totals, strict=True))
            ]
            self.sums.append_rows((self.layer, "weight_by_document"), [torch.stack(row)])

    def mean(self) -> Float[Tensor, "stream term"]:
        """Return the same three numbers for the mean gradient over the documents."""
        rows, sums = [], self.sums.weight_total
        for stream in range(len(STREAMS)):
            numbers = sorted({key[3] for key in sums if key[:2] == (self.layer, stream)})
            sides = [tuple(sums[self.layer, stream, side, number] for number in numbers) for side in SIDES]
            rows.append(gram_terms(*sides).cpu())
        return torch.stack(rows) / max(self.sums.count((self.layer, "weight_by_document")), 1) ** 2

    def _add_stream(
        self, stream: int, document: int, projections: Projections, self_grad: Tensor, total_grad: Tensor
    ) -> Float[Tensor, " term"]:
        output, parameters = projections.streams[stream], projections.parameters
        if not output.requires_grad:
            return gram_terms((), ()).to(output.device)
        # The parameters that a stream depends on are found once: all of them are tried the first time.
        numbers = self._dependencies[stream] or range(len(parameters))
        leaves = [leaf for _, leaf in projections.adapters]
        candidates = [*(parameters[number] for number in numbers), *projections.packed, *leaves]
        self_grad, total_grad = self_grad.to(output.dtype), total_grad.to(output.dtype)
        sides = [
            torch.autograd.grad(output, candidates, grad, retain_graph=True, allow_unused=True)
            for grad in (self_grad, total_grad - self_grad)
        ]
        count, marked = len(numbers), len(numbers) + len(projections.packed)
        for (parameter, _), *pair in zip(projections.adapters, *(side[marked:] for side in sides), strict=True):
            if pair[0] is not None:
                self.adapters.add(document, parameter, (pair[0], pair[1]))
        if any(mark is not None for mark in sides[0][count:marked]):  # a part of its weights is not known
            return gram_terms((), ()).to(output.device)
        pairs_by_number = zip(numbers, *(side[:count] for side in sides), strict=True)
        gradients = {number: pair for number, *pair in pairs_by_number if pair[0] is not None}
        self._dependencies[stream] = list(gradients)
        pairs = []
        for number, pair in gradients.items():
            pairs.append([x.to(working_dtype(x.dtype)) for x in pair])
            for side, x in zip(SIDES, pairs[-1], strict=True):
                self.sums.add_weight((self.layer, stream, side, number), x)
        return gram_terms(*zip(*pairs, strict=True)) if pairs else gram_terms((), ()).to(output.device)


def _is_borrowed(back: Backward, stream: int) -> bool:
    """Return whether the call reads a query, key or value that was made for another one."""
    shared = back.shared[stream]
    return shared is not None and shared.borrowers is None


def _self_gradients(back: Backward, self_part: SelfEdgeGradients) -> list[Tensor]:
    """Return the part of the gradient of query, key and value that comes over self edges, those of borrowers too."""
    groups = back.key.shape[1]
    parts = [self_part.query, sum_heads(self_part.key, groups), sum_heads(self_part.value, groups)]
    for stream, shared in enumerate(back.shared):
        for borrower in () if shared is None or shared.borrowers is None else shared.borrowers:
            edge = self_edge_gradients(borrower)
            part = edge.query if stream == 0 else sum_heads((edge.key, edge.value)[stream - 1], groups)
            parts[stream] = parts[stream] + part.to(parts[stream].device)
    return parts
