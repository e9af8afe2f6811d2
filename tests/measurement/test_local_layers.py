"""Local layers: masks of windows against dense ones, the plan against plain numpy, trials and folders against both."""

import json
import math

import numpy as np
import pytest
import torch
from support.reference import dense_attention
from support.sample import sample
from support.spy import use_attention
from support.texts import tokenizer
from support.tiny import tiny, tokens

import posterity
from posterity.errors import InputError
from posterity.inputs.limits_folder import apply_limits
from posterity.inputs.model import load_model
from posterity.measurement.local_layers import layer_reaches, save_model
from posterity.models.window_limits import limit_windows
from posterity.results.window_plan import LocalLayers, plan_windows

FAMILIES = ["llama", "qwen3", "phi3", "gpt_neox", "gpt2", "mistral", "gemma2", "deepseek_v3"]
LENGTH = 12


def by_hand(windows, sinks=0):
    """Attention with a window in some layers, in N x N masks."""

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
        allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        position = torch.arange(key.shape[2])
        near = (position[:, None] - position < windows.get(module.layer_idx, LENGTH)) | (position < sinks)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output, _, _ = dense_attention(query, key, value, scaling, allowed & near, softcap)
        return output.transpose(1, 2).contiguous(), None

    return attend


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def logits_by_hand(model, ids, windows, sinks=0):
    with use_attention(model, "by hand", by_hand(windows, sinks)):
        return logits(model, ids)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.usefixtures("small_blocks")
def test_local_layers_see_a_window_and_the_first_keys(name, sinks):
    model, ids, windows = tiny(name), tokens(2, LENGTH), {0: 4, 1: 1}
    before = logits(model, ids)
    with limit_windows(model, windows, sinks):
        ours = logits(model, ids)
    torch.testing.assert_close(ours, logits_by_hand(model, ids, windows, sinks), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours, before)
    assert torch.equal(logits(model, ids), before)


def test_first_keys_stay_those_of_each_row_behind_padding():
    model, ids = tiny("llama"), tokens(1, LENGTH)
    behind = torch.cat((torch.ones(1, 3, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)), 1)
    with limit_windows(model, {0: 2, 1: 2}, sinks=2), torch.no_grad():
        alone = logits(model, ids)
        places = torch.cat((torch.zeros(3), torch.arange(LENGTH)))[None].long()
        padded = model(input_ids=behind, attention_mask=mask, position_ids=places, use_cache=False).logits[:, 3:]
    torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-9)


def test_the_plan_takes_the_layers_that_cost_least():
    result = sample(layers=6, prices="samples")
    cost = result.window_price_by_document.sum("document") / result.tokens.sum()
    for window in result.window.values.tolist():
        plan = plan_windows(result, "1/2", window)
        cheapest = np.argsort(cost.sel(window=window).values)[:3]
        assert plan.proposal.layers == tuple(sorted(cheapest.tolist()))
        assert plan.proposal.predicted.value == pytest.approx(cost.sel(window=window).values[cheapest].sum())
        by_document = result.window_price_by_document.sel(window=window).isel(layer=cheapest).sum("layer")
        residual = by_document - plan.proposal.predicted.value * result.tokens
        n = result.sizes["document"]
        error = math.sqrt(n / (n - 1) * float((residual**2).sum())) / float(result.tokens.sum())
        assert plan.proposal.predicted.error == pytest.approx(error)


def test_without_a_window_the_smallest_within_the_budget_is_proposed():
    result = sample(layers=6, prices="samples")
    cost = result.window_price_by_document.sum("document") / result.tokens.sum()
    sums = {int(w): float(np.sort(cost.sel(window=w).values)[:2].sum()) for w in result.window.values}
    sizes = list(sums)
    budget = (sums[sizes[2]] + sums[sizes[1]]) / 2
    expected = next(w for w in sizes if sums[w] <= budget)
    assert plan_windows(result, 2, budget=budget).proposal.window == expected
    assert plan_windows(result, 2, budget=0.0).proposal is None
    assert plan_windows(result).proposal is None


