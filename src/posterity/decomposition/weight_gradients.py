"""The gradient of W_Q, W_K and W_V, split into the part a position sends to itself and the rest.

The two parts of dq, dk and dv are sent back to the weights through whatever lies between (norms, rotary embedding, a
fused matrix). Plain projections are found in the graph of the forward pass: a gradient at their outputs, times their
inputs, is that of their weights. Any other are run once more from the saved input of their layer, which the first
document of each layer is in either case: where both ways do not agree, the second holds.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge

from posterity.axes import SIDES, STREAMS, TERMS
from posterity.decomposition.accumulator import Accumulator
from posterity.decomposition.adapter_gradients import AdapterSplit
from posterity.decomposition.credit import SelfEdgeGradients, self_edge_gradients
from posterity.decomposition.gram import gram_terms
from posterity.ops.attention import Backward
from posterity.ops.heads import sum_heads
from posterity.ops.precision import working_dtype

Sides = tuple[Tensor, Tensor]  # a gradient's part over self edges, and the rest
Pairs = dict[int, Sides]  # both sides of the gradient of each parameter, by its number


@dataclass(frozen=True)
class Projections:
    """Query, key and value of one document, recomputed from `parameters` with a graph between them."""

    streams: tuple[Tensor, Tensor, Tensor]
    parameters: list[Tensor]
    adapters: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # each parameter, and what stands for it
    packed: list[Tensor] = field(default_factory=list)  # a zero added to the output of each projection without gradient


@dataclass(frozen=True)
class TracedProjection:
    """One product with a weight, as the forward pass computed it."""

    input: Float[Tensor, "batch *rest width"]
    output: GradientEdge
    weight: int  # numbers of the parameters
    bias: int | None
    transposed: bool  # the weight is (in, out)


@dataclass(frozen=True)
class ProjectionTrace:
    """The plain projections of a layer in the graph of its forward pass, and its query, key and value there."""

    projections: Sequence[TracedProjection]
    streams: Sequence[tuple[GradientEdge, torch.dtype] | None]  # None: without gradient

    def send_to_outputs(self, stream: int, sides: Sides) -> list[tuple[Tensor | None, Tensor | None]]:
        """Return both sides of the gradient at the output of each projection, for all documents."""
        if (traced := self.streams[stream]) is None:
            return [(None, None)] * len(self.projections)
        edge, dtype = traced
        outputs = [projection.output for projection in self.projections]
        by_side = [
            torch.autograd.grad([edge], outputs, [side.to(dtype)], retain_graph=True, allow_unused=True)
            for side in sides
        ]
        return list(zip(*by_side, strict=True))

    def pairs(self, at_outputs: Sequence[tuple[Tensor | None, Tensor | None]], document: int) -> Pairs:
        """Return both sides of the gradient of each weight and bias, for one document."""
        pairs: Pairs = {}
        for projection, (left, right) in zip(self.projections, at_outputs, strict=True):
            if left is None or right is None:
                continue
            grads = [x[document].flatten(0, -2) for x in (left, right)]
            inputs = projection.input[document].flatten(0, -2).to(grads[0].dtype)
            # The same products, in the same order, as autograd's.
            weights = [inputs.mT @ x if projection.transposed else x.mT @ inputs for x in grads]
            _add_pair(pairs, projection.weight, weights)
            if projection.bias is not None:
                _add_pair(pairs, projection.bias, [x.sum(0) for x in grads])
        return pairs


@dataclass(frozen=True)
class LayerProjections:
    """The two ways from a layer's query, key and value to its weights."""

    run_again: Callable[[int], Projections]  # of one document of the batch
    trace: Callable[[], ProjectionTrace | None]  # None: some projection is not a plain one


