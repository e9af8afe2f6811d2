"""Prices of cached keys and values, predicted when they are cached: linear maps of two kinds of features.

The logarithm of what a pair is worth to one later query is predicted for each key/value head of a layer from the
input of its attention module, scaled to a root mean square of 1; from its position; and from its age, the number of
tokens that came after it. Only the age changes while a pair is cached. A second map predicts it for the pairs of a
prompt from the attention of the prompt's last queries (`observed_attention`); the two logarithms are averaged. How the
maps are fitted: `measurement.price_fit`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

OTHERS = 4  # features beside the input: logarithms of age and position, whether the position is the first, and 1
AGE = -4  # the feature of them that changes
_COLUMNS = 16  # a product of fewer takes longer
MAPS = ("weight", "variance", "observed", "observed_variance")  # tensors of a `PriceHead`


@dataclass(frozen=True, eq=False)
class PriceHead:
    """The maps of one layer.

    Attributes:
        weight: For the input's features and the others, one column for each key/value head.
        variance: Of what the map leaves unexplained of the logarithm, so that sums of prices are right on average.
        window: Tokens that a query of the layer sees; None for all.
        observed: The second map: for the features of observed attention and the others, one column for each key/value
            head. None for none.
        observed_variance: What it leaves unexplained.
    """

    weight: Float[Tensor, "feature group"]
    variance: Float[Tensor, " group"]
    window: int | None
    observed: Float[Tensor, "observation group"] | None = None
    observed_variance: Float[Tensor, " group"] | None = None

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.weight.shape[1]

    @property
    def width(self) -> int:
        """Width of the input."""
        return len(self.weight) - OTHERS

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that it has, by name."""
        return {name: getattr(self, name) for name in MAPS if getattr(self, name) is not None}

    def to(self, device: torch.device) -> "PriceHead":
        """Return the maps on a device."""
        return PriceHead(window=self.window, **{name: x.to(device) for name, x in self.tensors().items()})

    def newborn(
        self, hidden: Float[Tensor, "batch position width"], positions: Int[Tensor, "batch position"]
    ) -> Float[Tensor, "batch group position"]:
        """Return the logarithm of what a pair is worth to one query at an age of 1."""
        weight = self.weight
        hidden = hidden.to(torch.promote_types(hidden.dtype, weight.dtype))
        columns = pad(weight[:-OTHERS], (0, -self.groups % _COLUMNS)).to(hidden.dtype)
        logs = (hidden @ columns)[..., : self.groups] * input_scale(hidden)
        others = position_features(positions).to(weight.dtype) @ weight[-OTHERS + 1 :]
        return (logs.to(weight.dtype) + others + self.variance / 2).mT

    def add_observation(
        self,
        group: int,
        newborn: Float[Tensor, " position"],
        features: Float[Tensor, "position observation"],
        positions: Int[Tensor, " position"],
    ) -> Float[Tensor, " position"]:
        """Return `newborn` such that `log_prices`, after the prompt, is the mean of both predictions.

        Args:
            group: The key/value head of the pairs.
            newborn: Of `newborn`, for all pairs of a prompt.
            features: Of `observed_attention`.
            positions: Of the pairs; the last was cached last.
        """
        ages = positions[-1] + 1 - positions
        logs = self.observed_logs(group, observation_rows(features, positions, ages))
        return (newborn + logs - self.weight[AGE, group] * ages.to(newborn.dtype).log()) / 2

    def observed_logs(self, group: int, rows: Float[Tensor, "pair observation"]) -> Float[Tensor, " pair"]:
        """Return what the attention of a prompt's last queries alone says: logarithms of prices per query.

        Args:
            group: The key/value head of the pairs.
            rows: Of `observation_rows`.
        """
        assert self.observed is not None
        assert self.observed_variance is not None
        return rows.to(self.observed.dtype) @ self.observed[:, group] + self.observed_variance[group] / 2

    def log_prices(
        self, group: int, newborn: Float[Tensor, " pair"], ages: Int[Tensor, " pair"], horizon: int
    ) -> Float[Tensor, " pair"]:
        """Return the logarithm of the mean worth of pairs to each of the next queries; -inf where none sees them.

        Args:
            group: The key/value head of the pairs.
            newborn: Of `newborn`.
            ages: Tokens from the pair to the next query, 1 for the latest.
            horizon: Queries.
        """
        ages = ages.to(newborn.dtype)
        return newborn + self.weight[AGE, group] * ages.log() + torch.log(reader_share(ages, horizon, self.window))


