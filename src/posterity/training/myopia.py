"""Two estimates beside the myopia gap, after Wu, Morris and Levine 2024 (arXiv 2404.00859).

*Local myopia bonus*: keep the keys and values of earlier positions as the plain model writes them, and train a copy for
the own loss of every position alone. Its gain on held-out rows is what the plain model gives up at each position for
later ones. Training finds less than the best, so the true bonus is at least the one measured.

*Probes*: R^2 of linear maps from the hidden states of each layer to a quantity, on rows that they were not fitted on.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, get_cosine_schedule_with_warmup
from transformers.masking_utils import eager_mask

from posterity.errors import InputError
from posterity.models.attach import refuse_other_paths, watch_model
from posterity.ops.heads import repeat_heads
from posterity.progress import progress_bar
from posterity.training.compare import position_losses
from posterity.training.trainer import refuse_dropout

_NAME = "posterity_local"


class _PastKeyValues:
    """Keys and values of one model, in the order of its attention calls, that another model attends to."""

    def __init__(self):
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.recording, self.call = True, 0

    def record(self) -> None:
        """Clear all keys and values and record those of the next forward pass."""
        self.pairs, self.recording = [], True

    def replay(self) -> None:
        """Let the next forward pass attend to the recorded keys and values."""
        self.recording, self.call = False, 0

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Compute attention densely; in a replay, the call's own key and value are on the self edge only."""
        key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        if self.recording:
            self.pairs.append((key, value))
            past_key, past_value = key, value
        else:
            past_key, past_value = self.pairs[self.call]
            self.call += 1
        score = scale * query @ past_key.mT
        self_score = scale * (query * key).sum(-1)
        weight = score.diagonal_scatter(self_score, dim1=-2, dim2=-1).masked_fill(~allowed, -torch.inf).softmax(-1)
        self_weight = weight.diagonal(dim1=-2, dim2=-1)[..., None]
        return (weight @ past_value + self_weight * (value - past_value)).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def _attending_to(model: PreTrainedModel, past: _PastKeyValues) -> Iterator[None]:
    """Run the model's attention through `past` for the block."""
    AttentionInterface.register(_NAME, past.attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    before: Any = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class LocalBonus:
    """Held-out losses of a model and of its local copy, their difference and its error, in nats per position.

    For the task sines, in Huber loss.
    """

    loss: float
    local_loss: float
    bonus: float  # loss - local_loss
    error: float  # standard error of the bonus over held-out rows; NaN for one row


def local_bonus(
    model: PreTrainedModel,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    *,
    steps: int = 500,
    batch: int = 16,
    rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> LocalBonus:
    """Train a copy that attends to the keys and values of `model`, and compare the two on held-out rows.

    Attention is computed densely, in N x N memory: for the short rows of such experiments.

    Args:
        model: The plain model; it does not change.
        train: Inputs and labels of the rows to train on, as `posterity.training.data.prepare_data` makes them.
        held_out: Inputs and labels of the held-out rows.
        steps: Optimizer steps (AdamW, cosine after a tenth of warm-up).
        batch: Rows of a step.
        rate: Learning rate.
        seed: Of the order of rows.
        progress: Show a progress bar on standard error.

    Raises:
        InputError: The model has attention dropout or other paths between positions; a loss that is not finite.
    """
    refuse_dropout(model)
    with watch_model(model) as watch:
        refuse_other_paths(watch, "the local myopia bonus")
    local = copy.deepcopy(model).train()
    past = _PastKeyValues()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(local.parameters(), rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(steps / 10), steps)
    with _attending_to(model, past), _attending_to(local, past):
        with progress_bar(steps, progress, "training the local model", "steps") as advance:
            for step in range(steps):
                rows = torch.randint(len(train[0]), (batch,), generator=order)
                loss = _local_losses(model, local, past, train[0][rows], train[1][rows]).mean()
                if not loss.isfinite():
                    raise InputError(f"the loss of the local model is not finite at step {step + 1}: lower the rate")
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(local.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                advance(1, rows.numel() * train[0].shape[1])
        local.eval()
        with torch.no_grad():
            batches = list(zip(*(tensor.split(batch) for tensor in held_out), strict=True))
            local_losses = torch.cat([_local_losses(model, local, past, *pair) for pair in batches])
    with torch.no_grad():
        losses = torch.cat([position_losses(model, *pair) for pair in batches])
    gain = (losses - local_losses).mean(1)
    error = gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else math.nan
    return LocalBonus(losses.mean().item(), local_losses.mean().item(), gain.mean().item(), error)


def _local_losses(
    model: PreTrainedModel, local: PreTrainedModel, past: _PastKeyValues, inputs: Tensor, labels: Tensor
) -> Tensor:
    """Return the local model's losses, (row, position), with the plain model's keys and values as its past."""
    past.record()
    with torch.no_grad():
        model(input_ids=inputs, use_cache=False)
    past.replay()
    return position_losses(local, inputs, labels)


def probe(
    model: PreTrainedModel,
    train: tuple[Tensor, Float[Tensor, "row position"]],
    held_out: tuple[Tensor, Float[Tensor, "row position"]],
    ridge: float = 1e-3,
) -> list[float]:
    """Return R^2, on held-out rows, of linear maps from the hidden state of a position to a number of that position.

    Args:
        model: The model whose hidden states are read.
        train: Inputs, and the number at each of their positions, to fit the maps on.
        held_out: The same for other rows.
        ridge: Penalty on a map's squared weights, relative to the mean squared hidden state.

    Returns:
        A number for the embedding and one for the output of each layer.
    """
    train_states, held_out_states = (_hidden_states(model, inputs) for inputs, _ in (train, held_out))
    return [
        _r_squared(train_x, train[1], held_out_x, held_out[1], ridge)
        for train_x, held_out_x in zip(train_states, held_out_states, strict=True)
    ]


def _hidden_states(model: PreTrainedModel, inputs: Tensor) -> list[Tensor]:
    """Return hidden states with a constant column appended: (row and position, width + 1), for each layer."""
    with torch.no_grad():
        output: Any = model(input_ids=inputs, use_cache=False, output_hidden_states=True)
    flat = [state.flatten(0, 1).double() for state in output.hidden_states]
    return [torch.cat((x, x.new_ones(len(x), 1)), 1) for x in flat]


def _r_squared(x: Tensor, y: Tensor, held_out_x: Tensor, held_out_y: Tensor, ridge: float) -> float:
    """Fit y by ridge regression on x; return R^2 on the held-out pair."""
    y, held_out_y = y.flatten().double(), held_out_y.flatten().double()
    penalty = ridge * x.square().mean() * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.mT @ x / len(x) + penalty, x.mT @ y / len(x))
    residual = (held_out_y - held_out_x @ weight).square().sum()
    return 1 - (residual / (held_out_y - held_out_y.mean()).square().sum()).item()