class WeightSplit:
    """Squared norms and inner product of the two sides for one layer: of each document, and of their mean."""

    def __init__(self, sums: Accumulator, layer: str, adapters: AdapterSplit):
        """Accumulate rows "weight_by_document" (stream, term) and the gradients' sums into `sums`, under `layer`."""
        self.sums, self.layer, self.adapters = sums, layer, adapters
        self._dependencies: list[list[int]] = [[], [], []]  # of each stream, the parameters that it depends on
        self._trace_agrees: bool | None = None  # with the projections run again; None: not known yet

    def add(self, back: Backward, self_part: SelfEdgeGradients, projections: LayerProjections) -> None:
        """Account for the documents of one backward pass.

        A query, key or value that later calls read too brings what these send to the weights as well.
        """
        whole, parts = [back.stream_gradient(stream) for stream in range(3)], _self_gradients(back, self_part)

        def sides(stream: int, documents: slice = slice(None)) -> Sides:
            part = parts[stream][documents]
            return part, whole[stream][documents] - part

        # What is borrowed stands in the row of the call that it was made for.
        streams = [stream for stream in range(len(STREAMS)) if not _is_borrowed(back, stream)]
        documents = range(len(back.query))
        self.adapters.start_layer(self.layer, len(documents))
        trace = None if self._trace_agrees is False else projections.trace()
        if trace is not None and self._trace_agrees is None:
            recomputed = projections.run_again(0)
            self._trace_agrees = _conjunction(self._agrees(x, trace, recomputed, sides(x)) for x in streams)
        terms = back.lse.new_full((len(documents), len(STREAMS), len(TERMS)), torch.nan, dtype=torch.float64)
        if trace is not None and self._trace_agrees:
            for stream in streams:
                at_outputs = trace.send_to_outputs(stream, sides(stream))
                for document in documents:
                    terms[document, stream] = self._enter(stream, trace.pairs(at_outputs, document))
        else:
            for document in documents:
                recomputed = projections.run_again(document)
                for stream in streams:
                    row = sides(stream, slice(document, document + 1))
                    pairs = self._differentiate(stream, document, recomputed, row)
                    terms[document, stream] = self._enter(stream, pairs)
        self.sums.append_rows((self.layer, "weight_by_document"), terms)

    def mean(self) -> Float[Tensor, "stream term"]:
        """Return the same three numbers for the mean gradient over the documents."""
        rows, sums = [], self.sums.weight_total
        for stream in range(len(STREAMS)):
            numbers = sorted({key[3] for key in sums if key[:2] == (self.layer, stream)})
            sides = [tuple(sums[self.layer, stream, side, number] for number in numbers) for side in SIDES]
            rows.append(gram_terms(*sides).cpu())
        return torch.stack(rows) / max(self.sums.count((self.layer, "weight_by_document")), 1) ** 2

    def _differentiate(self, stream: int, document: int, projections: Projections, sides: Sides) -> Pairs:
        """Return both sides of the gradient of each parameter of one document; none if some weights are not known."""
        output, parameters = projections.streams[stream], projections.parameters
        if not output.requires_grad:
            return {}
        # The parameters that a stream depends on are found once: all of them are tried the first time.
        numbers = self._dependencies[stream] or range(len(parameters))
        leaves = [leaf for _, leaf in projections.adapters]
        candidates = [*(parameters[number] for number in numbers), *projections.packed, *leaves]
        by_side = [
            torch.autograd.grad(output, candidates, side.to(output.dtype), retain_graph=True, allow_unused=True)
            for side in sides
        ]
        count, marked = len(numbers), len(numbers) + len(projections.packed)
        for (parameter, _), *pair in zip(projections.adapters, *(side[marked:] for side in by_side), strict=True):
            if pair[0] is not None:
                self.adapters.add(document, parameter, (pair[0], pair[1]))
        if any(mark is not None for mark in by_side[0][count:marked]):
            return {}
        pairs_by_number = zip(numbers, *(side[:count] for side in by_side), strict=True)
        pairs: Pairs = {number: (left, right) for number, left, right in pairs_by_number if left is not None}
        self._dependencies[stream] = list(pairs)
        return pairs

    def _agrees(self, stream: int, trace: ProjectionTrace, recomputed: Projections, sides: Sides) -> bool | None:
        """Return whether both ways to the gradients of the first document agree in half of their digits.

        None if these gradients say nothing of it: all are zero, or some not finite.
        """
        traced = trace.pairs(trace.send_to_outputs(stream, sides), 0)
        pairs = self._differentiate(stream, 0, recomputed, (sides[0][:1], sides[1][:1]))
        if traced.keys() != pairs.keys():
            return False
        if not pairs:
            return True
        first, second = (torch.cat([x.flatten() for number in pairs for x in y[number]]) for y in (traced, pairs))
        half_of_digits = torch.finfo(second.dtype).eps ** 0.5
        first, second = (x.to(working_dtype(x.dtype)) for x in (first, second))
        error, size = (first - second).norm().item(), second.norm().item()
        return error < size * half_of_digits if math.isfinite(error) and size else None

    def _enter(self, stream: int, pairs: Pairs) -> Float[Tensor, " term"]:
        """Add gradients to their sums; return their terms."""
        rounded = {number: tuple(x.to(working_dtype(x.dtype)) for x in pair) for number, pair in pairs.items()}
        for number, pair in rounded.items():
            for side, x in zip(SIDES, pair, strict=True):
                self.sums.add_weight((self.layer, stream, side, number), x)
        return gram_terms(*zip(*rounded.values(), strict=True)) if rounded else gram_terms((), ())


def _conjunction(answers: Iterable[bool | None]) -> bool | None:
    """Return False if any is, else None if any is, else True."""
    answers = list(answers)
    return False if False in answers else None if None in answers else True


def _add_pair(pairs: Pairs, number: int, pair: Sequence[Tensor]) -> None:
    earlier = pairs.get(number)
    pairs[number] = (pair[0], pair[1]) if earlier is None else (earlier[0] + pair[0], earlier[1] + pair[1])


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
