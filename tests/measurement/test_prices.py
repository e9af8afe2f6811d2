"""Prices of whole models: against attention that does without keys, with autograd's own gradients."""

import numpy as np
import pytest
import torch
import xarray as xr
from support.price_reference import dense_pair_prices, dense_window_prices
from support.spy import spy_on
from support.tiny import CONFIGS, summed_loss, tiny, tokens

import posterity
from posterity.errors import InputError
from posterity.measurement.window_batch import uniform_draws
from posterity.models.chunked_loss import draw_labels
from posterity.results import stats

VARIABLES = ("price", "price_by_document", "window_price", "window_price_by_document")


def dense_prices(spy, sinks=4):
    """Return the prices of each attention call, per document: of pairs, windows by head, windows by layer."""
    prices = []
    for query, key, value, output, scale, allowed, softcap, extra in spy.calls:
        first = (torch.arange(key.shape[2]) < sinks)[None, None, None]
        call = (query, key, value), output.grad, scale, allowed
        options = {"softcap": softcap, "sinks": None if extra is None else extra.detach()}
        pairs = dense_pair_prices(*call, **options)[:, :, 0]
        prices.append((pairs, *dense_window_prices(*call, first, **options)))
    return prices


def check_prices(ours, prices):
    def same(actual, expected):
        np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-9, atol=1e-12 * expected.max().item())

    for layer, (pairs, by_head, by_layer) in enumerate(prices):
        one = ours.isel(layer=layer)
        same(one.price.values[: pairs.shape[1]], pairs.sum(0))
        same(one.price_by_document.values[:, : pairs.shape[1]], pairs.sum(-1))
        same(one.window_price.values[: by_head.shape[1]], by_head.sum(0))
        same(one.window_price_by_document.values, by_layer)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("small_blocks")
def test_prices_are_those_of_the_dense_model(name):
    model, ids = tiny(name), tokens()
    with spy_on(model) as spy:
        summed_loss(model, ids).backward()
    with posterity.account(model, prices=True) as ledger:
        summed_loss(model, ids).backward()
    check_prices(ledger.result(), dense_prices(spy))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.usefixtures("small_blocks")
def test_prices_of_samples_are_those_of_labels_that_the_model_draws(name):
    model, ids = tiny(name), tokens(3)
    draws = torch.stack([uniform_draws(row, 5) for row in ids])
    with spy_on(model) as spy:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        below = logits.softmax(-1).cumsum(-1) <= draws[:, :-1, None]
        loss = torch.nn.functional.cross_entropy(logits.mT, below.sum(-1), reduction="sum")
        loss.backward()
    options = {"context": ids.shape[1], "progress": False, "seed": 5}
    sampled, of_text = (
        posterity.measure(model, None, ids, prices=prices, batch=2, **options) for prices in ("samples", "text")
    )
    check_prices(sampled, dense_prices(spy))
    for variable in set(of_text) - set(VARIABLES):
        xr.testing.assert_identical(sampled[variable], of_text[variable])
    assert (sampled.attrs["prices"], of_text.attrs["prices"]) == ("samples", "text")


@pytest.mark.parametrize("prices", ["text", "samples"])
@pytest.mark.parametrize("options", [{"batch": 3}, {"checkpoint": True}, {"losses": True, "horizons": (2,)}])
def test_prices_do_not_depend_on_how_they_are_measured(prices, options):
    model, ids = tiny("llama"), tokens(3)
    plain, other = (
        posterity.measure(model, None, ids, context=12, prices=prices, progress=False, **more) for more in ({}, options)
    )
    for name in VARIABLES:
        xr.testing.assert_allclose(plain[name], other[name], rtol=1e-9)


def test_labels_are_drawn_as_often_as_the_model_predicts_them():
    logits = torch.randn(7, dtype=torch.double)
    draws = torch.rand(200_000, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    labels = draw_labels(logits.expand(len(draws), -1), draws, torch.zeros(len(draws), dtype=torch.long))
    shares, expected = labels.bincount(minlength=7) / len(draws), logits.softmax(-1)
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / len(draws)).sqrt()).all()


def test_no_label_is_drawn_where_there_is_no_target():
    targets = torch.tensor([3, -100, 0])
    labels = draw_labels(torch.randn(3, 5), torch.tensor([0.0, 0.5, 1.0 - 1e-9]), targets)
    assert labels[1] == -100
    assert labels[[0, 2]].tolist() == [0, 4]


def test_prices_per_token_are_sums_over_windows_by_their_tokens():
    result = posterity.measure(tiny("llama"), None, tokens(4), context=12, prices="text", progress=False)
    total = result.price_by_document.sum(("document", "layer", "group")) / result.tokens.sum()
    assert stats.prices(result).price.item() == pytest.approx(total.item())
    by_layer = stats.prices(result, ("layer",)).price
    assert by_layer.sum().item() == pytest.approx(total.item())
    assert by_layer.attrs["units"] == "nats per token"
    windows = stats.window_prices(result)
    expected = result.window_price_by_document.sum("document") / result.tokens.sum()
    np.testing.assert_allclose(windows.price, expected)
    assert windows.error.notnull().all()
    assert stats.window_prices(result, ("layer", "head")).price.dims == ("layer", "head", "window")


def test_wrong_questions_end_in_one_line():
    model, ids = tiny("llama"), tokens()
    with pytest.raises(InputError, match="prices expects 'text' or 'samples'; got 'all'"):
        posterity.measure(model, None, ids, context=12, prices="all")
    result = posterity.measure(model, None, ids, context=12, progress=False)
    with pytest.raises(InputError, match='measure with prices="text" \\(--prices text\\)'):
        stats.prices(result)
    priced = posterity.measure(model, None, ids, context=12, prices="text", progress=False)
    for function in (stats.prices, stats.window_prices):
        with pytest.raises(InputError, match=r"by expects .*; got 'layer'"):
            function(priced, "layer")
    with posterity.horizon(model, posterity.Myopic()):
        summed_loss(model, ids)
        with pytest.raises(InputError, match="prices are made of the whole"):
            posterity.measure(model, None, ids, context=12, prices="text", progress=False)
