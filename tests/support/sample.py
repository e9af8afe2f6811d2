"""A synthetic result: sums over random edges, so that every identity between its accounts holds."""

import numpy as np
import xarray as xr

from posterity.results.schema import build_result

ATTRS = {
    "posterity_version": "0.0.0",
    "created": "2026-01-31T12:00:00Z",
    "model": "tiny/sample",
    "revision": "0123abc",
    "architecture": "LlamaForCausalLM",
    "parameters": 123456,
    "dtype": "float32",
    "device": "cpu",
    "text_digest": "ab" * 32,
    "text_name": "sample text",
    "seed": 0,
    "command": "posterity measure",
    "torch_version": "2",
    "transformers_version": "5",
    "python_version": "3",
    "platform": "Linux",
    "seconds": 1.5,
    "tokens_per_second": 213.0,
}


SINKS = 4


def bins(context: int, lags: str = "octaves") -> tuple[np.ndarray, np.ndarray]:
    """Return first and last lag of each bin: exact to 15, then quarter octaves; "all"; or lag 0 and the rest."""
    starts = {"all": range(context), "self": range(min(2, context)), "octaves": range(min(16, context))}[lags]
    first = list(starts)
    if lags == "octaves":
        first += [edge for step in range(100) if 16 <= (edge := round(2 ** (4 + step / 4))) < context]
    return np.array(first), np.array([*(edge - 1 for edge in first[1:]), context - 1])


