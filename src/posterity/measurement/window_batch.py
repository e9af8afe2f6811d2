"""Windows as the input of a model: token ids, the tokens to predict, positions, and the spans of packed documents."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from posterity.inputs.windows import Window
from posterity.models.chunked_loss import NO_TARGET


@dataclass(frozen=True, eq=False)
class WindowBatch:
    """Windows of one length.

    Attributes:
        targets: The token that each position has to predict, -100 for none: at the end of a document, and where the
            next token belongs to no answer.
        positions: They start again at each packed document; None if none is packed.
        spans: Of the documents in each window; None if none is packed.
    """

    windows: Sequence[Window]
    ids: Int64[Tensor, "window position"]
    targets: Int64[Tensor, "window position"]
    positions: Int64[Tensor, "window position"] | None
    spans: list[list[slice]] | None

    @classmethod
    def of(cls, windows: Sequence[Window]) -> "WindowBatch":
        """Stack windows."""
        ids, targets = (torch.stack(rows) for rows in ([x.ids for x in windows], [_targets(x) for x in windows]))
        if not any(window.lengths for window in windows):
            return cls(windows, ids, targets, None, None)
        positions = torch.stack([torch.cat([torch.arange(n) for n in _lengths(window)]) for window in windows])
        return cls(windows, ids, targets, positions, [_spans(window) for window in windows])

    @property
    def predictions(self) -> Int64[Tensor, " window"]:
        """The number of losses of each window."""
        return (self.targets != NO_TARGET).sum(1)

    def draws(self, seed: int) -> Float64[Tensor, "window position"]:
        """Return numbers from 0 to 1 that draw a label at each position, the same in every batch."""
        return torch.stack([uniform_draws(window.ids, seed) for window in self.windows])


def uniform_draws(ids: Int64[Tensor, " position"], seed: int) -> Float64[Tensor, " position"]:
    """Return uniform random numbers that depend on the tokens of a window and on the seed alone."""
    digest = hashlib.blake2b(ids.numpy().tobytes() + seed.to_bytes(8, "little", signed=True), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(len(ids), generator=generator, dtype=torch.float64)


def equal_lengths(windows: Sequence[Window]) -> Iterator[WindowBatch]:
    """Yield batches of windows that follow one another and have the same length."""
    for _, group in groupby(windows, key=lambda window: window.size):
        yield WindowBatch.of(list(group))


def _lengths(window: Window) -> tuple[int, ...]:
    return window.lengths or (window.size,)


def _spans(window: Window) -> list[slice]:
    stops = torch.tensor(_lengths(window)).cumsum(0).tolist()
    return [slice(stop - length, stop) for stop, length in zip(stops, _lengths(window), strict=True)]


def _targets(window: Window) -> Tensor:
    ids = window.ids if window.answers is None else window.ids.masked_fill(~window.answers, NO_TARGET)
    targets = ids.roll(-1)
    targets[[span.stop - 1 for span in _spans(window)]] = NO_TARGET
    return targets
