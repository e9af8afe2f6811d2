"""What a clause of the idea is: a statement, its measurement, its baseline, a verdict and a picture.

Every clause is one function from a `Subject` to a `Finding`, and one from the audit's Dataset to its charts.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformers import PreTrainedModel

from posterity.clauses.drawing import Chart, View
from posterity.errors import InputError
from posterity.inputs import windows as corpus
from posterity.measurement.measure import measure
from posterity.progress import progress_bar
from posterity.results.audit_schema import FAILS, HOLDS, MIXED, Finding
from posterity.results.formatting import named


@dataclass(frozen=True)
class Plan:
    """How much is measured: the defaults of `posterity audit`. `quick()` is a quarter of it or less."""

    context: int = 512  # tokens of a window, for the rows that read gradients
    limit: int = 4  # windows of it
    contexts: tuple[int, ...] = (64, 128, 256, 512, 1024)  # row 5
    span: int = 4096  # tokens of text, the same for every context of row 5
    short: int = 64  # tokens of a window, for rows 6 and 8, in which every head takes passes of its own
    budget: int = 256  # tokens of text for each of these passes
    positions: int = 4  # of each window, for what single positions are worth
    share: float = 0.25  # of the positions of a window, replaced together for what a head writes
    fold: float = 0.01  # nats per token that folded heads may cost, row 8
    prefixes: int = 6  # rows 9 and 10
    prefix: int = 64  # tokens
    future: int = 32  # tokens of a continuation
    draws: int = 8  # continuations of a prefix, pasts of a text
    seed: int = 0

    def __post_init__(self):
        """Check the numbers."""
        for name in ("limit", "budget", "positions", "prefixes", "future"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} of at least 1; got {getattr(self, name)}")
        for name in ("context", "short", "prefix", "draws"):
            if getattr(self, name) < 2:
                raise InputError(f"expected {name} of at least 2; got {getattr(self, name)}")
        if not isinstance(self.contexts, tuple):
            raise InputError(f"contexts expects several lengths, such as (64, 128); got {self.contexts!r}")
        grow = all(one < two for one, two in pairwise(self.contexts))
        if len(self.contexts) < 2 or self.contexts[0] < 2 or not grow:
            raise InputError(f"contexts expects two or more lengths that grow, such as 64,128; got {self.contexts}")
        if self.span < self.contexts[-1]:
            raise InputError(f"expected a span of at least the longest context, {self.contexts[-1]}; got {self.span}")
        if self.fold < 0 or not 0 < self.share <= 1:
            raise InputError(f"expected fold of at least 0 and a share from 0 to 1; got {self.fold} and {self.share}")

    def fitted(self, longest: int, given: Collection[str]) -> "Plan":
        """The plan for a model that reads at most so many tokens: what was not `given` shrinks until it fits.

        Raises:
            InputError: What was given does not fit.
        """
        contexts = tuple(one for one in self.contexts if one <= longest)
        contexts = contexts if len(contexts) > 1 else (max(2, longest // 4), max(3, longest // 2), longest)
        wanted = {
            "context": min(self.context, longest), "contexts": contexts, "short": min(self.short, longest),
            "prefix": min(self.prefix, longest - longest // 3), "future": min(self.future, longest // 3),
        }  # fmt: skip
        if self.prefix + self.future <= longest:
            wanted |= {"prefix": self.prefix, "future": self.future}
        for name, fit in wanted.items():
            if name in given and getattr(self, name) != fit:
                raise InputError(
                    f"the model reads at most {longest} tokens; got {name} {getattr(self, name)}: lower it"
                )
        span = max(self.span, contexts[-1]) if "span" not in given else self.span
        return replace(self, **wanted, span=span)

    @classmethod
    def quick(cls) -> "Plan":
        """A first look."""
        return cls(
            context=256, limit=2, contexts=(64, 128, 256), span=768, short=24, budget=48, positions=2, prefixes=3,
            draws=4,
        )  # fmt: skip


@dataclass
class Subject:
    """What is audited: a model, its texts and how much of them; what several rows need is measured once."""

    model: PreTrainedModel
    tokenizer: Any
    documents: list[Any]
    plan: Plan
    shown: bool = False  # progress bars

    @cached_property
    def ledger(self) -> xr.Dataset:
        """The result of `posterity.measure` at the plan's context."""
        return self.measure(self.plan.context, self.plan.limit, "octaves")

    def measure(self, context: int, limit: int, lags: str, batch: int = 1) -> xr.Dataset:
        """The result of `posterity.measure` on the first windows."""
        return measure(
            self.model, self.tokenizer, self.documents, context=context, limit=limit, lags=lags, batch=batch,
            progress=False, seed=self.plan.seed,
        )  # fmt: skip

    def windows(self, context: int, limit: int | None) -> list[Tensor]:
        """Token ids of the first windows of a length."""
        return [window.ids for window in corpus.windows(self.documents, self.tokenizer, context, limit)]

    def generator(self, row: int) -> torch.Generator:
        """Random numbers of one row."""
        return torch.Generator().manual_seed(1000 * self.plan.seed + row)

    @contextmanager
    def bar(self, total: int, doing: str, what: str = "passes") -> Iterator[Callable[[int, int], None]]:
        """A progress bar; `advance(done, tokens)` moves it."""
        with progress_bar(total, self.shown, doing, what) as advance:
            yield advance


@dataclass(frozen=True)
class Clause:
    """One row of the audit."""

    number: int
    name: str
    statement: str
    measure: Callable[[Subject], Finding]
    draw: Callable[[View], list[Chart]]


def judge(
    value: Any, error: Any, threshold: float = 0.5, *, more: bool = True, what: str = "layer"
) -> tuple[str, str, int]:
    """Judge a claim, part by part: which parts hold it beyond two standard errors, and which contradict it.

    Args:
        value: The measure of each part (layer, or layer and head); NaN parts say nothing.
        error: Its standard error; where there is none, the value alone decides.
        threshold: The claim is a value above it (`more`) or below it.
        more: Which of the two.
        what: What a part is called.

    Returns:
        The verdict (holds where no part contradicts and most hold it, fails where no part holds it and most
        contradict, else mixed), the parts that contradict in words, and how many parts hold.
    """
    value, error = (np.asarray(x, dtype=float) for x in (value, error))
    margin = (value - threshold) * (1 if more else -1)
    sure = np.abs(margin) > 2 * np.nan_to_num(error)
    known = np.isfinite(value)
    holding, against = known & sure & (margin > 0), known & sure & (margin <= 0)
    if not against.any() and 2 * holding.sum() > known.sum():
        verdict = HOLDS
    elif not holding.any() and 2 * against.sum() > known.sum():
        verdict = FAILS
    else:
        verdict = MIXED
    return verdict, named(against, what), int(holding.sum())


def array(dims: str | Sequence[str], values: Any, long_name: str, units: str = "1", **coords: Any) -> xr.DataArray:
    """A labelled array of a finding; layer, head and position are numbered if no coordinate is given."""
    dims = dims.split() if isinstance(dims, str) else list(dims)
    values = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)
    numbered = {dim: np.arange(size) for dim, size in zip(dims, values.shape, strict=True)}
    return xr.DataArray(values, {**numbered, **coords}, dims, attrs={"long_name": long_name, "units": units})


def labelled(values: xr.DataArray, long_name: str, units: str = "1") -> xr.DataArray:
    """The values with their dimensions' coordinates alone."""
    kept = values.reset_coords(drop=True)
    return kept.assign_attrs(long_name=long_name, units=units)
