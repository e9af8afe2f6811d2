"""What a run will take, said before it starts: from a trial with the first few tokens of the first window."""

import time
from collections.abc import Callable

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from posterity.weights import projection_parameters

TRIAL_TOKENS = 128


def estimate(
    model: PreTrainedModel,
    ids: Tensor,
    windows: int,
    batch: int,
    weights: bool,
    run: Callable[..., Tensor],
    passes: int,
) -> str:
    """One line: memory and time of a run over windows as long as `ids`; `run` gives the losses of a batch;
    `passes` more backward passes are counted as half of the trial each.

    Activations are counted on the trial and grow linearly with the tokens. Time is that of the trial for every token;
    attention's quadratic part is left out, so long contexts take longer.
    """
    trial = ids[None, :TRIAL_TOKENS]
    parameters = {x.untyped_storage().data_ptr(): x.numel() * x.element_size() for x in model.parameters()}
    saved: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        losses = run(model, trial)
    losses.sum().backward()
    seconds = (time.perf_counter() - started) / trial.numel() * windows * len(ids)
    seconds *= 1 + passes / 2
    activations = sum(size for place, size in saved.items() if place not in parameters) / trial.numel()
    # Beside what is saved, the backward pass of the loss holds two gradients as large as the logits.
    logits = 2 * 4 * model.config.get_text_config().vocab_size
    passing = batch * len(ids) * (activations + logits)
    sums = 0
    if weights:
        split = {id(x): x.numel() * 4 for module in _attentions(model) for x in projection_parameters(module).values()}
        sums = 2 * sum(split.values())
    now = sum(parameters.values())
    if all(x.device.type == "cpu" for x in model.parameters()):
        now = psutil.Process().memory_info().rss  # the model, and Python with its libraries
    total = now + passing + sums
    return (
        f"{windows} window{'s'[: windows - 1]} of {len(ids)} tokens: about {_clock(seconds)} and {total / 1e9:.1f} GB "
        f"({now / 1e9:.1f} in use now, activations {passing / 1e9:.1f}, weight sums {sums / 1e9:.1f})"
    )


def _attentions(model: PreTrainedModel) -> list:
    """Attention modules by their class name: good enough for an estimate."""
    return [module for module in model.modules() if "attention" in type(module).__name__.lower()]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{max(seconds, 1)} s"