def test_trials_are_divergence_and_loss_of_the_masked_model():
    model, ids = tiny("llama", num_hidden_layers=4), tokens(6, LENGTH)
    options = {"context": LENGTH, "limit": 3, "local": 2, "window": 4, "verify": True, "progress": False}
    plan = posterity.windows(model, None, ids, **options)
    assert plan.trial_windows == 3
    assert plan.result.sizes["document"] == 3
    assert [trial.choice for trial in plan.trials] == ["cheapest", "evenly spaced", "least attention", "random"]
    for trial in plan.trials[:3]:
        divergences, changes = [], []
        for row in ids[3:, None]:
            full, limited = (
                x[:, :-1].log_softmax(-1)
                for x in (logits_by_hand(model, row, windows) for windows in ({}, dict.fromkeys(trial.layers, 4)))
            )
            divergences.append((full.exp() * (full - limited)).sum(-1).mean().item())
            changes.append((full - limited).gather(-1, row[:, 1:, None]).mean().item())
        for estimate, values in ((trial.divergence, divergences), (trial.loss, changes)):
            assert estimate.value == pytest.approx(np.mean(values), rel=1e-7, abs=1e-12)
            assert estimate.error == pytest.approx(np.std(values, ddof=1) / math.sqrt(3), rel=1e-6, abs=1e-12)
    share = {}
    for layer in range(4):
        attention = plan.result.attention.sel(layer=layer).sum("head")
        share[layer] = float(attention.where(attention.lag >= 4, 0).sum() / attention.sum())
    assert set(plan.trials[2].layers) == set(sorted(share, key=share.get)[:2])


def save_and_load(model, windows, folder):
    layers = LocalLayers(tuple(windows), next(iter(windows.values())), (0.0, 0.0))
    in_config = save_model(model, tokenizer(), layers, folder, {"note": 1})
    return in_config, load_model(folder).model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_local_layers_runs_as_the_masked_model(name, tmp_path):
    model, ids, windows = tiny(name, dtype=torch.float32), tokens(2, LENGTH), {1: 3}
    in_config, again = save_and_load(model, windows, tmp_path / "local")
    expected = logits_by_hand(model, ids, windows)
    torch.testing.assert_close(logits(again, ids), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    data = json.loads((tmp_path / "local" / "windows.json").read_text())
    assert data["windows"] == {"1": 3}
    assert data["note"] == 1
    assert data["in_config"] == in_config
    config = json.loads((tmp_path / "local" / "config.json").read_text())
    assert ("sliding_attention" in str(config.get("layer_types"))) >= in_config
    assert layer_reaches(again, ids)[1] == 3
    result = posterity.measure(again, None, ids, context=LENGTH, lags="all", progress=False)
    assert float(result.attention.sel(layer=1).where(result.lag >= 3, 0).sum()) == 0
    assert not [path for path in tmp_path.iterdir() if path.name != "local"]


def test_qwen_says_its_windows_in_its_config(tmp_path):
    in_config, again = save_and_load(tiny("qwen3", dtype=torch.float32), {0: 4, 2: 4}, tmp_path / "local")
    assert in_config
    assert again.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert again.config.sliding_window == 4


def test_generation_with_a_cache_keeps_the_windows(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    _, again = save_and_load(model, {0: 3, 1: 3}, tmp_path / "local")
    ids = tokens(1, LENGTH)
    with torch.no_grad():
        cache = again(input_ids=ids[:, :-1], use_cache=True).past_key_values
        last = again(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    expected = logits_by_hand(model, ids, {0: 3, 1: 3})[:, -1]
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1, "windows": {"0": 0}, "in_config": false}', "[1]"])
def test_a_damaged_file_of_windows_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "windows.json").write_text(text)
    with pytest.raises(InputError, match="it is damaged: write it again") as caught:
        apply_limits(tiny("llama"), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local": 0}, "share above 0, at most 1"),
        ({"local": "3/2"}, "share above 0, at most 1"),
        ({"local": "many"}, "share above 0, at most 1"),
        ({"local": 9}, "a number from 1 to 3"),
        ({"local": 1, "window": 5}, "expected one of the windows 1, 2, 4, 8"),
        ({"window": 4}, "say how many"),
        ({"verify": True}, "say how many"),
        ({"local": 1, "budget": -1.0}, "budget of at least 0"),
        ({"prices": "all"}, "prices expects 'text' or 'samples'"),
    ],
)
def test_wrong_questions_end_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        posterity.windows(tiny("llama"), None, tokens(4, LENGTH), context=LENGTH, progress=False, **options)
    assert "\n" not in str(caught.value)


def test_a_result_without_prices_names_the_option():
    with pytest.raises(InputError, match="--prices text"):
        plan_windows(sample(), 2)
