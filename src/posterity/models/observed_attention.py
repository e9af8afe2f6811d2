"""The attention that the last queries of a prompt pay, as features of cached pairs; read off the model's own attention.

The function that computes a model's attention is not exchanged: its arguments are noted, and it is called.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from posterity.errors import InputError
from posterity.models.interception import AttentionCall
from posterity.models.interface import attention_call
from posterity.ops.attention import Backward
from posterity.ops.mask import Tile
from posterity.ops.scores import block_scores

OBSERVED_QUERIES = 32
OBSERVATIONS = 6  # features of a pair
EPSILON = 1e-7  # attention that is nothing
Observer = Callable[[AttentionCall], None]

_observers: "WeakKeyDictionary[nn.Module, list[Observer]]" = WeakKeyDictionary()
_lock = threading.Lock()
_uses: dict[str, int] = {}  # blocks that observe calls of an implementation
_registered: dict[str, Callable | None] = {}  # what was registered for it before


def observation_features(
    weight: Float[Tensor, "member query key"],
    key: Float[Tensor, "key dim"],
    value: Float[Tensor, "key dim_v"],
    readers: Float[Tensor, " key"],
) -> Float[Tensor, "key observation"]:
    """Return logarithms of what is observed of the pairs of one key/value head.

    Args:
        weight: Attention of the last queries of the prompt, for each query head of the group.
        key: Keys of the pairs.
        value: Their values.
        readers: How many of these queries see each pair.

    Returns:
        Attention, a mean over the queries that see the pair: mean and maximum over query heads; its maximum over
        queries and heads; that of the last query, mean over heads; the norms of key and value.
    """
    mean = weight.sum(1) / readers.clamp(min=1)
    attention = torch.stack((mean.mean(0), mean.amax(0), weight.amax((0, 1)), weight[:, -1].mean(0)), -1)
    norms = torch.stack([x.to(weight.dtype).norm(dim=-1) for x in (key, value)], -1)
    return torch.cat((attention, norms), -1).clamp(min=EPSILON).log()


@torch.no_grad()
def observe_prompt(
    call: AttentionCall, row: int, group: int, visible: Bool[Tensor, "query key"]
) -> Float[Tensor, "key observation"]:
    """Return the features of the pairs of one key/value head of a text in an attention call over its whole prompt.

    Args:
        call: The attention call.
        row: The text.
        group: The key/value head.
        visible: The keys that each of the last queries sees.
    """
    members = call.query.shape[1] // call.key.shape[1]
    heads, queries = slice(group * members, (group + 1) * members), slice(-len(visible), None)
    key, value = call.key[row, group], call.value[row, group]
    weight = call.weights(row, heads, queries, key, visible).nan_to_num(0.0)  # a query of the padding sees nothing
    return observation_features(weight, key, value, visible.sum(0))


def recorded_attention(back: Backward, rows: slice, length: int) -> Float[Tensor, "head query key"]:
    """Return the attention of queries of a recorded pass on its first `length` keys; zero where none is allowed."""
    tile = Tile(rows, slice(0, length), 0, back.mask.plain)
    score, _ = block_scores(back.query, back.repeat(back.key), tile, back)
    return (score - back.lse[:, :, rows, None]).exp().nan_to_num(0.0)[0]


def recorded_features(back: Backward, length: int, window: int | None) -> Float[Tensor, "group position observation"]:
    """Return the features of pairs of a prompt that is the first `length` tokens of a recorded pass."""
    groups, rows = back.key.shape[1], slice(max(0, length - OBSERVED_QUERIES), length)
    weight = recorded_attention(back, rows, length).unflatten(0, (groups, -1))
    readers = visible_keys(length, window, back.query.device).sum(0)
    keys, values = back.key[0, :, :length], back.value[0, :, :length]
    return torch.stack([observation_features(*pair, readers) for pair in zip(weight, keys, values, strict=True)])


def visible_keys(length: int, window: int | None, device: torch.device, padding: int = 0) -> Bool[Tensor, "query key"]:
    """Return which keys of a prompt each of its last queries sees."""
    index = torch.arange(length, device=device)
    query = index[-OBSERVED_QUERIES:, None]
    visible = (index <= query) & (index >= padding) & (query >= padding)
    return visible if window is None else visible & (query - index < window)


@contextlib.contextmanager
def observe_attention(modules: Sequence[nn.Module], implementation: str, observer: Observer) -> Iterator[None]:
    """Let `observer` see the attention calls of modules before the model's own function answers them.

    Args:
        modules: Attention modules.
        implementation: Of the model, by the name that transformers has for it.
        observer: Called with each attention call.
    """
    with _lock:
        _uses[implementation] = _uses.get(implementation, 0) + 1
        if _uses[implementation] == 1:
            _registered[implementation] = ALL_ATTENTION_FUNCTIONS.get(implementation)
            ALL_ATTENTION_FUNCTIONS[implementation] = _wrap_function(_registered[implementation])
    for module in modules:
        _observers.setdefault(module, []).append(observer)
    try:
        yield
    finally:
        for module in modules:
            _observers[module].remove(observer)
        with _lock:
            _uses[implementation] -= 1
            if not _uses[implementation]:
                _restore_function(implementation)


def can_observe(modules: Sequence[nn.Module], implementation: str) -> bool:
    """Return whether the calls of modules can be observed: those of a function that is registered or in their file."""
    if implementation == "eager":
        return all(_eager(module) is not None for module in modules)
    return implementation in ALL_ATTENTION_FUNCTIONS


def _restore_function(implementation: str) -> None:
    registered = _registered.pop(implementation)
    del ALL_ATTENTION_FUNCTIONS[implementation]
    if registered is not None and ALL_ATTENTION_FUNCTIONS.get(implementation) is not registered:
        ALL_ATTENTION_FUNCTIONS[implementation] = registered  # which was put there as ours was


def _wrap_function(registered: Callable | None) -> Callable:
    """Return a function that calls the observers of a module, then the model's own attention function."""

    def observe_and_attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        for observer in _observers.get(module, ()):
            observer(attention_call(module, query, key, value, *args, **kwargs))
        function = _eager(module) if registered is None else registered
        if function is None:
            raise InputError(
                f"the plain attention of {type(module).__name__} is not known while another model's cache is "
                "compressed: run this model outside the block, or with sdpa"
            )
        return function(module, query, key, value, *args, **kwargs)

    return observe_and_attend


def _eager(module: nn.Module) -> Callable | None:
    """Return the plain attention function in the file of a module's class."""
    return getattr(inspect.unwrap(type(module).forward), "__globals__", {}).get("eager_attention_forward")
