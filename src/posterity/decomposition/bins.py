"""Bins of lags and of positions."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Int, Num
from torch import Tensor

from posterity.errors import InputError

EXACT_LAGS = 16  # lags below this have a bin each; beyond, four bins an octave


@dataclass(frozen=True)
class Bins:
    """Bins of lags (or positions): `first[b] <= lag <= last[b]`. Bin 0 is the self edge alone."""

    first: tuple[int, ...]
    last: tuple[int, ...]
    needs_sweep: bool  # False: bins of self and other only

    @classmethod
    def of(cls, lags: str, context: int) -> "Bins":
        """Cover all lags of a context: "octaves" (exact up to 15, then a quarter octave each), "all" or "self".

        Raises:
            InputError: There is no such kind of bins.
        """
        if lags == "all":
            first = list(range(context))
        elif lags == "self":
            first = [0, 1]
        elif lags == "octaves":
            first = _quarter_octaves(EXACT_LAGS, context)
        else:
            raise InputError(f'lags expects "octaves", "all" or "self"; got {lags!r}')
        first = [lag for lag in first if lag < context]
        return cls(tuple(first), (*(lag - 1 for lag in first[1:]), context - 1), lags != "self")

    @classmethod
    def of_positions(cls, exact: int, context: int) -> "Bins":
        """Cover all positions of a context: those below `exact` have a bin each, the others a quarter octave each."""
        first = [position for position in _quarter_octaves(exact, context) if position < context]
        return cls(tuple(first), (*(position - 1 for position in first[1:]), context - 1), True)

    def sum(self, by_lag: Num[Tensor, "*rest lag"]) -> Num[Tensor, "*rest bin"]:
        """Add up the lags of each bin."""
        if len(self.first) == by_lag.shape[-1]:
            return by_lag
        sums = by_lag.new_zeros(*by_lag.shape[:-1], len(self.first))
        return sums.index_add_(-1, _bin_numbers(self, by_lag.device), by_lag)


def _quarter_octaves(exact: int, context: int) -> list[int]:
    """Return the first number of each bin: all below `exact`, then four an octave until beyond the context."""
    quarters = (round(exact * 2 ** (n / 4)) for n in range(4 * max(context.bit_length(), 1)))
    return list(dict.fromkeys((*range(exact), *quarters)))


@lru_cache(maxsize=16)
def _bin_numbers(bins: Bins, device: torch.device) -> Int[Tensor, " lag"]:
    """Return the number of each lag's bin."""
    widths = [last - first + 1 for first, last in zip(bins.first, bins.last, strict=True)]
    numbers, repeats = torch.arange(len(widths), device=device), torch.tensor(widths, device=device)
    return numbers.repeat_interleave(repeats, output_size=sum(widths))  # else a GPU must be waited for
