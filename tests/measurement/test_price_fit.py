"""Prices that are predicted: the regression against numpy's, against dense prices, folders, and an interrupted run."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from support.price_reference import dense_pair_prices
from support.spy import spy_on
from support.tiny import summed_loss, tiny, tokens

import posterity
from posterity.errors import InputError
from posterity.measurement import price_fit, run_state
from posterity.measurement.price_calibration import (
    Predictions,
    apply_calibration,
    calibrate,
    judge_predictions,
    rank_correlation,
)
from posterity.measurement.price_fit import Prices, model_digest
from posterity.models import observed_attention

OPTIONS = {"context": 12, "horizon": 4, "prices": "text", "progress": False}


def measured_rows(model, ids, layer):
    """Return features and logarithms of prices of one layer, written down by hand, from dense attention."""
    inputs = []
    module = model.get_submodule(f"model.layers.{layer}.self_attn")
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(kwargs["hidden_states"].detach().numpy()), with_kwargs=True
    )
    window = getattr(model.config, "sliding_window", None)
    features, observed, logs = [], [], []
    for row in ids:
        with spy_on(model) as spy:
            summed_loss(model, row[None]).backward()
        query, key, value, output, scale, allowed, softcap, _ = spy.calls[layer]
        prices = dense_pair_prices((query, key, value), output.grad, scale, allowed, (4, 8, 12), softcap=softcap)[0]
        hidden = inputs[-1][0]
        for segment, start in ((1, 4), (2, 8)):
            for j in range(start):
                readers = sum(1 for i in range(start, start + 4) if window is None or i - j < window)
                if readers:
                    x = hidden[j] / np.sqrt((hidden[j] ** 2).mean())
                    others = [math.log(start - j), math.log1p(j), float(j == 0), 1.0]
                    features.append([*x, *others])
                    observed.append([[*group, *others] for group in dense_observations(spy.calls[layer], start, j)])
                    logs.append(np.log(prices[:, segment, j].numpy() / readers + 1e-10))
    hook.remove()
    return np.array(features), np.array(observed), np.array(logs)


def dense_observations(call, start, j):
    """Return what the 3 queries before `start` show of the pair of key j, by key/value head, from dense attention."""
    query, key, value, _, scale, allowed, softcap, _ = call
    heads, groups = query.shape[1], key.shape[1]
    score = scale * query[0].detach() @ key[0].detach().repeat_interleave(heads // groups, 0).mT
    score = softcap * torch.tanh(score / softcap) if softcap else score
    allowed = torch.as_tensor(allowed).expand(1, heads, *score.shape[-2:])[0]
    weight = score.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    rows = []
    for group in range(groups):
        members = range(group * (heads // groups), (group + 1) * (heads // groups))
        paid = [[float(weight[m, i, j]) for i in range(start - 3, start) if allowed[m, i, j]] for m in members]
        means = [sum(x) / len(x) for x in paid]
        numbers = (
            sum(means) / len(means), max(means), max(map(max, paid)),
            sum(float(weight[m, start - 1, j]) for m in members) / len(means),
            float(key[0, group, j].detach().norm()), float(value[0, group, j].detach().norm()),
        )  # fmt: skip
        rows.append([math.log(max(x, 1e-7)) for x in numbers])
    return rows


def ridge(features, logs):
    """Return the regression with a penalty on weights of scaled features, and its mean squared error."""
    spread = features.std(0)
    spread[-1] = 0.0
    scaled = np.concatenate((features, np.diag(np.sqrt(3e-3 * len(features)) * spread)))
    target = np.concatenate((logs, np.zeros((len(spread), *logs.shape[1:]))))
    weight = np.linalg.lstsq(scaled, target, rcond=None)[0]
    return weight, ((logs - features @ weight) ** 2).mean(0)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_the_regression_is_that_of_dense_prices(name, monkeypatch):
    monkeypatch.setattr(observed_attention, "OBSERVED_QUERIES", 3)
    model, ids = tiny(name), tokens(5)
    fitted = Prices.fit(model, None, ids, limit=5, **OPTIONS)
    fit_windows = ids[[0, 1, 2, 4]]  # every fourth is held out
    for layer in (0, 2):
        if name == "gemma2" and layer == 2:
            continue
        head = fitted.heads[layer]
        features, observed, logs = measured_rows(model, fit_windows, layer)
        expected, residual = ridge(features, logs)
        np.testing.assert_allclose(head.weight, expected, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(head.variance, residual, rtol=1e-3)
        for group in range(logs.shape[1]):
            expected, residual = ridge(observed[:, group], logs[:, group])
            np.testing.assert_allclose(head.observed[:, group], expected, rtol=2e-4, atol=2e-4)
            np.testing.assert_allclose(head.observed_variance[group], residual, rtol=1e-3)
    assert fitted.judgement.windows == 1
    assert -1 <= fitted.judgement.correlation <= 1


def test_ranks_correlate_as_in_pandas():
    x, y = torch.randint(9, (2, 200), generator=torch.Generator().manual_seed(0)).double()
    ranks = pd.DataFrame({"x": x, "y": y}).rank()
    assert rank_correlation(x, y) == pytest.approx(ranks.x.corr(ranks.y), abs=1e-12)
    assert rank_correlation(x, x.exp()) == pytest.approx(1)


def test_calibrated_prices_are_means_of_measured_ones():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.empty(20_000, dtype=torch.double).uniform_(-12, -4, generator=generator)
    measured = 3 * (predicted / 2).exp() * torch.rand(20_000, dtype=torch.double, generator=generator)
    trial = Predictions.of(predicted, measured)
    points = calibrate([trial])
    assert (points.diff() >= 0).all()
    prices = apply_calibration(points, predicted).exp()
    for low in (-11, -9, -7, -5):
        part = (predicted > low) & (predicted < low + 1)
        assert float(prices[part].mean()) == pytest.approx(float(measured[part].mean()), rel=0.05)
    assert apply_calibration(points, torch.tensor([-100.0, -50.0])).diff().item() == pytest.approx(50.0)
    twice = judge_predictions([trial, Predictions.of(predicted, 2 * measured)])
    assert twice.cheap_ratio == pytest.approx((2 + 0.5) / 2, rel=1e-3)
    same = torch.tensor([-9.0, -3.0])
    assert torch.equal(apply_calibration(calibrate([]), same), same)


def test_a_folder_gives_back_the_same_prices(tmp_path):
    model = tiny("llama")
    fitted = Prices.fit(model, None, tokens(5), limit=5, **OPTIONS)
    fitted.save(tmp_path / "prices")
    again = Prices.load(tmp_path / "prices")
    for ours, theirs in zip(fitted.heads, again.heads, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.variance, theirs.variance)
        assert ours.window == theirs.window
    assert torch.equal(fitted.calibration, again.calibration)
    assert (again.horizon, again.model_digest) == (4, fitted.model_digest)
    assert str(again.judgement) == str(fitted.judgement)  # which may hold NaN
    assert str(again) == str(fitted)
    assert "rank correlation with measured prices" in str(again)
    again.save(tmp_path / "prices")  # in the place of the old ones


def test_prices_of_samples_are_of_drawn_labels():
    model, ids = tiny("llama"), tokens(5)
    text = Prices.fit(model, None, ids, limit=5, **OPTIONS)
    first, again, other = (
        Prices.fit(model, None, ids, limit=5, **{**OPTIONS, "prices": "samples", "seed": seed}) for seed in (0, 0, 1)
    )
    assert torch.equal(first.heads[1].weight, again.heads[1].weight)
    assert not torch.allclose(first.heads[1].weight, other.heads[1].weight)
    assert not torch.allclose(first.heads[1].weight, text.heads[1].weight)


def test_an_interrupted_fit_goes_on_without_counting_twice(tmp_path, monkeypatch):
    model, ids, state = tiny("llama"), tokens(6), tmp_path / "state"
    whole = Prices.fit(model, None, ids, limit=6, **OPTIONS)
    add = price_fit.PriceMeasurement.add
    calls = []

    def interrupt(self, sums, window):
        calls.append(window.text)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(self, sums, window)

    monkeypatch.setattr(run_state, "WRITE_SHARE", math.inf)  # after every window
    monkeypatch.setattr(price_fit.PriceMeasurement, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Prices.fit(model, None, ids, limit=6, state=state, **OPTIONS)
    monkeypatch.setattr(price_fit.PriceMeasurement, "add", lambda self, *a: (calls.append(""), add(self, *a)))
    resumed = Prices.fit(model, None, ids, limit=6, state=state, **OPTIONS)
    assert len(calls) == 3 + 3  # five windows are fitted, one is held out
    for ours, theirs in zip(whole.heads, resumed.heads, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
    with pytest.raises(InputError, match="horizon"):
        Prices.fit(model, None, ids, limit=6, state=state, **{**OPTIONS, "horizon": 3})


def test_a_digest_tells_weights_apart_but_not_precisions():
    model = tiny("llama", torch.float32)
    assert model_digest(model) == model_digest(tiny("llama", torch.float32).to(torch.bfloat16))
    changed = tiny("llama", torch.float32)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    assert model_digest(changed) != model_digest(model)


def test_damaged_folders_and_wrong_arguments_end_in_one_line(tmp_path):
    model, ids = tiny("llama"), tokens(5)
    folder = tmp_path / "prices"
    fitted = Prices.fit(model, None, ids, limit=5, **OPTIONS)
    fitted.save(folder)
    file = folder / "prices.safetensors"
    tensors, data = load_file(file), file.read_bytes()
    with safe_open(file, "pt") as source:
        metadata = source.metadata()
    for length in (10, len(data) // 2, len(data) - 1):  # a part of the file
        file.write_bytes(data[:length])
        with pytest.raises(InputError, match="expected prices, but it is damaged: fit them again"):
            Prices.load(folder)
    for change in ({"0.weight": torch.full_like(tensors["0.weight"], torch.nan)}, {"0.variance": torch.zeros(7)},
                   {"calibration": torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.double)}):  # fmt: skip
        save_file(tensors | change, file, metadata)
        with pytest.raises(InputError, match="damaged"):
            Prices.load(folder)
    description = json.loads(metadata["posterity"])
    save_file(tensors, file, {"posterity": json.dumps(description | {"version": 9})})
    with pytest.raises(InputError, match="is of version 9; this is posterity for version 2"):
        Prices.load(folder)
    save_file(tensors, file)
    with pytest.raises(InputError, match="damaged"):
        Prices.load(folder)
    with pytest.raises(InputError, match=r"expected a folder with prices\.safetensors"):
        Prices.load(tmp_path)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="it holds something else"):
        fitted.save(tmp_path)
    with pytest.raises(InputError, match="it is a file: choose another"):
        fitted.save(tmp_path / "note.txt")
    with pytest.raises(InputError, match="expected a context of two horizons at least"):
        Prices.fit(model, None, ids, context=12, horizon=7, progress=False)
    with pytest.raises(InputError, match="prices expects 'text' or 'samples'"):
        Prices.fit(model, None, ids, **{**OPTIONS, "prices": None})


@torch.no_grad()
def test_compress_takes_prices_of_its_model_only(tmp_path):
    model, ids = tiny("llama"), tokens(5)
    fitted = Prices.fit(model, None, ids, limit=5, **OPTIONS)
    fitted.save(tmp_path / "prices")
    for prices in (fitted, tmp_path / "prices", str(tmp_path / "prices")):
        with posterity.compress(model, prices, keep=0.5) as cache:
            model(input_ids=ids[:1], past_key_values=cache, use_cache=True)
            assert cache.pairs_kept == [36]
    with posterity.compress(model, fitted, nats=1e-3) as cache:
        model(input_ids=ids[:1], past_key_values=cache, use_cache=True)
        assert 0 <= float(cache.spent[0]) <= 1e-3
    other = tiny("llama")
    other.lm_head.weight.mul_(2)
    wrong = [
        (other, {"keep": 0.5}, "expected the model that the prices were fitted on"),
        (model, {}, "expected keep=, a share of the cache, or nats="),
        (model, {"keep": 0.5, "nats": 0.1}, "got neither or both"),
        (model, {"keep": 0}, "above 0, at most 1; got 0"),
        (model, {"keep": 1.5}, "above 0, at most 1; got 1.5"),
        (model, {"keep": math.nan}, "above 0, at most 1; got nan"),
        (model, {"nats": -1.0}, "nats expects a budget"),
        (model, {"keep": 0.5, "interval": 0}, "interval expects"),
    ]
    for subject, options, message in wrong:
        with pytest.raises(InputError, match=message), posterity.compress(subject, fitted, **options):
            pass
