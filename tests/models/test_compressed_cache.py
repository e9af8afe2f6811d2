"""A compressed cache against dense attention whose mask hides what was dropped, and against the model's own cache."""

import numpy as np
import pytest
import torch
from support.tiny import CONFIGS, tiny, tokens
from transformers import AttentionInterface, AttentionMaskInterface

from posterity.errors import InputError
from posterity.models.compressed_cache import cache_windows, open_cache
from posterity.models.observed_attention import OBSERVATIONS
from posterity.models.price_heads import OTHERS, PriceHead

PROMPT = 14
NAMES = ["llama", "qwen3", "phi3", "gpt_neox", "gpt2", "mistral", "gemma2", "gpt_oss"]
TOLERANCE = {"gpt2": 1e-10}  # the others compute norms or softmax in float32
HORIZON = 8


def random_heads(model, seed=0):
    """Weights that predict prices by chance."""
    generator = torch.Generator().manual_seed(seed)
    heads, own = [], model(input_ids=tokens(1, 2), use_cache=True).past_key_values
    for layer, window in zip(own.layers, cache_windows(model), strict=True):
        groups = layer.keys.shape[1]
        weight = torch.randn(model.config.hidden_size + OTHERS, groups, generator=generator) / 3
        observed = torch.randn(OBSERVATIONS + OTHERS, groups, generator=generator) / 3
        variances = torch.rand(2, groups, generator=generator)
        heads.append(PriceHead(weight, variances[0], window, observed, variances[1]))
    return heads


def kept_indices(cache):
    """Return the tokens of the pairs that are left, by layer, text and key/value head."""
    return [
        [[[*kept.index.tolist(), *range(layer.starts, layer.length)] for kept in groups] for groups in layer.heads]
        for layer in cache.layers
    ]


