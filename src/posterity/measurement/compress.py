"""compress(): a key/value cache that drops the pairs whose predicted price is lowest."""

import contextlib
import math
import os
from collections.abc import Iterator
from functools import partial

from torch import nn

from posterity.errors import InputError
from posterity.measurement.price_calibration import apply_calibration
from posterity.measurement.price_fit import Prices
from posterity.models.compressed_cache import INTERVAL, CompressedCache, open_cache
from posterity.models.language_model import language_model


@contextlib.contextmanager
def compress(
    model: nn.Module,
    prices: "Prices | str | os.PathLike[str]",
    keep: float | None = None,
    *,
    nats: float | None = None,
    interval: int = INTERVAL,
) -> Iterator[CompressedCache]:
    """Give a model a cache that drops the cheapest keys and values after the prompt, and while tokens are generated.

        with posterity.compress(model, "prices/", keep=0.25) as cache:
            model.generate(**inputs, past_key_values=cache)

    The prompt runs over all pairs. Behind it, and then every `interval` tokens, all pairs of all layers and heads are
    ranked by what they are predicted to be worth to the next queries; the cheapest go, and their memory with them, so
    that each head keeps a number of its own. Texts of a batch are compressed each by itself; `cache.reset()` makes the
    cache ready for other texts. With keep=1 the model's own attention runs over its own cache throughout.

    Args:
        model: A causal language model of transformers, with padding on the left; restored on exit.
        prices: What `posterity.Prices.fit` returned for this model, or the folder of it.
        keep: Share of the pairs that the model's own cache would hold, above 0, at most 1; or
        nats: What dropped pairs may cost in all, in nats per token by their calibrated prices.
        interval: Tokens between two evictions; the cache holds so many more at most.

    Yields:
        The cache, for `past_key_values`: `pairs_kept` and `pairs_seen` by text, `nbytes`, `spent` (nats per token).

    Raises:
        InputError: Neither or both of `keep` and `nats`, or one out of its range; prices of another model; a model
            whose cache cannot be compressed: with other paths than attention, or with attention of another form.
    """
    if (keep is None) == (nats is None):
        raise InputError(
            "expected keep=, a share of the cache, or nats=, a budget in nats per token; got neither or both"
        )
    if keep is not None and not 0 < keep <= 1:
        raise InputError(f"keep expects a share of the cache above 0, at most 1; got {keep}")
    if nats is not None and not 0 <= nats < math.inf:
        raise InputError(f"nats expects a budget of 0 nats per token or more; got {nats}")
    if interval < 1:
        raise InputError(f"interval expects a number of tokens of at least 1; got {interval}")
    inner = language_model(model)
    prices = prices if isinstance(prices, Prices) else Prices.load(prices)
    prices.check_model(inner)
    calibrate = partial(apply_calibration, prices.calibration)
    with open_cache(inner, prices.heads, prices.horizon, keep, nats, interval, calibrate) as cache:
        yield cache
