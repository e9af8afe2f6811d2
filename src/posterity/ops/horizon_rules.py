"""Horizon rules: which part of the gradient may reach the writer of a key or a value, as a factor on every edge.

A rule multiplies the gradient that edge (i, j) sends to k_j and v_j by `factor(i - j)`. Lags add along every path from
a key to a loss, so `Discount(rate)` in all layers gives exactly sum_t rate^(t-j) dl_t/dk_j, and `Myopic` the own loss
alone (docs/method.md). A hard window on edges is *not* a hard window on losses.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity.errors import InputError


@runtime_checkable
class Rule(Protocol):
    """A factor between 0 and 1 for every lag; 1 at lag 0."""

    def factor(self, lag: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the factors in float64, for lags >= 0."""
        ...


@dataclass(frozen=True)
class Full:
    """Everything, as in plain training."""

    def factor(self, lag: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return 1 at every lag."""
        return torch.ones_like(lag, dtype=torch.float64)


@dataclass(frozen=True)
class Myopic:
    """The self edge only; in all layers of a model: the own loss only."""

    def factor(self, lag: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return 1 at lag 0, else 0."""
        return (lag == 0).double()


@dataclass(frozen=True)
class Discount:
    """`rate ** lag`: losses at distance d count rate^d. Rate 0 is `Myopic`, rate 1 is `Full`.

    Raises:
        InputError: The rate is not in [0, 1].
    """

    rate: float

    def __post_init__(self):
        """Check the rate."""
        if not _is_number(self.rate) or not 0 <= self.rate <= 1:
            raise InputError(f"Discount expects a rate from 0 to 1; got {self.rate!r}")

    def factor(self, lag: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the powers of the rate."""
        return torch.pow(torch.tensor(float(self.rate), dtype=torch.float64, device=lag.device), lag)


@dataclass(frozen=True)
class EdgeWindow:
    """Edges of at most `lags`; `EdgeWindow(0)` is `Myopic`.

    Raises:
        InputError: `lags` is negative or no whole number.
    """

    lags: int

    def __post_init__(self):
        """Check the number of lags."""
        if not _is_number(self.lags) or self.lags != int(self.lags) or self.lags < 0:
            raise InputError(f"EdgeWindow expects a whole number of lags, at least 0; got {self.lags!r}")

    def factor(self, lag: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return 1 up to the last lag of the window, then 0."""
        return (lag <= self.lags).double()


@dataclass(frozen=True)
class Leak:
    """The self edge in full, a fraction of all others. Leak(0) is `Myopic`, Leak(1) is `Full`.

    A path over n edges between positions keeps fraction^n, so this is no fixed share of the later losses.

    Raises:
        InputError: The fraction is not in [0, 1].
    """

    fraction: float

    def __post_init__(self):
        """Check the fraction."""
        if not _is_number(self.fraction) or not 0 <= self.fraction <= 1:
            raise InputError(f"Leak expects a fraction from 0 to 1; got {self.fraction!r}")

    def factor(self, lag: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return 1 at lag 0, else the fraction."""
        return torch.where(lag == 0, 1.0, float(self.fraction)).double()


RULES = {"full": Full, "myopic": Myopic, "discount": Discount, "window": EdgeWindow, "leak": Leak}


def parse(text: str) -> Rule:
    """Parse the name of a rule: full, myopic, discount:0.9, window:16 or leak:0.1.

    Raises:
        InputError: There is no such rule, or its number is wrong.
    """
    name, colon, number = text.strip().partition(":")
    has_number = name in ("discount", "window", "leak")
    try:
        if name not in RULES or has_number != bool(colon):
            raise ValueError
        args = () if not has_number else (int(number),) if name == "window" else (float(number),)
    except ValueError:
        raise InputError(
            f"expected a horizon full, myopic, discount:RATE, window:LAGS or leak:FRACTION; got {text!r}"
        ) from None
    return RULES[name](*args)


def discount_rate(rule: Rule) -> float:
    """Return the rate of a rule whose factors are rate^lag.

    Raises:
        InputError: It is another rule.
    """
    if isinstance(rule, (Full, Myopic)):
        return float(isinstance(rule, Full))
    if isinstance(rule, Discount):
        return float(rule.rate)
    raise InputError(
        f"a horizon on a state expects Full(), Myopic() or Discount(rate), whose factors are rate^lag; got {rule!r}"
    )


def factors_by_lag(rule: Rule, length: int, like: Tensor) -> Float[Tensor, " lag"] | None:
    """Return the rule's factors for lags below `length`, with the dtype and device of `like`; None if all are 1.

    What the dtype cannot hold in full precision is 0.

    Raises:
        InputError: The rule is none.
    """
    if isinstance(rule, Full):  # every backward pass asks; a GPU need not be waited for
        return None
    lag = torch.arange(length, device=like.device)
    factors = None if isinstance(rule, type) else getattr(rule, "factor", lambda _: None)(lag)
    if not isinstance(factors, Tensor) or factors.shape != lag.shape:
        outdated = not isinstance(rule, type) and hasattr(rule, "weight") and not hasattr(rule, "factor")
        hint = ": the method of a rule is factor(lag), no longer weight(lag)" if outdated else ""
        raise InputError(f"expected a horizon such as Myopic(), Discount(0.9) or EdgeWindow(16); got {rule!r}{hint}")
    if not ((factors >= 0) & (factors <= 1)).all() or factors[0] != 1:
        raise InputError(f"a horizon's factors lie in [0, 1] and are 1 at lag 0; those of {rule!r} do not")
    if (factors == 1).all():
        return None
    return factors.masked_fill(factors < torch.finfo(like.dtype).tiny, 0).to(like.dtype)


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x == x and abs(x) != float("inf")