def dense_logits(model, ids, hidden_pairs):
    """Run a model without a cache; `hidden_pairs[layer][group]`: pairs (first query that misses it, key)."""

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        heads, groups, length = query.shape[1], key.shape[1], query.shape[2]
        allowed = torch.ones(groups, length, length, dtype=torch.bool).tril()
        types, window = getattr(model.config, "layer_types", None), getattr(model.config, "sliding_window", None)
        if window is not None and (types is None or types[module.layer_idx] == "sliding_attention"):
            allowed &= torch.ones(length, length, dtype=torch.bool).triu(1 - window)
        for group, pairs in enumerate(hidden_pairs[module.layer_idx]):
            for query_index, key_index in pairs:
                allowed[group, query_index:, key_index] = False
        allowed = allowed.repeat_interleave(heads // groups, 0)
        key, value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
        score = query @ key.mT * scaling
        score = softcap * torch.tanh(score / softcap) if softcap else score
        score = score.masked_fill(~allowed, -torch.inf)
        if s_aux is not None:
            score = torch.cat((score, s_aux.to(score).view(1, -1, 1, 1).expand(*score.shape[:3], 1)), -1)
        weight = score.softmax(-1)[..., :length]
        return (weight @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("dense_reference", attend)
    AttentionMaskInterface.register("dense_reference", lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation("dense_reference")
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)


def missing_pairs(cache, length, before):
    """Return pairs that a cache has dropped by now, each with the first query that misses it."""
    for layer, texts in enumerate(kept_indices(cache)):
        for group, kept in enumerate(texts[0]):
            known = {key for _, key in before[layer][group]}
            before[layer][group] += [(length, key) for key in range(length) if key not in kept and key not in known]
    return before


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_attention_over_lists_is_dense_attention_without_the_dropped_pairs(name):
    model, ids = tiny(name), tokens(1, 30)
    heads = random_heads(model)
    with open_cache(model, heads, HORIZON, keep=0.5, interval=4) as cache:
        parts = [model(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True).logits]
        dropped = missing_pairs(cache, PROMPT, [[[] for _ in groups[0]] for groups in kept_indices(cache)])
        start = PROMPT
        for step in (1, 1, 3, 1, 1, 5, 1, 3):  # evictions come between them
            parts.append(model(input_ids=ids[:, start : start + step], past_key_values=cache, use_cache=True).logits)
            start += step
            dropped = missing_pairs(cache, start, dropped)
        assert start == ids.shape[1]
    expected = dense_logits(model, ids, dropped)
    tolerance = TOLERANCE.get(name, 2e-5) * expected.abs().max()
    assert sum(len(pairs) for groups in dropped for pairs in groups) > 10
    assert (torch.cat(parts, 1) - expected).abs().max() < tolerance
    without = dense_logits(model, ids, [[[] for _ in groups] for groups in dropped])
    assert (without - expected).abs().max() > 100 * tolerance  # dropping changes something


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_cache_that_keeps_all_changes_no_bit(name, implementation):
    if name in ("gpt_oss", "gemma2") and implementation == "sdpa":
        implementation = "eager"
    model, ids = tiny(name, torch.float32, implementation), tokens(2, PROMPT)
    own = model.generate(input_ids=ids, max_new_tokens=10, do_sample=False, pad_token_id=0, output_logits=True,
                         return_dict_in_generate=True)  # fmt: skip
    with open_cache(model, random_heads(model), HORIZON, keep=1.0, interval=2) as cache:
        ours = model.generate(input_ids=ids, max_new_tokens=10, do_sample=False, pad_token_id=0, output_logits=True,
                              return_dict_in_generate=True, past_key_values=cache)  # fmt: skip
    assert torch.equal(own.sequences, ours.sequences)
    assert all(torch.equal(x, y) for x, y in zip(own.logits, ours.logits, strict=True))
    assert model.config._attn_implementation == implementation


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_the_pairs_of_the_highest_predicted_prices_are_left(name):
    model, ids = tiny(name), tokens(1, PROMPT)
    heads, inputs = random_heads(model), {}
    heads = [PriceHead(head.weight / 6, head.variance, head.window) for head in heads]  # so that the window counts
    modules = [module for path, module in model.named_modules() if path.endswith(("self_attn", ".attn"))]
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: inputs.update(
                {number: (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0].detach().numpy().copy()}
            ),
            with_kwargs=True,
        )
        for number, module in enumerate(modules)
    ]
    with open_cache(model, heads, HORIZON, keep=0.4) as cache:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        kept, seen = kept_indices(cache), cache.pairs_seen
    for hook in hooks:
        hook.remove()
    scores = {}
    for layer, head in enumerate(heads):
        assert head.observed is None
        x = inputs[layer] / np.sqrt((inputs[layer] ** 2).mean(-1, keepdims=True))
        for j in range(PROMPT):
            age = PROMPT - j
            readers = HORIZON if head.window is None else min(max(head.window - age, 0), HORIZON)
            features = np.concatenate((x[j], [np.log(age), np.log1p(j), float(j == 0), 1.0]))
            logs = features @ head.weight.numpy() + head.variance.numpy() / 2
            for group, value in enumerate(logs):
                if readers:
                    scores[layer, group, j] = value + np.log(readers / HORIZON)
    assert seen == [len(scores)]
    best = {*sorted(scores, key=scores.__getitem__)[-int(0.4 * len(scores)) :]}
    ours = {(layer, group, j) for layer, texts in enumerate(kept) for group, x in enumerate(texts[0]) for j in x}
    assert ours == best


@torch.no_grad()
def test_a_budget_in_nats_drops_the_cheapest_that_it_pays():
    model, ids = tiny("llama"), tokens(2, PROMPT)
    with open_cache(model, random_heads(model), HORIZON, nats=0.0) as cache:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        assert cache.layers[0].heads is None
        prices = [torch.cat(cache.log_prices(row)).double().exp().sort().values for row in range(2)]
    budget = float(prices[0][:20].sum()) * 1.0000001
    with open_cache(model, random_heads(model), HORIZON, nats=budget, interval=2) as cache:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        for row, (ascending, kept) in enumerate(zip(prices, cache.pairs_kept, strict=True)):
            number = int((ascending.cumsum(0) <= budget).sum())
            assert cache.pairs_seen[row] - kept == number
            assert float(cache.spent[row]) == pytest.approx(float(ascending[:number].sum()))
        assert cache.pairs_seen[0] - cache.pairs_kept[0] == 20
        for token in range(6):
            model(input_ids=ids[:, token : token + 1], past_key_values=cache, use_cache=True)
        assert (cache.spent <= budget).all()


