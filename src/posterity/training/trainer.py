"""Training under a horizon with the Trainer of transformers."""

from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel

from posterity.errors import InputError
from posterity.models.horizon import horizon
from posterity.models.language_model import language_model
from posterity.ops.horizon_rules import Full, Rule


class Trainer(transformers.Trainer):
    """The Trainer of transformers with a horizon in force during `train`; everything else is unchanged.

    Args:
        *args: As in `transformers.Trainer`.
        **kwargs: As there, with a model instead of a `model_init`.
        horizon: A rule such as `posterity.Discount(0.9)`; `posterity.Full()` by default.
        cut: As in `posterity.horizon`.
        streams: As there.
        layers: As there.

    Raises:
        InputError: As `posterity.horizon`; attention dropout in the config; a loss that is not finite.
    """

    def __init__(
        self,
        *args: Any,
        horizon: Rule | None = None,
        cut: str = "kv",
        streams: Sequence[str] = ("key", "value"),
        layers: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        """Make the Trainer of transformers; `train` puts the horizon in force."""
        if kwargs.get("model_init") is not None:
            raise InputError("posterity.Trainer expects a model, not a model_init: make the model first")
        super().__init__(*args, **kwargs)
        self._horizon: dict[str, Any] = {
            "rule": Full() if horizon is None else horizon, "cut": cut, "streams": streams, "layers": layers
        }  # fmt: skip

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as in transformers, under the horizon."""
        model: Any = self.model
        refuse_dropout(language_model(model))
        with horizon(model, **self._horizon):
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Step as in transformers; raise InputError for a loss that is not finite, before it reaches the weights."""
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            rate = self.lr_scheduler.get_last_lr()[0]  # type: ignore[union-attr]
            raise InputError(
                f"the loss is not finite at step {self.state.global_step + 1} (learning rate {rate:.2g}): lower the "
                f"learning rate, or warm up longer; checkpoints in {self.args.output_dir} are those before"
            )
        return loss


def refuse_dropout(model: PreTrainedModel) -> None:
    """Raise InputError if the config sets dropout of attention weights, which makes the edges random."""
    config = model.config.get_text_config()
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        rate = getattr(config, name, 0)
        if isinstance(rate, (int, float)) and rate > 0:
            raise InputError(
                f"training under a horizon expects no attention dropout; got {name}={rate} in the config of "
                f"{type(model).__name__}: set model.config.{name} = 0 before the model is made"
            )
