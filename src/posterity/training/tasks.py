"""Built-in tasks: seeded generators of rows, and a small model that reads numbers.

`sines` is the synthetic task of Wu, Morris and Levine 2024 (arXiv 2404.00859): a sum over earlier positions that is
easy where these have computed their terms ahead, and hard for one position alone. `induction` repeats a random
sequence with a period that varies from row to row: predicting the next token takes a previous-token head, whose work
at a position serves later positions only.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model, GPT2PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from posterity.errors import InputError


@dataclass(frozen=True)
class Sines:
    """y_n = z_n sum_{i=1..m} sin(b x_{n-i}) + (1 - z_n) x_n, x standard normal, z Bernoulli(p), x_n = 0 for n < 0.

    Raises:
        InputError: A number out of its range.
    """

    terms: int = 8  # m
    frequency: float = 4.0  # b
    chance: float = 1.0  # p
    length: int = 20

    def __post_init__(self):
        """Check the numbers."""
        if self.terms < 1 or self.length < 2 or not 0 < self.chance <= 1:
            raise InputError(
                f"sines expects 1 term or more, a length of 2 or more and a chance above 0, at most 1; got {self}"
            )

    def inputs(self, rows: int, seed: int) -> Float[Tensor, "rows position 2"]:
        """Draw x and z of every position."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, self.length, generator=generator)
        z = torch.rand(rows, self.length, generator=generator) < self.chance
        return torch.stack((x, z.to(x.dtype)), -1)

    def labels(self, inputs: Float[Tensor, "rows position 2"]) -> Float[Tensor, "rows position"]:
        """Return the target y of every position."""
        x, z = inputs.unbind(-1)
        waves = nn.functional.pad(torch.sin(self.frequency * x), (self.terms, 0))
        return z * waves.unfold(1, self.terms, 1)[:, :-1].sum(-1) + (1 - z) * x


@dataclass(frozen=True)
class Induction:
    """A random sequence over and over; each row has its own period, from a quarter to half of the length.

    The second half follows from the first. With one period for all rows, a single head that attends at that lag would
    do, without any previous-token head.

    Raises:
        InputError: A number out of its range.
    """

    vocabulary: int = 64
    length: int = 64

    def __post_init__(self):
        """Check the numbers."""
        if self.length < 8 or self.length % 4 or self.vocabulary < 2:
            raise InputError(
                f"induction expects a length that 4 divides, of 8 or more, and 2 tokens or more; got {self}"
            )

    def inputs(self, rows: int, seed: int) -> Int64[Tensor, "rows position"]:
        """Draw token ids."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.vocabulary, (rows, self.length // 2), generator=generator)
        period = torch.randint(self.length // 4, self.length // 2 + 1, (rows, 1), generator=generator)
        return tokens.gather(1, torch.arange(self.length) % period)

    def labels(self, inputs: Int64[Tensor, "rows position"]) -> Int64[Tensor, "rows position"]:
        """Return the tokens themselves, which transformers' models shift; the first period is unpredictable."""
        return inputs

    @property
    def uniform_loss(self) -> float:
        """Loss of a uniform predictor, in nats per token."""
        return math.log(self.vocabulary)


TASKS = {"sines": Sines, "induction": Induction}


class Regressor(GPT2PreTrainedModel):
    """A GPT-2 stack that maps two numbers at every position to one; its loss is the mean Huber loss."""

    accepts_loss_kwargs = False  # the Trainer itself averages over accumulated batches

    def __init__(self, config: GPT2Config):
        """Make the layers of the config, with a linear embedding of pairs of numbers in place of tokens."""
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.transformer.wte = nn.Linear(2, config.n_embd)
        self.head = nn.Linear(config.n_embd, 1)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the regression head."""
        return self.head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        """Map numbers (batch, position, 2) to logits (batch, position, 1); token ids are scaled to numbers first.

        Token ids come from probes that know no other input.
        """
        numbers = input_ids
        if not input_ids.is_floating_point():
            x = 4 * input_ids / self.config.vocab_size - 2
            numbers = torch.stack((x, torch.ones_like(x)), -1)
        numbers = numbers.to(self.head.weight.dtype)
        states = self.transformer(inputs_embeds=self.transformer.wte(numbers), **kwargs)
        logits = self.head(states.last_hidden_state)
        loss = None if labels is None else nn.functional.huber_loss(logits.squeeze(-1).float(), labels.float())
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=states.hidden_states)