def sample(
    layers=4, heads=3, context=64, documents=5, seed=0, *, lags="octaves", with_weights=True, missing_heads=0,
    modules=None, texts=None, losses=False, horizons=(), prices=None, tokens=None, parameters=(), adapters=(),
    **changes,
) -> xr.Dataset:  # fmt: skip
    """Build a result; `changes` are attributes; the last layer lacks `missing_heads` heads."""
    random = np.random.default_rng(seed)
    groups = heads // 2 if heads % 2 == 0 and not missing_heads else heads
    first, last = bins(context, lags)
    edge = _edges(random, layers, heads, context, documents)  # document, layer, head, stream, lag, position
    edge[:, -1, heads - missing_heads :] = 0
    attention = _attention(random, layers, heads, context, documents)  # layer, head, query, key
    lag = np.subtract.outer(np.arange(context), np.arange(context))
    key = np.arange(context)
    by_key = _split(attention, key < SINKS, -3)
    by_lag = np.stack([np.where(lag == number, by_key, 0).sum((-2, -1)) for number in range(context)], -1)
    position, distance = key, key[:, None]
    is_first = np.stack([position - distance < SINKS, *[np.broadcast_to(position < SINKS, lag.shape)] * 2])
    side = np.stack([edge[..., 0, :], edge[..., 1:, :].sum(4)], 4)
    split = _split(edge, is_first, 4)  # document, layer, head, stream, reader, lag, position
    binned = np.add.reduceat(split.sum(-1), first, axis=-1)
    mass = np.add.reduceat(np.abs(split).sum(-1), first, axis=-1) * 3
    mass[..., 1, :] += 1 / documents
    mass[:, -1, heads - missing_heads :] = 0
    parts = random.dirichlet(np.full(documents, 8.0))
    binned_attention = np.add.reduceat(by_lag, first, axis=-1)
    attention_by_document = parts[:, None, None, None, None] * binned_attention
    attention_by_document[:, -1, heads - missing_heads :] = 0
    count = np.stack([np.minimum(context - key, SINKS), np.maximum(context - key - SINKS, 0)]) * documents
    variables = {
        "credit": binned.sum(0),
        "mass": mass.sum(0),
        "attention": binned_attention,
        "edges": np.broadcast_to(np.add.reduceat(count, first, axis=-1), (layers, 2, len(first))).copy(),
        "credit_by_position": side.sum(0),
        "attention_first": attention[..., 0].sum(-1),
        "credit_by_document": np.stack([split[..., 0, :].sum(-1), split[..., 1:, :].sum((-2, -1))], -1),
        "first_by_document": side[..., 0].sum(-1),
        "profile_by_document": binned.sum(2),
        "mass_by_document": mass.sum(2),
        "attention_by_document": attention_by_document.sum(2),
        "tail_moment": _tail_moments(binned, mass, attention_by_document, groups),
        "loss": 3 + random.random(documents),
        "tokens": np.full(documents, context - 1),
    }
    if lags == "self":
        for name in ("mass", "attention", "mass_by_document", "attention_by_document"):
            variables[name][..., 1:] = np.nan
    kv_head = np.tile(np.arange(heads) // (heads // groups), (layers, 1))
    kv_head[-1, heads - missing_heads :] = -1
    coordinates = {"kv_head": kv_head}
    if losses:
        variables |= _losses(random, side)
    if parameters:
        coordinates["parameter"] = list(parameters)
        variables["parameter_by_document"] = _terms(random.normal(size=(documents, len(parameters), 2, 40)))
    if adapters:
        coordinates["adapter"] = list(adapters)
        gradient = random.normal(size=(documents, len(adapters), 2, 40)) + 0.3
        variables |= {"adapter_by_document": _terms(gradient), "adapter_mean": _terms(gradient.mean(0))}
    if horizons:
        coordinates["horizon"] = list(horizons)
        reach = random.uniform(5, 60, (layers, heads, 3, 1))
        by_reader = split.sum((-1, -2))[..., None]
        variables["horizon_by_document"] = by_reader * (1 - np.exp(-np.array(horizons) / reach[..., None, :]))
    if prices:
        windows = 2 ** np.arange((context - 1).bit_length())
        coordinates["window"], changes["prices"] = windows, prices
        share = random.dirichlet(np.full(documents, 8.0))
        price, by_head = random.gamma(1, 1, (layers, groups, context)), random.gamma(1, 1, (layers, heads, 1)) / windows
        variables |= {
            "price": price, "price_by_document": share[:, None, None] * price.sum(-1),
            "window_price": by_head, "window_price_by_document": share[:, None, None] * by_head.sum(1) * 0.9,
        }  # fmt: skip
    if tokens:
        assert len(tokens) == context
        coordinates["token"] = list(tokens)
        shape = (layers, 2, context, context)  # loss position, position
        decay = np.exp(-np.abs(lag) / random.uniform(2, 20, (layers, 2, 1, 1)))
        variables["inspect_norm"] = random.gamma(1, 1, shape) * decay * (lag >= 0)
        variables["inspect_credit"] = variables["inspect_norm"] ** 2 * random.uniform(-0.2, 1, shape)
        reach = context - np.arange(context)
        lags = np.sort(random.integers(0, reach, (layers + 1, 3, 2, context)), 2).astype(float)  # quantity, level
        lags[..., -1] = np.nan
        variables |= {"reader_lag": lags[1:], "reader_lag_all": lags[0]}
    if missing_heads:
        _mask_missing_heads(variables, missing_heads)
    if with_weights:
        variables |= weight_norms(random.normal(size=(documents, layers, 3, 2, 40)) + 0.3)
    return build_result(
        variables,
        modules=modules or [f"model.layers.{layer}.self_attn" for layer in range(layers)],
        lag=first,
        lag_end=last,
        position=key,
        position_end=key,
        texts=texts or [f"text {document % 2}" for document in range(documents)],
        attrs={
            **ATTRS,
            "context": context,
            "documents": documents,
            "tokens": documents * (context - 1),
            "lags": lags,
            "sinks": SINKS,
        }
        | changes,
        **coordinates,
    )


def _losses(random, side) -> dict[str, np.ndarray]:
    """Split credit (document, layer, head, stream, side, position) by own and later losses: the self side in two."""
    side = side[:, :, :, 1:]
    own = side[..., 0, :] * random.uniform(0.2, 0.9, side[..., 0, :].shape)
    parts = np.stack([own, side[..., 0, :] - own, side[..., 1, :]], 4)
    vectors = np.sqrt(np.abs(parts.sum(0)))[..., None] * random.normal(size=(*parts.shape[1:], 8))
    gram = [(vectors[..., row, :, :] * vectors[..., column, :, :]).sum(-1)
            for row, column in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))]  # fmt: skip
    documents, layers, context = side.shape[0], side.shape[1], side.shape[-1]
    hidden = _terms(random.normal(size=(documents, layers, context, 2, 8)) + 0.3)
    return {
        "loss_credit": parts.sum(0),
        "loss_gram": np.stack(gram, 3),
        "loss_credit_by_document": np.stack([parts[..., :SINKS].sum(-1), parts[..., SINKS:].sum(-1)], -2),
        "hidden": hidden.sum(0).swapaxes(-1, -2),
        "hidden_by_document": hidden.sum(2),
    }


