"""Prices in the ledger: what leaving out cached keys and values, or looking back less far, would cost in nats.

They take the losses of the text ("text"), in the same sweep as the credit; or of labels that the model draws itself
("samples"), in a backward pass of their own: then they are second-order changes of its own predictions (Fisher).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from posterity.decomposition.accumulator import Accumulator, stack_layers
from posterity.decomposition.bins import Bins
from posterity.decomposition.credit import check_finite, count_positions
from posterity.decomposition.first_keys import FirstKeys, Spans
from posterity.decomposition.prices import PassPrices, pass_prices
from posterity.decomposition.sweep import Scratch
from posterity.errors import InputError
from posterity.models.chunked_loss import ChunkedLoss
from posterity.models.watch import Layer, Watch
from posterity.ops.attention import Backward
from posterity.ops.horizon_rules import Full

TEXT, SAMPLES = "text", "samples"
PRICES = (TEXT, SAMPLES)


def check_prices(prices: str | None) -> str | None:
    """Return what the losses of prices are of, unchanged; raise InputError for anything but None and `PRICES`."""
    if prices is not None and prices not in PRICES:
        raise InputError(f"prices expects {' or '.join(map(repr, PRICES))}; got {prices!r}")
    return prices


class PriceAccount:
    """Sums of prices over documents; `variables()` are those of the result."""

    def __init__(self, watch: Watch, sums: Accumulator, sinks: int, positions: int):
        """Start empty; accumulate into `sums`. `sinks` and `positions` as in `posterity.account`.

        Raises:
            InputError: A horizon is in force.
        """
        if watch.cuts:
            raise InputError("prices are made of the whole gradient: leave the `with` of the horizon first")
        self.watch, self.sums, self.sinks, self.positions = watch, sums, sinks, positions
        self._scratch = Scratch()
        self._spans: Spans | None = None

    def backward(self, loss: ChunkedLoss, spans: Spans | None) -> None:
        """Send back the losses of drawn labels, for prices alone; another backward pass has to follow."""
        self._spans = spans
        with self.watch.override_rules((Full(), Full()), self._observe):
            loss.backward(retain_graph=True)

    def enter(self, layer: Layer, prices: PassPrices, back: Backward, spans: Spans | None) -> None:
        """Add the prices of one backward pass of one layer."""
        check_finite(prices.pairs, f"the gradient of layer {layer}")
        name = str(layer)
        by_position = count_positions(prices.pairs[:, :, 0], back, spans)
        self.sums.add((name, "price"), Bins.of_positions(self.positions, by_position.shape[-1]).sum(by_position.sum(0)))
        self.sums.add((name, "window_price"), prices.windows.sum(0))
        self.sums.append_rows((name, "price_by_document"), prices.pairs.sum((2, 3)))
        self.sums.append_rows((name, "window_price_by_document"), prices.layer_windows)

    def variables(self, positions: int, context: int) -> dict[str, np.ndarray]:
        """Return the variables of the result; key/value heads and heads that a layer does not have are NaN.

        Args:
            positions: Number of bins of positions.
            context: Tokens of the longest document.
        """
        layers, windows = [str(layer) for layer in self.watch.layers], len(window_sizes(context))

        def widen(x: Tensor, length: int) -> Tensor:
            return pad(x, (0, length - x.shape[-1]))

        total, rows = self.sums.total, self.sums.rows
        variables = {
            "price": stack_layers([widen(total[layer, "price"], positions) for layer in layers], 0),
            "price_by_document": stack_layers([torch.stack(rows[layer, "price_by_document"]) for layer in layers], 1),
        }
        if windows:
            by_layer = [
                torch.stack([widen(row, windows) for row in rows[layer, "window_price_by_document"]]).cpu()
                for layer in layers
            ]
            variables |= {
                "window_price": stack_layers([widen(total[layer, "window_price"], windows) for layer in layers], 0),
                "window_price_by_document": torch.stack(by_layer, 1),
            }
        return {name: x.cpu().numpy() for name, x in variables.items()}

    def _observe(self, layer: Layer, back: Backward, projections: object) -> None:
        first_keys = FirstKeys.of(back, self.sinks, self._spans)
        self.enter(layer, pass_prices(back, first_keys, scratch=self._scratch), back, self._spans)


def window_sizes(context: int) -> Sequence[int]:
    """Return the windows that are priced: powers of two below the context."""
    return [2**power for power in range((context - 1).bit_length())]
