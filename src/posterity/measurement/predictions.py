"""Compare what a model predicts under two conditions: Kullback-Leibler divergence and change of the loss."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from posterity.models.chunked_loss import NO_TARGET
from posterity.ops.precision import working_dtype

Logits = Callable[[slice], Float[Tensor, "1 position vocabulary"]]  # of some positions


def compare_predictions(
    full: Logits, other: Logits, targets: Int64[Tensor, " position"], length: int
) -> tuple[float, float]:
    """Return the divergence of predictions from the full ones and the change of the loss, means in nats.

    Args:
        full: Logits of a model as it is.
        other: Logits of a model that is limited.
        targets: The token that follows each position, -100 where no prediction counts.
        length: Positions that are compared at once.
    """
    count, divergence, change = int((targets != NO_TARGET).sum()), 0.0, 0.0
    for start in range(0, len(targets), length):
        positions = slice(start, min(start + length, len(targets)))
        log_full, log_other = (_log_probabilities(logits(positions))[0] for logits in (full, other))
        ratio, labels = log_full - log_other, targets[positions].to(log_full.device)
        counted = labels != NO_TARGET
        divergence += float((log_full.exp() * ratio)[counted].sum(dtype=torch.float64))
        of_targets = ratio.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        change += float(of_targets[counted].sum(dtype=torch.float64))
    return divergence / count, change / count


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.to(working_dtype(logits.dtype)).log_softmax(-1)
