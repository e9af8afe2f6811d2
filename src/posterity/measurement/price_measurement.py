"""What the regression of prices needs of windows of text: features of pairs and their measured prices, at each cut."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from posterity.decomposition.accumulator import Accumulator
from posterity.decomposition.credit import check_finite
from posterity.decomposition.first_keys import FirstKeys
from posterity.decomposition.prices import pass_prices
from posterity.decomposition.sweep import Scratch
from posterity.inputs.windows import Window
from posterity.measurement.price_account import SAMPLES
from posterity.measurement.price_calibration import Predictions
from posterity.measurement.window_batch import uniform_draws
from posterity.models.attach import refuse_other_paths
from posterity.models.chunked_loss import ChunkedLoss, LMHead
from posterity.models.observed_attention import recorded_features
from posterity.models.price_heads import (
    PriceHead,
    module_input,
    observation_rows,
    price_features,
    reader_share,
    solve_ridge,
)
from posterity.models.watch import Layer, Watch
from posterity.ops.attention import Backward
from posterity.ops.horizon_rules import Full

PENALTY = 3e-3  # of the ridge regression, see `solve_ridge`
FLOOR = 1e-10  # nats per query: what is below is nothing


@dataclass(frozen=True, eq=False)
class PricedPairs:
    """Pairs of a layer at one or more cuts, those that a later query sees.

    Attributes:
        features: See `price_features`.
        observed: See `observation_rows`, by key/value head.
        prices: Measured, in nats per query.
    """

    features: Float[Tensor, "row feature"]
    observed: Float[Tensor, "group row observation"]
    prices: Float[Tensor, "row group"]

    @classmethod
    def of(
        cls,
        hidden: Float[Tensor, "position width"],
        pairs: Float[Tensor, "group segment key"],
        back: Backward,
        ends: Sequence[int],
        window: int | None,
    ) -> "PricedPairs":
        """Collect the pairs of a window at each of its cuts.

        Args:
            hidden: Input of the layer.
            pairs: Prices by the segment of the queries that they are for.
            back: The layer's attention.
            ends: Of segments.
            window: Tokens that a query of the layer sees; None for all.
        """
        features, observed, prices = [], [], []
        for segment, (start, stop) in enumerate(pairwise(ends), start=1):
            positions = torch.arange(start, device=hidden.device)
            ages = start - positions
            queries = (stop - start) * reader_share(ages.double(), stop - start, window)
            seen = queries > 0
            features.append(price_features(hidden[:start], positions, ages)[seen])
            observed.append(observation_rows(recorded_features(back, start, window), positions, ages)[:, seen])
            prices.append((pairs[:, segment, :start] / queries).T[seen])
        return cls(torch.cat(features), torch.cat(observed, 1), torch.cat(prices))


class PriceMeasurement:
    """Prices of the pairs of a window at each cut, with the features that predict them."""

    def __init__(
        self, model: PreTrainedModel, watch: Watch, windows: Sequence[int | None], horizon: int, prices: str, seed: int
    ):
        """Prepare a model that is watched; `windows`: tokens that a query of each layer sees; others: `Prices.fit`."""
        refuse_other_paths(watch, "the price of a pair")
        self.model, self.watch, self.windows, self.horizon, self.seed = model, watch, windows, horizon, seed
        self.from_samples = prices == SAMPLES
        self.head = LMHead.probe(model)
        self.numbers = {layer: number for number, layer in enumerate(watch.layers)}
        self._scratch = Scratch()

    def send_pairs(self, window: Window, receive: Callable[[int, PricedPairs], None]) -> None:
        """Send `receive` each layer's number and its pairs."""
        ends = [*range(self.horizon, window.size, self.horizon), window.size]

        def observe(layer: Layer, back: Backward, projections: object) -> None:
            pairs = pass_prices(back, FirstKeys.of(back, 0), ends, self._scratch).pairs[0]
            check_finite(pairs, f"the gradient of layer {layer}")
            args, kwargs = self.watch.inputs[self.model.get_submodule(layer.name)]
            number = self.numbers[layer]
            receive(number, PricedPairs.of(module_input(args, kwargs)[0], pairs, back, ends, self.windows[number]))

        draws = uniform_draws(window.ids, self.seed)[None] if self.from_samples else None
        loss = ChunkedLoss.run(self.model, window.ids[None], self.head, draws=draws)
        with self.watch.override_rules((Full(), Full()), observe):
            (loss.drawn or loss).backward()

    def add(self, sums: Accumulator, window: Window) -> None:
        """Add what the regression needs of a window to sums."""

        def receive(number: int, pairs: PricedPairs) -> None:
            layer, logs = str(number), (pairs.prices + FLOOR).log()
            features, observed = pairs.features.double(), pairs.observed.double()
            sums.add((layer, "gram"), (features.mT @ features).cpu())
            sums.add((layer, "cross"), (features.mT @ logs).cpu())
            sums.add((layer, "observed gram"), (observed.mT @ observed).cpu())
            sums.add((layer, "observed cross"), (observed.mT @ logs.T[..., None]).cpu())
            sums.add((layer, "squares"), logs.square().sum(0).cpu())
            sums.add((layer, "rows"), torch.tensor(len(logs)))

        self.send_pairs(window, receive)

    def predict(self, heads: Sequence[PriceHead], window: Window) -> Predictions:
        """Return predicted logarithms and measured prices of all pairs of a window."""
        predicted, measured = [], []

        def receive(number: int, pairs: PricedPairs) -> None:
            head = heads[number].to(pairs.features.device)
            by_input = pairs.features.to(head.weight.dtype) @ head.weight + head.variance / 2
            by_attention = torch.stack([head.observed_logs(group, x) for group, x in enumerate(pairs.observed)], 1)
            predicted.append(((by_input + by_attention) / 2).double().flatten().cpu())
            measured.append(pairs.prices.double().flatten().cpu())

        self.send_pairs(window, receive)
        return Predictions.of(torch.cat(predicted), torch.cat(measured))


def solve_head(sums: Accumulator, number: int, window: int | None) -> PriceHead:
    """Return both maps of a layer, from the sums of `PriceMeasurement.add`."""

    def total(name: str) -> Tensor:
        return sums.total[str(number), name]

    squares, rows = total("squares"), int(total("rows"))
    weight, variance = solve_ridge(total("gram"), total("cross"), squares, rows, PENALTY)
    grams, crosses = total("observed gram"), total("observed cross")
    maps = [
        solve_ridge(gram, cross, square[None], rows, PENALTY)
        for gram, cross, square in zip(grams, crosses, squares, strict=True)
    ]
    observed, observed_variance = (torch.cat(parts, -1) for parts in zip(*maps, strict=True))
    return PriceHead(weight, variance, window, observed, observed_variance)
