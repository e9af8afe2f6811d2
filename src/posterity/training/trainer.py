"""Training under a horizon, on the Trainer of transformers."""

from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel

from posterity.errors import InputError
from posterity.models.horizon import horizon
from posterity.models.language_model import language_model
from posterity.ops.horizon_rules import Full, Rule
from posterity.training.monitor import Monitor


class Trainer(transformers.Trainer):
    """transformers' Trainer with a horizon in force while it trains. Everything else is its own.

    Args:
        horizon, cut, streams, layers: as in `posterity.horizon`.

    Raises:
        InputError: as `posterity.horizon`; attention dropout in the config; a loss that is not finite.
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
        """Make the Trainer of transformers and keep the horizon."""
        if kwargs.get("model_init") is not None:
            raise InputError("posterity.Trainer expects a model, not a model_init: make the model first")
        super().__init__(*args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Monitor):
                callback.attach(self)
        self._horizon: dict[str, Any] = {
            "rule": Full() if horizon is None else horizon, "cut": cut, "streams": streams, "layers": layers
        }  # fmt: skip

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, under the horizon."""
        model: Any = self.model
        refuse_dropout(language_model(model))
        with horizon(model, **self._horizon):
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers; a loss that is not finite stops the run before it reaches the weights."""
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            rate = self.lr_scheduler.get_last_lr()[0]  # type: ignore[union-attr]
            raise InputError(
                f"the loss is not finite at step {self.state.global_step + 1} (learning rate {rate:.2g}): lower the "
                f"learning rate, or warm up longer; checkpoints in {self.args.output_dir} are those before"
            )
        return loss


def refuse_dropout(model: PreTrainedModel) -> None:
    """Raise InputError if the config asks for dropout of attention weights, which makes the edges random."""
    config = model.config.get_text_config()
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        rate = getattr(config, name, 0)
        if isinstance(rate, (int, float)) and rate > 0:
            raise InputError(
                f"training under a horizon expects no attention dropout; got {name}={rate} in the config of "
                f"{type(model).__name__}: set model.config.{name} = 0 before the model is made"
            )
