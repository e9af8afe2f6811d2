"""Gradients of the hidden states at the input of each layer, split by own and later losses."""

import torch
from torch import nn

from posterity.decomposition.accumulator import Accumulator
from posterity.decomposition.bins import Bins
from posterity.decomposition.credit import check_finite, restart_positions
from posterity.decomposition.first_keys import Spans
from posterity.models.layer_inputs import LayerInputs
from posterity.models.watch import Watch
from posterity.ops.precision import working_dtype


class HiddenGradients:
    """Sums |own|², |later|² and their inner product of the gradients of the layers' inputs ("total" and "own")."""

    def __init__(self, model: nn.Module, watch: Watch, sums: Accumulator, positions: int):
        """Start empty; accumulate into `sums`; `positions` below this are exact."""
        self.inputs, self.sums, self.positions = LayerInputs(model, watch), sums, positions

    def add(self, windows: int, positions: int, spans: Spans | None = None) -> None:
        """Accumulate |own|², |later|² and their inner product by position; NaN for a layer without a gradient.

        `spans`: of the documents packed into each window, whose positions start again.
        """
        rows = []
        for layer in self.inputs.watch.layers:
            total, own = (self.inputs.grads.get(part, {}).get(layer) for part in ("total", "own"))
            if total is None or own is None:
                rows.append(torch.full((windows, 3, positions), torch.nan, dtype=torch.float64))
                continue
            total, own = (x.to(working_dtype(x.dtype)) for x in (total, own))
            later = total - own
            terms = [(x * y).sum(-1) for x, y in ((own, own), (later, later), (own, later))]
            row = torch.stack(terms, 1).double()
            rows.append(check_finite(row, f"the gradient of the hidden states of layer {layer}").cpu())
        by_position = torch.stack(rows, 1)  # window, layer, term, position
        if spans is not None:
            by_position = restart_positions(by_position, spans)
        bins = Bins.of_positions(self.positions, positions)
        self.sums.add((None, "hidden"), bins.sum(by_position.sum(0)))
        self.sums.append_rows((None, "hidden"), by_position.sum(-1))
        self.inputs.clear()
