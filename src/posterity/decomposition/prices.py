"""Prices of cached keys and values, and of windows: what later losses would lose without them, to second order.

For the edges S of query i in one head, delta = -sum_S ds_ij / (1 - sum_S a_ij) is the first-order change of the loss
(docs/method.md, Prices). Half of its square is the price, in nats: with losses of labels that the model itself draws,
that is the second-order change in Kullback-Leibler divergence. A pair is priced for its readers after its own position,
over the query heads that share it; a window of w positions for all queries, whose edges of lag w and more are left out,
but for those into the first keys of a document.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from posterity.decomposition.edge_sums import sum_edges
from posterity.decomposition.first_keys import FirstKeys
from posterity.decomposition.price_sums import PriceSums
from posterity.decomposition.sweep import Scratch
from posterity.ops.attention import Backward


@dataclass(frozen=True)
class PassPrices:
    """Prices of one backward pass of one layer, per document of the batch, in nats and float64."""

    pairs: Float[Tensor, "batch group segment key"]
    windows: Float[Tensor, "batch head window"]  # of 1, 2, 4, ... positions, for one head that has it
    layer_windows: Float[Tensor, "batch window"]  # for all heads of the layer together

    @classmethod
    def of(cls, sums: PriceSums, first_keys: FirstKeys, back: Backward) -> "PassPrices":
        """Return the prices from the sums over all edges but those into the first keys.

        The sums are changed in place.
        """
        first_keys.add_squares_(back, sums)
        beyond = sums.beyond.double().flip(3).cumsum(3).flip(3)  # batch, head, window, query
        attention, grad_score = beyond.unbind(0)
        change = grad_score / (1 - attention).clamp(min=torch.finfo(sums.beyond.dtype).eps)
        windows, layer_windows = (x.square().sum(-1) / 2 for x in (change, change.sum(1)))
        return cls(sums.squares / 2, windows, layer_windows)


def pass_prices(
    back: Backward, first_keys: FirstKeys, ends: Sequence[int] | None = None, scratch: Scratch | None = None
) -> PassPrices:
    """Sweep all edges of one backward pass for prices alone.

    Args:
        back: The backward pass.
        first_keys: Keys that every window keeps.
        ends: Of segments of readers, whose prices are kept apart; one segment by default.
        scratch: Keeps memory between calls.
    """
    _, sums = sum_edges(back, None, (back.lse.shape[2],) if ends is None else ends, first_keys.columns(), scratch)
    assert sums is not None
    return PassPrices.of(sums, first_keys, back)