def _terms(gradient: np.ndarray) -> np.ndarray:
    """Return squared norms and inner product of two parts: (..., part, number) to (..., term)."""
    first, second = gradient[..., 0, :], gradient[..., 1, :]
    return np.stack([(first**2).sum(-1), (second**2).sum(-1), (first * second).sum(-1)], -1)


def _split(values: np.ndarray, is_first: np.ndarray, axis: int) -> np.ndarray:
    """Return the entries of first keys and all others, along a new axis."""
    return np.stack([np.where(is_first, values, 0), np.where(is_first, 0, values)], axis)


def _tail_moments(credit, mass, attention, groups) -> np.ndarray:
    """Return the moments (layer, group, quantity, moment, bin) of document, layer, head, ..., reader, bin."""
    by_head = np.concatenate([attention[:, :, :, None], mass, credit], 3)
    by_group = by_head.reshape(*by_head.shape[:2], groups, -1, *by_head.shape[3:]).sum(3)
    tail = np.flip(np.flip(by_group, -1).cumsum(-1), -1)
    rest, whole = tail[..., 1, :], tail.sum(-2)
    pairs = [(rest, rest), (rest, rest[..., :1]), (rest, whole[..., :1]), (whole, whole), (whole, whole[..., :1])]
    return np.stack([(left * right).sum(0) for left, right in pairs], -2)


def weight_norms(gradient: np.ndarray) -> dict[str, np.ndarray]:
    """Return the terms of gradients (document, layer, stream, side, number) for each window and for their mean."""
    return {"weight_by_document": _terms(gradient), "weight_mean": _terms(gradient.mean(0))}


def _edges(random, layers, heads, context, documents) -> np.ndarray:
    """Return the credit of edges, (document, layer, head, stream, lag, position): falls with the lag, has a sink."""
    lag, position = np.meshgrid(np.arange(context), np.arange(context), indexing="ij")
    possible = np.stack([lag <= position, position + lag < context, position + lag < context])  # stream, lag, position
    shape = (documents, layers, heads, 3)
    decay = random.uniform(0.4, 1.6, (layers, heads, 3, 1, 1))
    size = random.lognormal(0, 0.5, (layers, heads, 3, 1, 1))
    typical = size * (1 + lag) ** -decay * np.where(position == 0, 8, 1)
    noise = random.gamma(0.5, 2, (*shape, context, context)) - 0.1
    return typical * noise * possible


def _attention(random, layers, heads, context, documents) -> np.ndarray:
    weight = random.gamma(0.3, 1, (layers, heads, context, context)) * np.where(np.arange(context) == 0, 20, 1)
    weight = np.tril(weight + 1e-6)
    return documents * weight / weight.sum(-1, keepdims=True)


def _mask_missing_heads(variables, missing) -> None:
    """Put NaN where the heads would be that the last layer does not have."""
    for name in ("credit", "mass", "attention", "credit_by_position", "attention_first"):
        variables[name][-1, -missing:] = np.nan
    for name in {"loss_credit", "loss_gram"} & set(variables):
        variables[name][-1, -missing:] = np.nan
    for name in {"loss_credit_by_document", "horizon_by_document"} & set(variables):
        variables[name][:, -1, -missing:] = np.nan
    for name in ("credit_by_document", "first_by_document"):
        variables[name][:, -1, -missing:] = np.nan
