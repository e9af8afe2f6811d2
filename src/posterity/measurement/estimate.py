"""What a run will take, said before it starts: from trials with the first tokens of the first window."""

import time
from weakref import WeakSet

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from posterity.decomposition.weight_gradients import projection_parameters
from posterity.models.chunked_loss import CHUNK, Head, Sending

TRIAL_TOKENS = 128
LONG = 2048  # tokens: from here on attention, which is quadratic, is timed too, on these parts of a window
PARTS = (1 / 16, 1 / 8)
# Beside what autograd keeps: the inputs of attention modules, and what the allocator cannot use again; on the default
# model (`bench.py context`) 0.9 times what autograd keeps at 512 tokens, 1.3 at 2048, 1.45 at 8192.
_ALLOWANCE = 1.35


class _Saved:
    """A tensor that autograd keeps for the backward pass, for as long as it does."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def estimate(
    model: PreTrainedModel,
    ids: Tensor,
    windows: int,
    batch: int,
    weights: bool,
    head: Head,
    passes: int,
) -> str:
    """One line: memory and time of a run over windows as long as `ids`; `passes` more backward passes are counted as
    half of the trial each.

    Activations are counted on a trial and grow linearly with the tokens. Time is that of the trial for every token; in
    long windows time per token is a linear function of their length, from two more trials. Behind a sliding window it
    is not, and less than estimated.
    """
    trial = ids[None, :TRIAL_TOKENS]
    now = sum(x.numel() * x.element_size() for x in model.parameters())
    if all(x.device.type == "cpu" for x in model.parameters()):
        now = psutil.Process().memory_info().rss  # the model, and Python with its libraries
    parameters = {x.untyped_storage().data_ptr() for x in model.parameters()}
    kept: WeakSet[_Saved] = WeakSet()

    def note(x: Tensor) -> _Saved:
        saved = _Saved(x)
        kept.add(saved)
        return saved

    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved.tensor):
        sending = Sending(model, trial, head)
    storages = [saved.tensor.untyped_storage() for saved in kept]  # of the body, where the head is passed apart
    activations = sum({x.data_ptr(): x.nbytes() for x in storages if x.data_ptr() not in parameters}.values())
    sending.backward()
    model.zero_grad()
    rates = {trial.numel(): (time.perf_counter() - started) / trial.numel()}
    if len(ids) >= LONG:
        rates = {tokens: _rate(model, ids[:tokens], head) for tokens in (int(part * len(ids)) for part in PARTS)}
    seconds = windows * len(ids) * _continued(rates, len(ids)) * (1 + passes / 2)
    # Beside what is kept, the loss of a chunk holds its logits, their log-softmax and the gradients of both.
    at_once = min(batch * len(ids) * head.vocabulary, CHUNK) if head.apart else batch * len(ids) * head.vocabulary
    passing = _ALLOWANCE * batch * len(ids) * activations / trial.numel() + 4 * 4 * at_once
    sums = 0
    if weights:
        split = {id(x): x.numel() * 4 for module in _attentions(model) for x in projection_parameters(module).values()}
        sums = 2 * sum(split.values())
    total = now + passing + sums
    return (
        f"{windows} window{'s'[: windows - 1]} of {len(ids)} tokens: about {_clock(seconds)} and {total / 1e9:.1f} GB "
        f"({now / 1e9:.1f} in use now, activations {passing / 1e9:.1f}, weight sums {sums / 1e9:.1f})"
    )


def _rate(model: PreTrainedModel, ids: Tensor, head: Head) -> float:
    """Seconds for each token of a window."""
    started = time.perf_counter()
    Sending(model, ids[None], head).backward()
    model.zero_grad()
    return (time.perf_counter() - started) / len(ids)


def _continued(rates: dict[int, float], tokens: int) -> float:
    """A rate at a larger number of tokens, on the straight line through the last two; it does not fall."""
    *earlier, (last, rate) = rates.items()
    for before, lower in earlier[-1:]:
        rate += max(0.0, rate - lower) * (tokens - last) / (last - before)
    return rate


def _attentions(model: PreTrainedModel) -> list:
    """Attention modules by their class name: good enough for an estimate."""
    return [module for module in model.modules() if "attention" in type(module).__name__.lower()]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{max(seconds, 1)} s"
