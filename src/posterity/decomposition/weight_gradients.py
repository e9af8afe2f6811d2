"""The gradient of W_Q, W_K and W_V, split into the part a position sends to itself and the rest.

The projections of a layer are run once more from its saved input, and the two parts of dq, dk and dv are sent back
through them. What lies between weights and queries (norms, rotary embedding, a fused matrix) needs no case of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity.axes import SIDES
from posterity.decomposition.accumulator import Sums
from posterity.decomposition.credit import SelfPart
from posterity.ops.attention import Backward, group_sum, working


@dataclass(frozen=True)
class Projections:
    """Query, key and value of one document, made anew from `parameters` with a graph between them."""

    streams: tuple[Tensor, Tensor, Tensor]
    parameters: list[Tensor]


class WeightSplit:
    """Squared norms and inner product of the two parts for one layer: of each document, and of their mean."""

    def __init__(self, sums: Sums, name: str):
        """Rows "weight_by_document" (stream, term) and the gradients' sums go to `sums`, under the layer's name."""
        self.sums, self.name = sums, name
        self._reached: list[list[int]] = [[], [], []]  # of each stream, the parameters that it depends on

    def add(self, back: Backward, part: SelfPart, project: Callable[[int], Projections]) -> None:
        """Account for the documents of one backward pass; `project` makes the projections of one of them."""
        groups = back.key.shape[1]
        wholes = back.grad_query, group_sum(back.grad_key, groups), group_sum(back.grad_value, groups)
        owns = part.query, group_sum(part.key, groups), group_sum(part.value, groups)
        for document in range(len(back.query)):
            with torch.enable_grad():
                projections = project(document)
            row = [
                self._stream(stream, projections, own[document, None], whole[document, None])
                for stream, (own, whole) in enumerate(zip(owns, wholes, strict=True))
            ]
            self.sums.note(f"{self.name}/weight_by_document", [torch.stack(row)])

    def mean(self) -> Float[Tensor, "stream term"]:
        """The same three numbers for the mean gradient over the documents."""
        rows = []
        for stream in range(3):
            own = sorted(name for name in self.sums.total if name.startswith(f"{self.name}/weight/{stream}/self/"))
            other = [name.replace("/self/", "/other/") for name in own]
            parts = [tuple(self.sums.total[name] for name in names) for names in (own, other) if names]
            rows.append(norms(parts))
        return torch.stack(rows).cpu() / max(self.sums.count(f"{self.name}/weight_by_document"), 1) ** 2

    def _stream(self, stream: int, projections: Projections, own: Tensor, whole: Tensor) -> Float[Tensor, " term"]:
        output, parameters = projections.streams[stream], projections.parameters
        if not output.requires_grad or not parameters:  # made by another layer
            return torch.full((3,), torch.nan, dtype=torch.float64)
        # The parameters that reach a stream are found once: all of them are tried the first time.
        reached = self._reached[stream] or range(len(parameters))
        wanted = [parameters[index] for index in reached]
        own, whole = own.to(output.dtype), whole.to(output.dtype)
        parts = [
            torch.autograd.grad(output, wanted, grad, retain_graph=True, allow_unused=True)
            for grad in (own, whole - own)
        ]
        found = {index: pair for index, *pair in zip(reached, *parts, strict=True) if pair[0] is not None}
        self._reached[stream] = list(found)
        terms = []
        for index, pair in found.items():
            terms.append([x.to(working(x.dtype)) for x in pair])
            for side, x in zip(SIDES, terms[-1], strict=True):
                self.sums.add(f"{self.name}/weight/{stream}/{side}/{index:04d}", x)
        return norms(list(zip(*terms, strict=True)))


def norms(parts: list[tuple[Tensor, ...]]) -> Float[Tensor, " term"]:
    """|one|^2, |two|^2 and their inner product, for two parts of a gradient over all parameters; NaN without any."""
    if not parts:
        return torch.full((3,), torch.nan, dtype=torch.float64)
    one, two = parts

    def inner(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> Tensor:
        products = (torch.dot(x.flatten(), y.flatten()).double() for x, y in zip(left, right, strict=True))
        return torch.stack(list(products)).sum()

    return torch.stack((inner(one, one), inner(two, two), inner(one, two)))


def projection_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Weights and biases of all projections inside an attention module, by name; norms and other vectors left out."""
    found = {}
    for prefix, child in module.named_modules():
        own = dict(child.named_parameters(recurse=False))
        if any(parameter.dim() > 1 for parameter in own.values()):
            found |= {f"{prefix}.{name}".lstrip("."): parameter for name, parameter in own.items()}
    return found
