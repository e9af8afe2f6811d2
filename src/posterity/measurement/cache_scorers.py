"""Scores that say which cached keys and values to keep: by prices, by what the future holds, and as others do.

A scorer gets what a layer computed on a prompt (`PromptLayer`), and gives each pair of each key/value head a score:
higher is kept. Those of others are written after their papers, named with each; `bench/peers` compares them with the
authors' own code. What is not said there is taken as NVIDIA's kvpress has it (github.com/NVIDIA/kvpress).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import avg_pool1d, cosine_similarity, normalize, pad

from posterity.errors import InputError
from posterity.measurement.price_fit import Prices
from posterity.measurement.prompt_layer import PromptLayer, output_norm, unrotated_query
from posterity.models.observed_attention import recorded_features

Scores = Float[Tensor, "group key"]


class Scorer(Protocol):
    """Says which pairs to keep."""

    @property
    def name(self) -> str:
        """As tables print it."""
        ...

    def __call__(self, prompt: PromptLayer, share: float) -> Scores:
        """Return the score of each pair of a prompt, of which this share will be kept."""
        ...


@dataclass(frozen=True)
class GradientOracle:
    """The measured price of a pair for the queries after the prompt: it looks ahead."""

    name: str = "oracle: measured price"

    def __call__(self, prompt: PromptLayer, share: float) -> Scores:
        """Return half the sum of the squared changes of the loss."""
        return prompt.price


@dataclass(frozen=True)
class AttentionOracle:
    """The attention that the queries after the prompt pay to a pair, by all heads of its group: it looks ahead."""

    name: str = "oracle: future attention"

    def __call__(self, prompt: PromptLayer, share: float) -> Scores:
        """Return sums of attention."""
        return prompt.by_group(prompt.future).sum(1)


@dataclass(frozen=True)
class PredictedPrice:
    """The price that `posterity.Prices` predict of a pair: from its layer's input and the last queries' attention."""

    prices: Prices = field(repr=False)
    name: str = "predicted price"

    def __call__(self, prompt: PromptLayer, share: float) -> Scores:
        """Return logarithms of prices per query."""
        head = self.prices.heads[prompt.number].to(prompt.hidden.device)
        positions = torch.arange(prompt.length, device=prompt.hidden.device)
        newborn = head.newborn(prompt.hidden[None, : prompt.length], positions[None])[0]
        features = recorded_features(prompt.back, prompt.length, prompt.window)
        ages, rows = prompt.length - positions, []
        for group, observed in enumerate(features):
            logs = head.add_observation(group, newborn[group], observed, positions)
            rows.append(head.log_prices(group, logs, ages, self.prices.horizon))
        return torch.stack(rows)


@dataclass(frozen=True)
class FirstAndLast:
    """The first keys and the latest: attention sinks (Xiao et al. 2023, StreamingLLM, arXiv 2309.17453)."""

    sinks: int = 4
    name: str = "first and last"

    def __call__(self, prompt: PromptLayer, share: float) -> Scores:
        """Return the position, and more than any for the first."""
        positions = torch.arange(prompt.length, dtype=torch.float32, device=prompt.key.device)
        return torch.where(positions < self.sinks, prompt.length + 1.0, positions).expand(len(prompt.key), -1)


@dataclass(frozen=True)
class SnapKV:
    """Mean attention of the last queries, smoothed over keys (Li et al. 2024, arXiv 2404.14469).

    The last `window` pairs are kept before all others.
    """

    window: int = 64
    kernel: int = 5
    name: str = "SnapKV"

    def __call__(self, prompt: PromptLayer, share: float) -> Scores:
        """Return means over queries, averaged over neighbouring keys and the query heads of a group."""
        window = _window(self.window, prompt)
        before = prompt.attention(slice(prompt.length - window, prompt.length)).mean(1)[:, :-window]
        smooth = avg_pool1d(before, self.kernel, stride=1, padding=self.kernel // 2)
        scores = prompt.by_group(smooth).mean(1)
        return pad(scores, (0, window), value=float(scores.max()) + 1)


@dataclass(frozen=True)
class H2O:
    """The attention that a pair has received so far (Zhang et al. 2023, heavy hitters, arXiv 2306.14048)."""

    name: str = "H2O"

    def __call__(self, prompt: PromptLayer, share: float) -> Scores:
        """Return sums over all queries of the prompt and the query heads of a group."""
        return prompt.by_group(prompt.received).sum(1)


@dataclass(frozen=True)
class TOVA:
    """The attention of the last query, mean over all heads of the layer (Oren et al. 2024, arXiv 2401.06104)."""

    name: str = "TOVA"

    def __call__(self, prompt: PromptLayer, share: float) -> Scores:
        """Return the same score in all heads."""
        last = prompt.attention(slice(prompt.length - 1, prompt.length))[:, 0, :-1].mean(0)
        return pad(last, (0, 1), value=float(last.max()) + 1).expand(len(prompt.key), -1)


@dataclass(frozen=True)
class KeyNorm:
    """Keys of small norm are kept (Devoto et al. 2024, arXiv 2406.11430)."""

    name: str = "key norm"

    def __call__(self, prompt: PromptLayer, share: float) -> Scores:
        """Return minus the norm of the key."""
        return -prompt.key.float().norm(dim=-1)


@dataclass(frozen=True)
class KeyDifference:
    """Keys unlike the others are kept (Park et al. 2025, KeyDiff, arXiv 2504.15364)."""

    name: str = "key difference"

    def __call__(self, prompt: PromptLayer, share: float) -> Scores:
        """Return minus the cosine to the mean direction."""
        key = prompt.key.float()
        return -cosine_similarity(key, normalize(key, dim=-1).mean(1, keepdim=True), dim=-1)


@dataclass(frozen=True)
class ValueWeighted:
    """Mean attention of the last queries times the norm of the value (Guo et al. 2024, VATP, arXiv 2406.12335)."""

    window: int = 32
    name: str = "attention x value norm"

    def __call__(self, prompt: PromptLayer, share: float) -> Scores:
        """Return sums over the query heads of a group."""
        window = _window(self.window, prompt)
        attention = prompt.attention(slice(prompt.length - window, prompt.length)).mean(1)
        return prompt.by_group(attention).sum(1) * prompt.value.float().norm(p=1, dim=-1)


@dataclass(frozen=True)
class ExpectedAttention:
    """The attention that later queries are expected to pay, times the norm of the value.

    After Devoto et al. 2025, arXiv 2510.00636. Queries before rotation are taken for normal, with the mean and the
    covariance of the prompt's; the rotation is the mean over the next positions. The first keys are kept before all
    others.
    """

    sinks: int = 4
    future: int = 256  # positions
    covariance: bool = True
    epsilon: float = 0.0
    name: str = "Expected Attention"

    def __call__(self, prompt: PromptLayer, share: float) -> Scores:
        """Return softmax(mean.k c + c^2 k.cov k / 2) over keys, mean over the group, times the norm of the value."""
        sinks, scale = min(self.sinks, prompt.length - 2), prompt.back.scale
        query, rotate = unrotated_query(prompt, self.future)
        query = query[:, sinks : prompt.length].float()
        mean = rotate(query.mean(1, keepdim=True))
        key = prompt.back.repeat(prompt.back.key)[0, :, sinks : prompt.length].float()
        scores = scale * (key @ mean.mT)[..., 0]
        if self.covariance:
            centred = query - query.mean(1, keepdim=True)
            rotated = rotate(centred)  # linear, so that the covariance is that of rotated queries
            covariance = rotated.mT @ rotated / query.shape[1]
            scores = scores + scale**2 / 2 * ((key @ covariance) * key).sum(-1)
        scores = prompt.by_group(scores.softmax(-1)).mean(1)
        scores = (scores + self.epsilon) * prompt.value[:, sinks:].float().norm(dim=-1)
        return pad(scores, (sinks, 0), value=float(scores.max()) + 1)


@dataclass(frozen=True)
class CriticalKV:
    """Half of the budget by another score; the rest by it times the L1 norm of W_O v.

    After Feng et al. 2025, arXiv 2502.03805.
    """

    base: Scorer = field(default_factory=SnapKV)
    first: float = 0.5  # of the budget
    epsilon: float = 1e-4

    @property
    def name(self) -> str:
        """As tables print it."""
        return f"CriticalKV ({self.base.name})"

    def __call__(self, prompt: PromptLayer, share: float) -> Scores:
        """Return the product, and more than any for the first stage."""
        scores = self.base(prompt, share)
        budget = int(share * scores.shape[1])
        first = scores.topk(int(budget * self.first), -1).indices
        scores = (scores + self.epsilon) * output_norm(prompt)
        return scores.scatter(-1, first, float(scores.max()))


@dataclass(frozen=True)
class ScoresOfFile:
    """Scores of a file, such as those of another library (`bench/peers/kvpress_scores.py`).

    A safetensors file with `scores`, (window, layer, group, key), in float32: of the windows of the evaluation, in
    order; `scorer` in its metadata is the name.
    """

    path: Path
    name: str
    scores: Float[Tensor, "window layer group key"] = field(repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> "ScoresOfFile":
        """Read a file.

        Raises:
            InputError: There is none, or it is damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                scores, metadata = file.get_tensor("scores"), file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: expected a safetensors file with `scores`; {error}") from error
        if scores.dim() != 4 or scores.isnan().any():
            raise InputError(f"{path}: expected scores by window, layer, key/value head and key; got {[*scores.shape]}")
        return cls(path, metadata.get("scorer", path.stem), scores.float())

    def __call__(self, prompt: PromptLayer, share: float) -> Scores:
        """Return those of the window and the layer."""
        expected = (len(prompt.key), prompt.length)
        windows, layers, *shape = self.scores.shape
        if prompt.window_number >= windows or prompt.number >= layers or tuple(shape) != expected:
            raise InputError(
                f"{self.path}: expected scores of window {prompt.window_number}, layer {prompt.number}, of the shape "
                f"{[*expected]}; got {[*self.scores.shape]}: score the windows of this evaluation (--save-windows)"
            )
        return self.scores[prompt.window_number, prompt.number].to(prompt.key.device)


USUAL: tuple[Scorer, ...] = (
    FirstAndLast(), SnapKV(), H2O(), TOVA(), KeyNorm(), KeyDifference(), ValueWeighted(), ExpectedAttention(),
    CriticalKV(),
)  # fmt: skip
ORACLES: tuple[Scorer, ...] = (GradientOracle(), AttentionOracle())


def _window(window: int, prompt: PromptLayer) -> int:
    if window >= prompt.length:
        raise InputError(
            f"expected a prompt longer than the {window} queries that are observed; got {prompt.length} tokens"
        )
    return window