def price_features(
    hidden: Float[Tensor, "position width"], positions: Int[Tensor, " position"], ages: Int[Tensor, " position"]
) -> Float[Tensor, "position feature"]:
    """Return the features of pairs: their layer's input, logarithms of age and position, the first position, and 1."""
    scaled = scale_input(hidden)
    return torch.cat((scaled, ages.to(scaled).log()[:, None], position_features(positions).to(scaled)), -1)


def observation_rows(
    features: Float[Tensor, "*batch position observation"],
    positions: Int[Tensor, " position"],
    ages: Int[Tensor, " position"],
) -> Float[Tensor, "*batch position feature"]:
    """Return the features of observed attention, and those beside the input of `price_features`."""
    others = torch.cat((ages.clamp(min=1).to(features).log()[:, None], position_features(positions).to(features)), -1)
    return torch.cat((features, others.expand(*features.shape[:-1], -1)), -1)


def scale_input(hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """Return a layer's input with a root mean square of 1, in float32 at least."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return hidden * input_scale(hidden)


def input_scale(hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch 1"]:
    """Return the reciprocal root mean square of a layer's input."""
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return hidden.shape[-1] ** 0.5 / norm.clamp(min=torch.finfo(hidden.dtype).tiny ** 0.5)


def position_features(positions: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch three"]:
    """Return what is said of positions: log(1 + position), whether it is the first, and 1."""
    numbers = positions.to(torch.float32)
    return torch.stack((numbers.log1p(), (positions == 0).float(), torch.ones_like(numbers)), -1)


def reader_share(ages: Tensor, horizon: int, window: int | None) -> Tensor:
    """Return the share of the next `horizon` queries that see pairs of these ages under a window."""
    return torch.ones_like(ages) if window is None else ((window - ages) / horizon).clamp(0, 1)


def module_input(args: tuple, kwargs: dict) -> Float[Tensor, "batch position width"]:
    """Return the hidden states among the arguments of an attention module."""
    hidden = kwargs.get("hidden_states")
    return hidden if hidden is not None else next(x for x in args if isinstance(x, Tensor))


def solve_ridge(
    gram: Float[Tensor, "feature feature"],
    cross: Float[Tensor, "feature group"],
    squares: Float[Tensor, " group"],
    rows: int,
    penalty: float,
) -> tuple[Float[Tensor, "feature group"], Float[Tensor, " group"]]:
    """Return the ridge regression of logarithms of prices on features, and the variance that it leaves unexplained.

    Args:
        gram: Sums over pairs of products of features, of which the last is 1; in float64, as the other sums.
        cross: Sums of products of features and logarithms.
        squares: Sums of squares of logarithms.
        rows: Pairs in the sums.
        penalty: On squares of weights of features that have a variance of 1, for each pair.
    """
    mean = gram[-1] / rows
    variance = (gram.diagonal() / rows - mean.square()).clamp(min=torch.finfo(gram.dtype).eps)
    ridge = penalty * rows * variance
    ridge[-1] = 0  # a mean is no weight
    weight = torch.linalg.solve(gram + torch.diag(ridge), cross)
    residual = squares - 2 * (weight * cross).sum(0) + (weight * (gram @ weight)).sum(0)
    return weight.float(), (residual / rows).float()
