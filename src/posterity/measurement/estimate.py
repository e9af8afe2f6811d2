"""Memory and time of a run, estimated before it starts from trial passes over the first tokens of the first window."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import psutil
from torch import Tensor
from transformers import PreTrainedModel

from posterity.decomposition.projections import plain_tensors
from posterity.measurement.ledger import Ledger
from posterity.measurement.memory_timeline import MemoryTimeline, peak_bytes
from posterity.measurement.price_account import SAMPLES
from posterity.measurement.window_batch import uniform_draws
from posterity.models.checkpointing import release_free_memory
from posterity.models.chunked_loss import CHUNK, ChunkedLoss, LMHead
from posterity.models.watch import Layer
from posterity.ops.attention import Backward

TRIAL_TOKENS = 128
LONG = 2048  # tokens: from here on attention, which is quadratic, is timed too, on these parts of a window
PARTS = (1 / 16, 1 / 8)
# What the allocator cannot use again, as a factor on the tensors that are alive: it came to 1.2 to 1.38 in windows of
# 2,048 to 8,192 tokens, who pays or not; checkpointed layers give back what they free (1.07).
_ALLOWANCE, _ALLOWANCE_CHECKPOINTED = 1.3, 1.1


def estimate(
    model: PreTrainedModel,
    ids: Tensor,
    windows: int,
    batch: int,
    head: LMHead,
    ledger: Ledger,
    checkpoint: bool = False,
) -> str:
    """Estimate memory and time of a run over windows as long as `ids`, as one line of text; clear the ledger.

    Trials are what is done with a window, all its backward passes included. Memory is that of two trials at every
    operation, each extrapolated on a straight line over the tokens. Time is that of the longer trial for every token;
    in long windows time per token is a linear function of their length, from two more trials. Behind a sliding window
    it is not, and less than estimated.
    """
    allowance = _ALLOWANCE_CHECKPOINTED if checkpoint else _ALLOWANCE
    peak = allowance * _peak(model, ids, windows, batch, head, ledger)
    ledger.clear()
    in_use = sum(x.numel() * x.element_size() for x in model.parameters())
    if all(x.device.type == "cpu" for x in model.parameters()):
        release_free_memory()  # of the trials
        in_use = psutil.Process().memory_info().rss  # the model, and Python with its libraries
    lengths = [int(x * len(ids)) for x in PARTS] if len(ids) >= LONG else [min(TRIAL_TOKENS, len(ids))]
    rates = {tokens: _seconds_per_token(model, ids[:tokens], head, ledger) for tokens in lengths}
    seconds = windows * len(ids) * _extrapolate(rates, len(ids))
    ledger.clear()
    return (
        f"{windows} window{'s'[: windows - 1]} of {len(ids)} tokens: about {_clock(seconds)} and "
        f"{(in_use + peak) / 1e9:.2f} GB ({in_use / 1e9:.2f} in use now)"
    )


def _peak(model: PreTrainedModel, ids: Tensor, windows: int, batch: int, head: LMHead, ledger: Ledger) -> float:
    """Return the bytes of all tensors of the run when they are most, those that are there before left out."""
    length = min(TRIAL_TOKENS, len(ids))
    trials = {tokens: _trace(model, ids[:tokens], head, ledger) for tokens in {length, length // 2} if tokens > 1}
    tokens = batch * len(ids)
    peak = peak_bytes({trial: segments for trial, (segments, _) in trials.items()}, tokens)
    if head.separable:
        # The loss of a chunk holds its logits, their log-softmax and the gradients of both, beside the graph.
        logits = 4 * 4 * min(tokens * head.vocabulary, CHUNK)
        peak = max(peak, logits + peak_bytes({trial: [[size]] for trial, (_, size) in trials.items()}, tokens))
    # Sums are there from the second batch on, and every window adds its rows.
    rows = sum(x.nbytes for rows in ledger.sums.rows.values() for x in rows) / max(ledger.documents, 1)
    sums = peak_bytes({trial: [[segments[-1][-1]]] for trial, (segments, _) in trials.items()}, tokens)
    return peak + windows * rows + (sums if windows > batch else 0)


def _trace(model: PreTrainedModel, ids: Tensor, head: LMHead, ledger: Ledger) -> tuple[list[list[int]], int]:
    """Return the timeline of one pass over `ids`, the head left out, and the bytes in front of the head."""
    ledger.clear()
    existing = (plain for x in (*model.parameters(), *model.buffers()) for plain in plain_tensors(x))
    timeline = MemoryTimeline(existing)
    trial_head = _TracedHead(head, timeline)
    with _mark_accounts(ledger, timeline), timeline:
        loss = _run(model, ids, trial_head, ledger)
        timeline.resume()
        ledger.backward(loss)
    model.zero_grad()
    return timeline.segments, trial_head.bytes_before


class _TracedHead(LMHead):
    """An LM head whose own operations are left out of a timeline."""

    def __init__(self, head: LMHead, timeline: MemoryTimeline):
        super().__init__(head.model)
        vars(self).update(vars(head))
        self.timeline, self.bytes_before = timeline, 0

    def run_body(self, *args: Any, **options: Any) -> Any:
        body = super().run_body(*args, **options)
        if body is not None:
            self.bytes_before = self.timeline.live
            self.timeline.pause()
        return body


@contextlib.contextmanager
def _mark_accounts(ledger: Ledger, timeline: MemoryTimeline) -> Iterator[None]:
    """Begin a segment before and after each account of a layer, whose operations vary with the tokens."""

    def mark(layer: Layer, back: Backward, projections: object) -> None:
        timeline.start_segment()

    observers = ledger.watch.observers
    observers.insert(0, mark)
    try:
        with ledger.watch.report_to(mark):
            yield
    finally:
        observers.remove(mark)


def _seconds_per_token(model: PreTrainedModel, ids: Tensor, head: LMHead, ledger: Ledger) -> float:
    start = time.perf_counter()
    ledger.backward(_run(model, ids, head, ledger))
    model.zero_grad()
    return (time.perf_counter() - start) / len(ids)


def _run(model: PreTrainedModel, ids: Tensor, head: LMHead, ledger: Ledger) -> ChunkedLoss:
    """Run the model on one window as `measure` does."""
    draws = uniform_draws(ids, 0)[None] if ledger.prices == SAMPLES else None
    return ChunkedLoss.run(model, ids[None], head, draws=draws)


def _extrapolate(rates: dict[int, float], tokens: int) -> float:
    """Return the rate at a larger number of tokens, on the straight line through the last two; it does not fall."""
    *earlier, (last_tokens, rate) = rates.items()
    for fewer_tokens, lower_rate in earlier[-1:]:
        rate += max(0.0, rate - lower_rate) * (tokens - last_tokens) / (last_tokens - fewer_tokens)
    return rate


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{max(seconds, 1)} s"
