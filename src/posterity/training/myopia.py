"""Two more measurements of Wu, Morris and Levine 2024 (arXiv 2404.00859), beside the myopia gap (comparison.py).

*Local myopia bonus* (an estimate): keep the keys and values of earlier positions as the plain model writes them, and
train a copy to do its best for its own position alone. What it gains on held-out rows is what the plain model gives up
at each position for later ones. Training finds less than the best, so the true bonus is at least the one measured.

*Probes* (an estimate): how much of a quantity a linear map reads off the hidden states of each layer, as R^2 on rows
that the map was not fitted on.
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
from posterity.models.attach import refuse_other_paths, watching
from posterity.progress import progress_bar
from posterity.training.compare import position_losses
from posterity.training.trainer import refuse_dropout

_NAME = "posterity_local"


class _Past:
    """Keys and values of one model, in the order of its attention calls, for another model to look back on."""

    def __init__(self):
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.writing = True
        self.at = 0

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Attention that, when not writing, has its own key and value on the self edge only."""
        share = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        if self.writing:
            self.kept.append((key, value))
            past_key, past_value = key, value
        else:
            past_key, past_value = self.kept[self.at]
            self.at += 1
        score = scale * query @ past_key.mT
        own = scale * (query * key).sum(-1)
        weight = score.diagonal_scatter(own, dim1=-2, dim2=-1).masked_fill(~allowed, -torch.inf).softmax(-1)
        on_self = weight.diagonal(dim1=-2, dim2=-1)[..., None]
        return (weight @ past_value + on_self * (value - past_value)).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def _looking_back(model: PreTrainedModel, past: _Past) -> Iterator[None]:
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
    """Held-out loss of a model, and of one that does its best for its own position; their difference and its error."""

    loss: float
    local_loss: float
    bonus: float
    error: float  # standard error over held-out rows


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
    """Train a copy that looks back on what `model` writes, and compare the two on held-out rows.

    Attention is computed densely, N x N: for the short rows of such experiments.

    Args:
        model: The plain model; it is left as it is.
        train: Inputs and labels of the rows to train on, as `posterity.training.data.prepare` makes them.
        held_out: Of the rows to judge by.
        steps: Optimizer steps (AdamW, cosine after a tenth of warm-up).
        batch: Rows of a step.
        rate: Learning rate.
        seed: Of the order of rows.
        progress: Whether to show a progress bar.

    Raises:
        InputError: The model has attention dropout or other paths between positions; a loss that is not finite.
    """
    refuse_dropout(model)
    with watching(model) as watch:
        refuse_other_paths(watch, "the local myopia bonus")
    local = copy.deepcopy(model).train()
    past = _Past()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(local.parameters(), rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(steps / 10), steps)
    with _looking_back(model, past), _looking_back(local, past):
        with progress_bar(steps, progress, "training the local model", "steps") as advance:
            for step in range(steps):
                chosen = torch.randint(len(train[0]), (batch,), generator=order)
                loss = _local_losses(model, local, past, train[0][chosen], train[1][chosen]).mean()
                if not loss.isfinite():
                    raise InputError(f"the loss of the local model is not finite at step {step + 1}: lower the rate")
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(local.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                advance(1, chosen.numel() * train[0].shape[1])
        local.eval()
        with torch.no_grad():
            parts = list(zip(*(rows.split(batch) for rows in held_out), strict=True))
            ours = torch.cat([_local_losses(model, local, past, *part) for part in parts])
    with torch.no_grad():
        plain = torch.cat([position_losses(model, *part) for part in parts])
    gain = (plain - ours).mean(1)
    error = gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else math.nan
    return LocalBonus(plain.mean().item(), ours.mean().item(), gain.mean().item(), error)


def _local_losses(
    model: PreTrainedModel, local: PreTrainedModel, past: _Past, inputs: Tensor, labels: Tensor
) -> Tensor:
    """Losses by position of the local model, which looks back on what the plain model writes for these rows."""
    past.kept, past.writing = [], True
    with torch.no_grad():
        model(input_ids=inputs, use_cache=False)
    past.writing, past.at = False, 0
    return position_losses(local, inputs, labels)


def probe(
    model: PreTrainedModel,
    train: tuple[Tensor, Float[Tensor, "row position"]],
    held_out: tuple[Tensor, Float[Tensor, "row position"]],
    ridge: float = 1e-3,
) -> list[float]:
    """R^2, on held-out rows, of a linear map from the hidden state of a position to a number of that position.

    Args:
        model: The model that is read.
        train: Inputs, and what is to be read at each of their positions.
        held_out: The same for other rows.
        ridge: Penalty on the map's squared weights, relative to the mean squared hidden state.

    Returns:
        One for the embedding and one after each layer.
    """
    fitted, judged = (_states(model, inputs) for inputs, _ in (train, held_out))
    return [_r_squared(one, train[1], other, held_out[1], ridge) for one, other in zip(fitted, judged, strict=True)]


def _states(model: PreTrainedModel, inputs: Tensor) -> list[Tensor]:
    """Hidden states with a constant beside them: (row and position, width + 1), one for each layer."""
    with torch.no_grad():
        found: Any = model(input_ids=inputs, use_cache=False, output_hidden_states=True)
    flat = [x.flatten(0, 1).double() for x in found.hidden_states]
    return [torch.cat((x, x.new_ones(len(x), 1)), 1) for x in flat]


def _r_squared(x: Tensor, y: Tensor, other_x: Tensor, other_y: Tensor, ridge: float) -> float:
    y, other_y = y.flatten().double(), other_y.flatten().double()
    penalty = ridge * x.square().mean() * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.mT @ x / len(x) + penalty, x.mT @ y / len(x))
    off = (other_y - other_x @ weight).square().sum()
    return 1 - (off / (other_y - other_y.mean()).square().sum()).item()
