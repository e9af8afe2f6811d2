"""How long a context a model reads: what its config says is no limit of rotary models, a table of positions is."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from posterity.errors import InputError, first_line, warn_once
from posterity.models.language_model import evaluation_mode, input_device, max_tokens
from posterity.models.weight_layout import refuse_layout, reshard

_OFFSET = 4  # rows of a table of positions that some models leave out, at most: their configs count them


def check_context(model: PreTrainedModel, context: int) -> None:
    """Try whether the model reads so many tokens, where its config leaves that open; warn if it says fewer.

    Positions at the end of the context are tried on two tokens; a whole forward pass is tried where a model takes no
    positions, or where they fail.

    Raises:
        InputError: It does not.
    """
    refuse_layout(model)
    limit = max_tokens(model)
    if context <= limit - _OFFSET or (context <= limit and not _has_tables(model)):
        return
    beyond = context > limit
    if not (beyond and _reads_positions(model, context)):
        try:
            _run(model, context)
        except (IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            most = f"the model reads at most {limit} tokens" if beyond else "the model reads fewer tokens than that"
            raise InputError(
                f"{most}; got a context of {context} ({first_line(error)[:100]}): lower it (--context)"
            ) from error
    if beyond:
        warn_once(
            f"a context of {context} tokens is beyond the {limit} of the model's config: it is measured, but the model "
            "may read it badly"
        )


def _has_tables(model: PreTrainedModel) -> bool:
    """Return whether a model looks up anything but its tokens in a table."""
    return any(isinstance(x, nn.Embedding) and x is not model.get_input_embeddings() for x in model.modules())


def _reads_positions(model: PreTrainedModel, context: int) -> bool:
    """Return whether a model takes positions from outside, and reads the last two of the context."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    try:
        _run(model, 2, position_ids=torch.tensor([[context - 2, context - 1]]))
    except (IndexError, RuntimeError):
        return False
    return True


def _run(model: PreTrainedModel, tokens: int, **options: torch.Tensor) -> None:
    """Run a model on so many tokens that are no padding, which has no position in some models."""
    device = input_device(model)
    padding = model.config.get_text_config(decoder=True).pad_token_id
    ids = torch.full((1, tokens), int(padding == 0))
    options = {name: x.to(device) for name, x in options.items()}
    try:
        with evaluation_mode(model), torch.no_grad(), _BoundsCheck(model):
            model(input_ids=ids.to(device), use_cache=False, **options)
    finally:
        reshard(model)


class _BoundsCheck(TorchFunctionMode):
    """Raises IndexError before a look-up behind the end of a table, which a GPU does not survive."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.tables = {id(x.weight): name for name, x in model.named_modules() if isinstance(x, nn.Embedding)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding and int(args[0].max()) >= len(args[1]):
            raise IndexError(f"{self.tables.get(id(args[1]), 'a table')} ends after {len(args[1])} entries")
        return func(*args, **(kwargs or {}))
