"""Which layers may look back less far, by the prices of a result: the cheapest layers at one window."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from posterity.errors import InputError
from posterity.results.price_stats import PER_TOKEN, window_prices
from posterity.results.ratios import mean_and_error, ratio, require_lags, required_variable
from posterity.results.schema import RESULT
from posterity.results.steps import latest_step

BUDGET = 0.01  # nats per token that local layers may cost, by their prices
CHEAPEST, EVERY_OTHER, LEAST_ATTENTION, RANDOM = CHOICES = (
    "cheapest", "evenly spaced", "least attention", "random",
)  # fmt: skip
DRAWS = 4  # of random layers


class Estimate(NamedTuple):
    """A number with its standard error, NaN where there is none."""

    value: float
    error: float


@dataclass(frozen=True)
class LocalLayers:
    """Layers that look back no further than one window, with what that costs by their prices, in nats per token."""

    layers: tuple[int, ...]
    window: int  # tokens that a query sees, its own included
    predicted: Estimate  # the sum of the layers' prices; error over windows of text

    @property
    def windows(self) -> dict[int, int]:
        """The window of each local layer."""
        return dict.fromkeys(self.layers, self.window)


@dataclass(frozen=True)
class Trial:
    """What layers that were chosen in one way cost when they are really local, in nats per token, on other text."""

    choice: str  # one of CHOICES
    layers: tuple[int, ...]  # () for several random draws
    predicted: Estimate
    divergence: Estimate  # Kullback-Leibler, of the model's predictions from those with local layers
    loss: Estimate  # change


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """The prices of windows by layer, and the layers that may be local.

    Attributes:
        result: The result with the prices.
        count: Local layers that were asked for; None for a table alone.
        budget: Nats per token that they may cost, where no window was named.
        proposal: The layers that cost least; None where none were asked for, or no window is within the budget.
        trials: What the proposal and other choices cost when they are really local; () if that was not tried.
        trial_windows: Windows of text of the trials.
    """

    result: xr.Dataset
    count: int | None = None
    budget: float = BUDGET
    proposal: LocalLayers | None = None
    trials: tuple[Trial, ...] = ()
    trial_windows: int = 0

    @property
    def prices(self) -> xr.Dataset:
        """`price` and `error` in nats per token, dims (layer, window); NaN where a layer looks back no further."""
        prices = window_prices(self.result)
        return prices.where(reaches_beyond(self.result, prices.window.values))

    def table(self) -> pd.DataFrame:
        """Return the trials, a row for each number: choice, quantity, value, standard error, units."""
        rows = [
            (trial.choice, name, *number, PER_TOKEN)
            for trial in self.trials
            for name, number in (
                ("predicted", trial.predicted), ("divergence", trial.divergence), ("loss change", trial.loss),
            )
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=["choice", "quantity", "value", "error", "units"])

    def record(self) -> dict[str, Any]:
        """Return the numbers of the proposal and its trials for JSON, which has no NaN."""
        assert self.proposal is not None

        def numbers(estimate: Estimate) -> list[float | None]:
            return [None if math.isnan(x) else x for x in estimate]

        trials = {
            trial.choice: {"divergence": numbers(trial.divergence), "loss_change": numbers(trial.loss)}
            for trial in self.trials
        }
        return {"predicted": numbers(self.proposal.predicted), "trials": trials, "units": PER_TOKEN}


def plan_windows(
    result: xr.Dataset, local: float | str | None = None, window: int | None = None, budget: float = BUDGET
) -> WindowPlan:
    """Choose the layers that cost least when they look back no further than a window.

    Args:
        result: A result of `posterity.measure` with `prices`.
        local: How many layers may be local: a share of all layers (0.5, "1/2"), or a whole number of them (12, "12");
            None for the prices alone.
        window: Tokens that they see, a power of two below the context; None for the smallest at which the sum of their
            prices is within the budget.
        budget: Nats per token.

    Raises:
        InputError: The result has no prices, or no lags; there are not so many layers, or no such window.
    """
    result = latest_step(RESULT.check(result))
    required_variable(result, "window_price_by_document")
    require_lags(result)
    sizes = result.window.values.tolist()
    count = local_count(result.sizes["layer"], sizes, local, window, budget)
    if count is None:
        return WindowPlan(result)
    if window is not None:
        return WindowPlan(result, count, budget, cheapest_layers(result, count, window))
    for size in sizes:
        if len(candidates(result, size)) >= count:
            proposal = cheapest_layers(result, count, size)
            if proposal.predicted.value <= budget:
                return WindowPlan(result, count, budget, proposal)
    return WindowPlan(result, count, budget)


def local_count(
    layers: int, sizes: Sequence[int], local: float | str | None, window: int | None, budget: float
) -> int | None:
    """Return how many of so many layers may be local, None for none; check what was asked for with it.

    Raises:
        InputError: See `plan_windows`.
    """
    if local is None:
        if window is not None:
            raise InputError(f"a window of {window} is for local layers: say how many (--local 1/2)")
        return None
    if not budget >= 0:
        raise InputError(f"expected a budget of at least 0 nats per token; got {budget}")
    if window is not None and window not in sizes:
        known = ", ".join(map(str, sizes))
        raise InputError(f"expected one of the windows {known}, powers of two below the context; got {window}")
    return layer_count(local, layers)


def layer_count(local: float | str, layers: int) -> int:
    """Return a number of layers from a share of all (0.5, "1/2", "1.0") or a whole number (12, "12").

    Raises:
        InputError: It is neither, or not from 1 to all layers.
    """
    expected = f"expected local layers as a share above 0, at most 1 (1/2, 0.5), or a number from 1 to {layers}"
    whole = local.strip().isdecimal() if isinstance(local, str) else isinstance(local, (int, np.integer))
    try:
        if isinstance(local, bool):
            raise TypeError("no number")
        value = Fraction(local.strip() if isinstance(local, str) else local)  # type: ignore[arg-type]
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise InputError(f"{expected}; got {local!r}") from error
    if not 0 < value <= (layers if whole else 1):
        raise InputError(f"{expected}; got {local}")
    return int(value) if whole else max(1, int(value.limit_denominator(1000) * layers))


def reaches_beyond(result: xr.Dataset, windows: Sequence[int]) -> xr.DataArray:
    """Return whether a layer has any edge beyond a window, the first keys left aside: bool, dims (layer, window)."""
    edges = result.edges.sel(reader_of="rest")
    sizes = xr.DataArray(list(windows), dims="window", name="window").assign_coords(window=list(windows))
    return (edges * (edges.lag >= sizes)).sum("lag") > 0


def candidates(result: xr.Dataset, window: int) -> list[int]:
    """Return the layers that look back further than a window."""
    return np.flatnonzero(reaches_beyond(result, [window]).values[:, 0]).tolist()


def cheapest_layers(result: xr.Dataset, count: int, window: int) -> LocalLayers:
    """Return the layers whose windows cost least.

    Raises:
        InputError: Fewer layers look back further than the window.
    """
    numbers = _candidates(result, count, window)
    price = window_prices(result).price.sel(window=window).values
    return local_layers(result, sorted(numbers, key=lambda layer: (price[layer], layer))[:count], window)


def local_layers(result: xr.Dataset, layers: Sequence[int], window: int) -> LocalLayers:
    """Return layers that are local at a window, with the sum of their prices."""
    price = result.window_price_by_document.sel(window=window).isel(layer=list(layers)).sum("layer")
    sum_of_prices = ratio(price, result.tokens)
    estimate = Estimate(float(sum_of_prices.share), float(sum_of_prices.error))
    return LocalLayers(tuple(sorted(layers)), window, estimate)


def other_choices(result: xr.Dataset, proposal: LocalLayers, seed: int = 0) -> Iterator[tuple[str, LocalLayers]]:
    """Yield as many layers at the same window, chosen without prices: evenly spaced, by attention, at random."""
    count, window = len(proposal.layers), proposal.window
    numbers = _candidates(result, count, window)
    spaced = [numbers[(2 * index + 1) * len(numbers) // (2 * count)] for index in range(count)]
    yield EVERY_OTHER, local_layers(result, spaced, window)
    share = attention_beyond(result, window)
    yield LEAST_ATTENTION, local_layers(result, sorted(numbers, key=lambda x: (share[x], x))[:count], window)
    generator = np.random.default_rng(seed)
    for _ in range(DRAWS):
        yield RANDOM, local_layers(result, generator.choice(numbers, count, replace=False).tolist(), window)


def attention_beyond(result: xr.Dataset, window: int) -> np.ndarray:
    """Return the share of each layer's attention that lies beyond a window and the first keys: (layer,)."""
    attention = result.attention
    beyond = attention.sel(reader_of="rest").where(attention.lag >= window, 0).sum(("head", "lag"))
    return (beyond / attention.sum(("head", "reader_of", "lag"))).values


def pool_trials(trials: Sequence[Trial]) -> Trial:
    """Return the mean over several draws, with its standard error over them."""
    columns = [[getattr(trial, name).value for trial in trials] for name in ("predicted", "divergence", "loss")]
    return Trial(trials[0].choice, (), *(Estimate(*map(float, mean_and_error(column))) for column in columns))


def _candidates(result: xr.Dataset, count: int, window: int) -> list[int]:
    numbers = candidates(result, window)
    if count > len(numbers):
        raise InputError(
            f"expected at most {len(numbers)} local layers at a window of {window}: the others look back no further; "
            f"got {count}: lower --local or --window"
        )
    return numbers
