"""Layers that look back no further than a window, for the length of a `with`.

A query sees its own position and the `window` - 1 before it, as `sliding_window` means it in transformers; with `sinks`
the first keys of its document too.
"""

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from posterity.errors import InputError
from posterity.models.attach import watch_model
from posterity.models.interception import AttentionCall
from posterity.models.watch import Layer
from posterity.ops.attention import attention

Windows = Mapping[int, int]  # tokens that a query sees, its own included, by number of the attention layer


@contextlib.contextmanager
def limit_windows(model: nn.Module, windows: Windows, sinks: int = 0) -> Iterator[None]:
    """Let layers see a window and the first keys only within the block; gradients flow.

    Args:
        model: A causal language model of transformers; restored on exit.
        windows: Tokens that a query sees, its own included, by number of the attention layer.
        sinks: First keys of each document that it sees besides.

    Raises:
        InputError: No such layer or window; a model that cannot be measured, or is inside another such `with`.
    """
    with watch_model(model) as watch:
        if watch.replacement is not None:
            raise InputError("expected a model whose attention is its own; got one inside a `with`: limit it outside")
        check_windows(windows, len(watch.layers))
        by_layer = {watch.layers[number]: window for number, window in windows.items()}

        def attend(layer: Layer, call: AttentionCall) -> Tensor | None:
            if layer not in by_layer:
                return None
            mask = call.mask.limit_window(by_layer[layer], sinks)
            return attention(
                call.query, call.key, call.value, call.scale, mask=mask, softcap=call.softcap, sinks=call.sinks
            )

        with watch.replace_outputs(attend):
            yield


def check_windows(windows: Windows, layers: int) -> None:
    """Raise InputError unless all layers exist and every window holds a query's own position at least."""
    for layer, window in windows.items():
        if not 0 <= layer < layers or window < 1:
            raise InputError(
                f"expected windows of at least 1 token by layer from 0 to {layers - 1}; got {window} in layer {layer}"
            )
