"""Observed attention of a prompt, against the attention weights that transformers returns."""

import numpy as np
import pytest
import torch
from support.tiny import tiny, tokens
from test_compressed_cache import HORIZON, PROMPT, random_heads
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from posterity.errors import InputError
from posterity.models import observed_attention
from posterity.models.compressed_cache import open_cache
from posterity.models.price_heads import PriceHead

QUERIES = 5


@pytest.fixture(autouse=True)
def few_queries(monkeypatch):
    monkeypatch.setattr(observed_attention, "OBSERVED_QUERIES", QUERIES)


def expected_features(weight, key, value):
    """Return the features of the pairs of one group from attention weights of its query heads, query by query."""
    rows = []
    first_key = weight.shape[2] - len(key)  # of a sliding layer, whose cache holds the latest
    for j in range(len(key)):
        index = first_key + j
        queries = [i for i in range(weight.shape[1])[-QUERIES:] if i >= index]
        paid = weight[:, queries, index]
        numbers = [paid.mean(), paid.mean(1).max(), paid.max(), weight[:, -1, index].mean()]
        rows.append([*numbers, np.linalg.norm(key[j]), np.linalg.norm(value[j])])
    return np.log(np.maximum(rows, 1e-7))


def log_prices(model, heads, ids, **options):
    with open_cache(model, heads, HORIZON, nats=0.0) as cache, torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        return [x.double().numpy() for x in cache.log_prices(0)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "implementation"),  # transformers has no sinks and no soft-cap with sdpa
    [(name, "eager") for name in ("llama", "gpt2", "mistral", "gemma2", "gpt_oss")]
    + [(name, "sdpa") for name in ("llama", "gpt2", "mistral")],
)
def test_predictions_are_the_mean_of_both_maps(name, implementation):
    model, ids = tiny(name, implementation=implementation), tokens(1, PROMPT)
    heads = random_heads(model)
    both = iter(log_prices(model, heads, ids))
    by_input = iter(log_prices(model, [PriceHead(x.weight, x.variance, x.window) for x in heads], ids))
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    weights = model(input_ids=ids, past_key_values=cache, use_cache=True, output_attentions=True).attentions
    for layer, head in enumerate(heads):
        keys, values = cache.layers[layer].keys[0].numpy(), cache.layers[layer].values[0].numpy()
        members = weights[layer].shape[1] // len(keys)
        for group, (key, value) in enumerate(zip(keys, values, strict=True)):
            weight = weights[layer][0, group * members : (group + 1) * members].numpy()
            positions = np.arange(PROMPT)[-len(key) :]
            ages = PROMPT - positions
            others = np.stack((np.log(ages), np.log1p(positions), positions == 0, np.ones(len(key))), -1)
            features = np.concatenate((expected_features(weight, key, value), others), -1)
            share = 1.0 if head.window is None else np.clip((head.window - ages) / HORIZON, 0, 1)
            with np.errstate(divide="ignore"):
                logs = features @ head.observed[:, group].numpy() + head.observed_variance[group].item() / 2
                expected = (next(by_input) + logs + np.log(share)) / 2
            np.testing.assert_allclose(next(both), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_in_front_is_not_observed():
    model, ids = tiny("llama", implementation="sdpa"), tokens(1, PROMPT)
    heads = random_heads(model)
    padded, mask = torch.cat((ids[:, :3], ids), 1), torch.ones(1, PROMPT + 3, dtype=torch.long)
    mask[:, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batched = log_prices(model, heads, padded, attention_mask=mask, position_ids=positions)
    for alone, row in zip(log_prices(model, heads, ids), batched, strict=True):
        assert np.isneginf(row[:3]).all()
        np.testing.assert_allclose(row[3:], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_the_prompt_of_this_cache_is_observed():
    model, ids = tiny("llama"), tokens(1, PROMPT)
    heads = random_heads(model)
    with open_cache(model, heads, HORIZON, nats=0.0) as cache:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        before = [x.clone() for x in cache.log_prices(0)]
        model(input_ids=tokens(1, PROMPT, seed=3), use_cache=False)
        model(input_ids=tokens(1, PROMPT, seed=4), use_cache=True)
        assert all(torch.equal(*pair) for pair in zip(before, cache.log_prices(0), strict=True))
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        plain = [x.newborn[-1][0, :, 0] for x in cache.layers]
    heads = [PriceHead(x.weight, x.variance, x.window) for x in heads]
    with open_cache(model, heads, HORIZON, nats=0.0) as cache:
        for part in (ids, ids[:, :1]):
            model(input_ids=part, past_key_values=cache, use_cache=True)
        assert all(torch.equal(x.newborn[-1][0, :, 0], y) for x, y in zip(cache.layers, plain, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_functions_are_put_back(implementation):
    before = dict(ALL_ATTENTION_FUNCTIONS)
    first, second = (tiny("llama", implementation=implementation) for _ in range(2))
    ids = tokens(1, PROMPT)
    inner = open_cache(second, random_heads(second), HORIZON, nats=0.0)
    with open_cache(first, random_heads(first), HORIZON, nats=0.0) as cache:
        inner.__enter__()
        first(input_ids=ids, past_key_values=cache, use_cache=True)
        expected = cache.log_prices(0)
    assert dict(ALL_ATTENTION_FUNCTIONS) != before
    inner.__exit__(None, None, None)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert all(np.allclose(*pair) for pair in zip(expected, log_prices(first, random_heads(first), ids), strict=True))
    with pytest.raises(RuntimeError), open_cache(first, random_heads(first), HORIZON, nats=0.0):
        raise RuntimeError
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_a_function_that_stood_in_this_place_before_is_put_back():
    def plain(*args, **kwargs):
        return sdpa(*args, **kwargs)

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
    try:
        with observed_attention.observe_attention([], "sdpa", print):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not plain
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa


@torch.no_grad()
def test_two_caches_of_one_model_observe_their_own_prompts():
    model, heads = tiny("llama"), random_heads(tiny("llama"))
    first, second = tokens(1, PROMPT), tokens(1, PROMPT, seed=5)
    expected = [log_prices(model, heads, ids) for ids in (first, second)]
    with open_cache(model, heads, HORIZON, nats=0.0) as outer:
        with open_cache(model, heads, HORIZON, nats=0.0) as inner:
            model(input_ids=second, past_key_values=inner, use_cache=True)
            ours = [x.double().numpy() for x in inner.log_prices(0)]
        model(input_ids=first, past_key_values=outer, use_cache=True)
        for actual, right in zip([ours, outer.log_prices(0)], reversed(expected), strict=True):
            assert all(np.allclose(*pair) for pair in zip(actual, right, strict=True))


def test_eager_attention_that_is_not_known_is_refused():
    class Unknown(torch.nn.Module):
        def forward(self):
            return ALL_ATTENTION_FUNCTIONS.get_interface("eager", None)(self, *torch.zeros(3, 1, 1, 2, 4), None)

    assert not observed_attention.can_observe([Unknown()], "eager")
    match = "the plain attention of Unknown is not known while another"
    with observed_attention.observe_attention([], "eager", print), pytest.raises(InputError, match=match):
        Unknown()()
