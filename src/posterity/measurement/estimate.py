"""Memory and time of a run, estimated before it starts from trial passes over the first tokens of the first window."""

import time
from collections.abc import Sequence
from weakref import WeakSet

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterity.decomposition.weight_gradients import projection_parameters
from posterity.models.chunked_loss import CHUNK, ChunkedLoss, LMHead

TRIAL_TOKENS = 128
LONG = 2048  # tokens: from here on attention, which is quadratic, is timed too, on these parts of a window
PARTS = (1 / 16, 1 / 8)
# Beside what autograd keeps: the inputs of attention modules, and what the allocator cannot use again; on the default
# model (`bench.py context`) 0.9 times what autograd keeps at 512 tokens, 1.3 at 2048, 1.45 at 8192.
_ALLOWANCE = 1.35


class _SavedTensor:
    """A tensor that autograd saves for the backward pass, for as long as it does."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def estimate(
    model: PreTrainedModel,
    ids: Tensor,
    windows: int,
    batch: int,
    weights: bool,
    head: LMHead,
    passes: int,
) -> str:
    """Estimate memory and time of a run over windows as long as `ids`, as one line of text.

    Activations are counted on a trial and grow linearly with the tokens. Time is that of the trial for every token; in
    long windows time per token is a linear function of their length, from two more trials. Behind a sliding window it
    is not, and less than estimated. Each of the `passes` more backward passes counts as half of the trial.
    """
    trial = ids[None, :TRIAL_TOKENS]
    in_use = sum(x.numel() * x.element_size() for x in model.parameters())
    if all(x.device.type == "cpu" for x in model.parameters()):
        in_use = psutil.Process().memory_info().rss  # the model, and Python with its libraries
    activations, seconds_per_token = _trial(model, trial, head)
    rates = {trial.numel(): seconds_per_token}
    if len(ids) >= LONG:
        rates = {tokens: _seconds_per_token(model, ids[:tokens], head) for tokens in (int(x * len(ids)) for x in PARTS)}
    seconds = windows * len(ids) * _extrapolate(rates, len(ids)) * (1 + passes / 2)
    # Beside what autograd saves, the loss of a chunk holds its logits, their log-softmax and the gradients of both.
    logits = batch * len(ids) * head.vocabulary
    if head.separable:
        logits = min(logits, CHUNK)
    activations = _ALLOWANCE * batch * len(ids) * activations / trial.numel() + 4 * 4 * logits
    sums = 2 * _projection_bytes(model) if weights else 0
    total = in_use + activations + sums
    return (
        f"{windows} window{'s'[: windows - 1]} of {len(ids)} tokens: about {_clock(seconds)} and {total / 1e9:.1f} GB "
        f"({in_use / 1e9:.1f} in use now, activations {activations / 1e9:.1f}, weight sums {sums / 1e9:.1f})"
    )


def _trial(model: PreTrainedModel, ids: Tensor, head: LMHead) -> tuple[int, float]:
    """Return the bytes that autograd saves in one pass, parameters left out, and the seconds for each token."""
    parameters = {x.untyped_storage().data_ptr() for x in model.parameters()}
    tensors: WeakSet[_SavedTensor] = WeakSet()

    def pack(x: Tensor) -> _SavedTensor:
        saved = _SavedTensor(x)
        tensors.add(saved)
        return saved

    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = ChunkedLoss.run(model, ids, head)
    storages = [saved.tensor.untyped_storage() for saved in tensors]  # of the body only, if the head runs by chunks
    size = sum({x.data_ptr(): x.nbytes() for x in storages if x.data_ptr() not in parameters}.values())
    loss.backward()
    model.zero_grad()
    return size, (time.perf_counter() - start) / ids.numel()


def _seconds_per_token(model: PreTrainedModel, ids: Tensor, head: LMHead) -> float:
    start = time.perf_counter()
    ChunkedLoss.run(model, ids[None], head).backward()
    model.zero_grad()
    return (time.perf_counter() - start) / len(ids)


def _extrapolate(rates: dict[int, float], tokens: int) -> float:
    """Return the rate at a larger number of tokens, on the straight line through the last two; it does not fall."""
    *earlier, (last_tokens, rate) = rates.items()
    for fewer_tokens, lower_rate in earlier[-1:]:
        rate += max(0.0, rate - lower_rate) * (tokens - last_tokens) / (last_tokens - fewer_tokens)
    return rate


def _projection_bytes(model: PreTrainedModel) -> int:
    """Return the size in float32 of all attention projections."""
    parameters = [x for module in _attention_modules(model) for x in projection_parameters(module).values()]
    return sum({id(x): x.numel() * 4 for x in parameters}.values())


def _attention_modules(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Return the attention modules by their class name: good enough for an estimate."""
    return [module for module in model.modules() if "attention" in type(module).__name__.lower()]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{max(seconds, 1)} s"
