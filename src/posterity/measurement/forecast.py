"""What a measurement of a model will take, before there are any texts: size, memory and time."""

import torch
from torch import nn

from posterity.decomposition.first_keys import SINKS
from posterity.decomposition.projections import plain_tensors
from posterity.measurement.account import open_ledger
from posterity.measurement.estimate import estimate
from posterity.measurement.measure import CONTEXT, LIMIT
from posterity.models.chunked_loss import LMHead
from posterity.models.context_length import check_context
from posterity.models.language_model import freeze_parameters, language_model, max_tokens, seed_rng


def forecast(model: nn.Module, *, context: int | None = None, limit: int = LIMIT) -> str:
    """Return the size of a model, and memory and time of `posterity.measure` on it as it is by default, in two lines.

    Args:
        model: A causal language model of transformers that `posterity.check` finds measurable.
        context: Tokens in a window; None: as `posterity.measure`, or all that the model reads if these are fewer.
        limit: Windows.

    Raises:
        InputError: The model reads fewer tokens than the context has.
    """
    inner = language_model(model)
    context = context or min(CONTEXT, max_tokens(inner))
    check_context(inner, context)
    vocabulary = inner.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (context,), generator=torch.Generator().manual_seed(0))
    with (
        freeze_parameters(inner),
        seed_rng(0),
        open_ledger(model, "octaves", True, SINKS, None) as ledger,
    ):
        head = LMHead.probe(model)
        with ledger.observe_forward():
            line = estimate(inner, ids, limit, 1, head, ledger)
    size = sum(x.nbytes for parameter in inner.parameters() for x in plain_tensors(parameter))
    dtype = str(inner.dtype).removeprefix("torch.")
    return f"{inner.num_parameters():,} parameters, {size / 1e9:.2f} GB in {dtype}\n{line}"