@torch.no_grad()
def test_padding_in_front_changes_nothing():
    model, ids = tiny("llama", implementation="sdpa"), tokens(1, PROMPT)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids), 1)
    both = torch.cat((padded, tokens(1, PROMPT + 5, seed=1)))
    mask = torch.ones_like(both)
    mask[0, :5] = 0

    def run(ids, mask):
        with open_cache(model, random_heads(model), HORIZON, keep=0.5, interval=3) as cache:
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12,
                                 do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
                                 past_key_values=cache)  # fmt: skip
            return torch.stack(out.logits, 1)[0], cache.pairs_kept[0], cache.pairs_seen[0]

    alone, batched = run(ids, torch.ones_like(ids)), run(both, mask)
    assert alone[1:] == batched[1:]
    assert (alone[0] - batched[0]).abs().max() < 2e-5 * alone[0].abs().max()


@torch.no_grad()
def test_memory_is_freed_and_a_reset_makes_room_for_other_texts():
    model, ids = tiny("llama", hidden_size=128, head_dim=64), tokens(1, 60)
    sizes = {}
    for keep in (1.0, 0.25):
        with open_cache(model, random_heads(model), HORIZON, keep=keep, interval=4) as cache:
            for _ in range(2):
                model(input_ids=ids, past_key_values=cache, use_cache=True)
                sizes[keep] = cache.nbytes
                assert cache.pairs_kept == [int(keep * 3 * 2 * 60)]
                cache.reset()
                assert cache.nbytes == 0
    pair = 8 * 2 * 64
    assert sizes[0.25] < 3 * 2 * (15 * (pair + 8) + 4 * pair) + 64
    assert sizes[0.25] < 0.34 * sizes[1.0]


def test_beams_continue_their_own_texts():
    model, ids = tiny("llama", torch.float32), tokens(2, PROMPT)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    with open_cache(model, random_heads(model), HORIZON, keep=0.999, interval=64) as cache:
        ours = model.generate(input_ids=ids, past_key_values=cache, **options)
        assert cache.layers[0].heads is not None
        assert len(cache.pairs_kept) == 6
    assert torch.equal(ours[:, :PROMPT], ids)
    with open_cache(model, random_heads(model), HORIZON, keep=1.0) as cache:
        assert torch.equal(
            model.generate(input_ids=ids, past_key_values=cache, **options), model.generate(ids, **options)
        )


@torch.no_grad()
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_texts_of_a_batch_can_be_chosen_and_repeated(keep):
    model, ids = tiny("llama"), tokens(3, PROMPT)
    heads, nexts = random_heads(model), tokens(3, 2, seed=4)
    with open_cache(model, heads, HORIZON, keep=keep) as cache:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([2, 2, 0, 0])
        ours = model(input_ids=nexts[rows], past_key_values=cache, use_cache=True).logits
    for row, number in enumerate(rows.tolist()):
        with open_cache(model, heads, HORIZON, keep=keep) as cache:
            model(input_ids=ids[number][None], past_key_values=cache, use_cache=True)
            alone = model(input_ids=nexts[number][None], past_key_values=cache, use_cache=True).logits[0]
        assert (alone - ours[row]).abs().max() < 2e-5 * alone.abs().max()


@torch.no_grad()
def test_another_cache_and_no_cache_inside_the_block_are_the_models_own():
    model, ids = tiny("gpt2"), tokens(1, PROMPT)
    expected = model(input_ids=ids, use_cache=False).logits
    with open_cache(model, random_heads(model), HORIZON, keep=0.5) as cache:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        assert cache.layers[0].heads is not None
        for options in ({"use_cache": False}, {"use_cache": True}):
            assert (model(input_ids=ids, **options).logits - expected).abs().max() < 1e-9 * expected.abs().max()
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


@torch.no_grad()
def test_wrong_uses_end_in_one_line():
    model, ids = tiny("llama"), tokens(2, PROMPT)
    with open_cache(model, random_heads(model), HORIZON, keep=0.5) as cache:
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        with pytest.raises(InputError, match="padding in front of the prompt only"):
            model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        with pytest.raises(InputError, match="cannot be cropped"):
            cache.crop(-1)
        with pytest.raises(InputError, match="expected 2 texts, as before; got 1"):
            model(input_ids=ids[:1], past_key_values=cache, use_cache=True)


def test_a_cache_of_another_form_is_refused():
    assert {*NAMES, "deepseek_v3"} == {*CONFIGS}
    with pytest.raises(InputError, match=r"DeepseekV3ForCausalLM .* cannot be compressed"):
        cache_windows(tiny("deepseek_v3"))  # its cache holds latents
