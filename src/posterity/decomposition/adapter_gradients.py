"""The gradient of every parameter of the adapters inside attention modules, split into self and other.

An adapter's parameter may act on several streams, calls or layers at once; its gradient is the sum over all of them, so
rows are made when a backward pass is over.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity.axes import SIDES
from posterity.decomposition.accumulator import Accumulator
from posterity.decomposition.gram import gram_terms
from posterity.ops.precision import working_dtype

ROW = "adapter_by_document"


class AdapterSplit:
    """Squared norms and inner product of the two sides for each parameter: of each document, and of their mean."""

    def __init__(self, model: nn.Module, sums: Accumulator):
        """Accumulate rows "adapter_by_document" (term) and sums of gradients into `sums`, by names of `model`."""
        self.model, self.sums = model, sums
        self._layers: set[str] = set()  # that have been through the present backward pass
        self._documents: list[dict[int, list[Tensor]]] = []  # of that pass: both sides by id of the parameter

    def start_layer(self, layer: str, documents: int) -> None:
        """Note that a layer's part of a backward pass begins; the layer's second time is another backward pass."""
        if layer in self._layers:
            self.finish_pass()
        self._layers.add(layer)
        self._documents += [{} for _ in range(documents - len(self._documents))]

    def add(self, document: int, parameter: Tensor, sides: tuple[Tensor, Tensor]) -> None:
        """Add what one stream of one layer sends to a parameter."""
        by_parameter, pair = self._documents[document], [x.to(working_dtype(x.dtype)) for x in sides]
        earlier = by_parameter.get(id(parameter))
        by_parameter[id(parameter)] = pair if earlier is None else [
            x + y.to(x.device) for x, y in zip(earlier, pair, strict=True)
        ]  # fmt: skip

    def finish_pass(self) -> None:
        """Make the rows of the backward pass that is over; none in a model without adapters."""
        if not (any(self._documents) or self._names()):
            self.clear()
            return
        names = {id(x): name for name, x in self.model.named_parameters()}
        layer = next(iter(self._layers), "")
        before = self.sums.count((layer, "weight_by_document")) - len(self._documents)
        for number, by_parameter in enumerate(self._documents):
            by_name = {names[key]: sides for key, sides in by_parameter.items() if key in names}
            for name in dict.fromkeys([*by_name, *self._names()]):
                key, sides = (name, ROW), by_name.get(name)
                missing = before + number - self.sums.count(key)  # documents in which it was not active
                self.sums.append_rows(key, [gram_terms((), ())] * missing)
                if sides is None:
                    self.sums.append_rows(key, [gram_terms((), ())])
                    continue
                self.sums.append_rows(key, [gram_terms(*((x,) for x in sides))])
                for side, x in zip(SIDES, sides, strict=True):
                    self.sums.add((name, f"adapter_{side}"), x)
        self.clear()

    def clear(self) -> None:
        """Forget the backward pass that is not over yet."""
        self._layers.clear()
        self._documents.clear()

    def variables(self) -> dict[str, Float[Tensor, "..."]]:
        """Return the variables of the result: none without adapters. A parameter that is not active has no gradient."""
        names = self.names()
        if not names:
            return {}
        rows = [torch.stack([row.cpu() for row in self.sums.rows[name, ROW]]).nan_to_num(0.0) for name in names]
        means = []
        for name in names:
            sides = [(self.sums.total[name, f"adapter_{side}"],) for side in SIDES]
            means.append(gram_terms(*sides).cpu() / max(len(rows[0]), 1) ** 2)
        return {"adapter_by_document": torch.stack(rows, 1), "adapter_mean": torch.stack(means)}

    def names(self) -> list[str]:
        """Return the names of the parameters with a gradient, in the order of the model."""
        names = set(self._names())
        order = [name for name, _ in self.model.named_parameters() if name in names]
        return [*order, *sorted(names - set(order))]

    def _names(self) -> list[str]:
        return [name for name, variable in self.sums.rows if variable == ROW and name is not None]


def merge_passes(sums: Accumulator, passes: Accumulator) -> None:
    """Add passes that are over to `sums`; both get a row for each document of adapters that only the other knows."""
    keys = dict.fromkeys(key for part in (sums, passes) for key in part.rows if key[1] == ROW)
    for part in (sums, passes) if keys else ():
        documents = max((part.count(key) for key in part.rows if key[1] == "weight_by_document"), default=0)
        for key in keys:
            part.append_rows(key, [gram_terms((), ())] * (documents - part.count(key)))
    sums.merge(passes)
