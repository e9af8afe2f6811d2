"""Laws of the shares and their standard errors."""

import inspect
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sample import sample, weight_norms
from support.sample_kinds import sample_audit

from posterity.errors import InputError
from posterity.results import stats


@pytest.fixture(scope="module")
def plain():
    return sample()


@pytest.fixture(scope="module")
def uneven():
    """The last layer lacks a head."""
    return sample(missing_heads=1, seed=3)


def documents(number=40, seed=0, size=()):
    random = np.random.default_rng(seed)
    whole = random.lognormal(0, 0.5, (number, *size))
    part = whole * random.beta(2, 3, (number, *size))
    names = ["document", *(f"axis{index}" for index in range(len(size)))]
    return xr.DataArray(part, dims=names), xr.DataArray(whole, dims=names)


# ---- standard errors


def test_the_error_of_a_ratio_agrees_with_the_bootstrap():
    part, whole = documents(200)
    ratio = stats.ratio(part, whole)
    draws = np.random.default_rng(1).integers(0, 200, (4000, 200))
    bootstrap = (part.values[draws].sum(1) / whole.values[draws].sum(1)).std()
    assert ratio.error.item() == pytest.approx(bootstrap, rel=0.05)


def test_the_error_of_a_ratio_agrees_with_the_jackknife():
    part, whole = documents(200, seed=2, size=(3,))
    ratio = stats.ratio(part, whole)
    leave_one_out = (part.sum("document") - part) / (whole.sum("document") - whole)
    jackknife = np.sqrt(199 / 200 * ((leave_one_out - leave_one_out.mean("document")) ** 2).sum("document"))
    np.testing.assert_allclose(ratio.error, jackknife, rtol=0.02)


def test_the_error_of_a_mean_is_the_standard_error_of_the_mean():
    part, _ = documents(30)
    mean = stats.ratio(part, xr.ones_like(part))
    assert mean.error.item() == pytest.approx(part.values.std(ddof=1) / np.sqrt(30), rel=1e-12)


def test_one_document_has_no_error():
    shares = stats.shares(sample(documents=1))
    assert shares.share.notnull().all()
    assert shares.error.isnull().all()


def test_shares_that_are_equal_in_every_document_have_no_error():
    _, whole = documents()
    np.testing.assert_allclose(stats.ratio(0.25 * whole, whole).error, 0, atol=1e-15)


@pytest.mark.parametrize("windows", [2, 3, 4, 5, 8, 21])
def test_nineteen_of_twenty_intervals_hold_the_mean(windows):
    """Of normal draws, whatever their number: the law that makes it Student's t."""
    draws = np.random.default_rng(windows).normal(3, 2, (200_000, windows))
    mean, error = stats.mean_and_error(draws, 1)
    held = np.abs(mean - 3) <= stats.confidence(error, windows)
    assert held.mean() == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 200_000))


def test_the_interval_is_that_of_the_tables_of_student():
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 5: 2.5706, 6: 2.4469, 30: 2.0423, 1000: 1.9623}
    for freedom, quantile in table.items():
        assert stats.confidence(1.0, freedom + 1) == pytest.approx(quantile, abs=5e-5)
    assert np.isnan(stats.confidence(1.0, 1))
    error = xr.DataArray([0.1, np.nan], dims="layer", attrs={"units": "1"})
    assert stats.confidence(error, 4).dims == ("layer",)
    with pytest.raises(InputError, match="at least one window"):
        stats.confidence(1.0, 0)


def test_few_windows_print_their_interval_and_two_print_nothing():
    assert np.isnan(stats.uncertainty(1.0, 1))
    assert np.isnan(stats.uncertainty(1.0, 2))
    assert all(stats.uncertainty(1.0, windows) == stats.confidence(1.0, windows) for windows in range(3, 8))
    assert stats.uncertainty(1.0, 8) == 1.0


# ---- shares


@pytest.mark.parametrize("by", [(), ("layer",), ("head",), ("layer", "head")])
def test_shares_of_both_sides_sum_to_one_with_equal_errors(uneven, by):
    shares = stats.shares(uneven, by)
    assert shares.share.dims == (*by, "stream", "side")
    total = shares.share.sum("side", skipna=False)
    existing = stats.existing_heads(uneven) if by == ("layer", "head") else True
    np.testing.assert_allclose(total.where(existing, 1), 1, rtol=1e-12)
    np.testing.assert_allclose(shares.error.sel(side="self"), shares.error.sel(side="other"), rtol=1e-9)


@pytest.mark.parametrize("by", [(), ("layer",)])
def test_shares_over_all_lags_sum_to_one_and_begin_with_the_self_share(uneven, by):
    lagged, sides = stats.profile(uneven, by), stats.shares(uneven, by)
    np.testing.assert_allclose(lagged.share.sum("lag"), 1, rtol=1e-12)
    np.testing.assert_allclose(lagged.counted.sum("lag"), 1, rtol=1e-12)
    for name in ("share", "error"):
        np.testing.assert_allclose(lagged[name].isel(lag=0), sides[name].sel(side="self"), rtol=1e-9)


@pytest.mark.parametrize("reader_of", ["all", "first", "rest"])
def test_a_profile_by_head_is_the_share_of_each_head_s_own_credit(uneven, reader_of):
    profile = stats.profile(uneven, ("layer", "head"), reader_of)
    assert profile.share.dims == ("layer", "head", "stream", "lag")
    assert profile.error.isnull().all()
    credit = (
        uneven.credit.sum("reader_of", skipna=False) if reader_of == "all" else uneven.credit.sel(reader_of=reader_of)
    )
    np.testing.assert_allclose(profile.share, credit / credit.sum("lag", skipna=False), rtol=1e-12)
    whole = stats.profile(uneven, (), reader_of)
    pooled = profile.share * credit.sum("lag", skipna=False) / credit.sum(("layer", "head", "lag"))
    np.testing.assert_allclose(pooled.sum(("layer", "head")), whole.share, rtol=1e-9)
    np.testing.assert_array_equal(profile.counted, stats.counts(uneven, ("layer",), reader_of))
    grouped = stats.profile(uneven, ("kv_head",), reader_of)
    assert grouped.share.dims == ("kv_head", "stream", "lag")


@pytest.mark.parametrize("reader_of", ["all", "first", "rest"])
def test_the_mean_attention_is_the_sum_of_the_weights_over_the_edges(uneven, reader_of):
    sums = [uneven[name] for name in ("attention", "edges")]
    attention, edges = (
        x.sum("reader_of", skipna=False) if reader_of == "all" else x.sel(reader_of=reader_of) for x in sums
    )
    mean = stats.attention_mean(uneven, ("layer", "head"), reader_of)
    expected = (attention / edges).where(edges > 0)
    np.testing.assert_allclose(mean.transpose(*expected.dims), expected, rtol=1e-12)
    total = attention.sum(("layer", "head")) / (edges * stats.existing_heads(uneven)).sum(("layer", "head"))
    np.testing.assert_allclose(stats.attention_mean(uneven, (), reader_of), total, rtol=1e-12)


def test_counting_alone_is_the_share_of_the_edges(plain):
    expected = np.arange(64, 0, -1) / (64 * 65 / 2)
    lags = sample(lags="all")
    np.testing.assert_allclose(stats.counts(lags), expected, rtol=1e-12)
    np.testing.assert_allclose(stats.counts(plain).isel(lag=slice(16)), expected[:16], rtol=1e-12)


def test_a_layer_with_fewer_heads_counts_less(uneven):
    wide = uneven.copy(deep=True)
    wide["edges"][-1, 0] += 10_000
    weight = np.array([3, 3, 3, 2])[:, None]
    expected = (wide.edges.sum("reader_of").values * weight).sum(0)
    np.testing.assert_allclose(stats.counts(wide), expected / expected.sum(), rtol=1e-12)


def test_credit_spread_evenly_over_the_edges_has_premium_one(plain):
    even = plain.assign(profile_by_document=plain.profile_by_document * 0 + plain.edges / 5)
    np.testing.assert_allclose(stats.profile(even).premium, 1, rtol=1e-12)


def test_a_missing_head_changes_nothing_else(uneven):
    smaller = uneven.isel(layer=slice(3))
    whole = stats.shares(uneven, ("layer",)).isel(layer=slice(3))
    assert stats.shares(smaller, ("layer",)).equals(whole)
    assert stats.shares(uneven, ("layer", "head")).share[-1, -1].isnull().all()
    assert stats.shares(uneven).share.notnull().all()


def test_a_number_that_is_not_known_stays_unknown(plain):
    broken = plain.copy(deep=True)
    broken["credit_by_document"][1, 2, 0, 1, 0] = np.nan
    share = stats.shares(broken, ("layer",)).share
    assert share.isel(layer=2, stream=1).isnull().all()
    assert share.isnull().sum() == 2


def test_attention_is_nan_where_it_was_not_measured():
    only_self = sample(lags="self")
    assert stats.attention_profile(only_self).isnull().all()
    assert stats.attention_first(only_self).notnull()


def test_attention_shares_sum_to_one(uneven):
    np.testing.assert_allclose(stats.attention_profile(uneven, ("layer",)).sum("lag"), 1, rtol=1e-12)


def test_attention_on_the_first_key_is_a_mean_over_queries(uneven):
    exact = sample(missing_heads=1, seed=3, lags="all")
    queries = exact.edges.sum("reader_of").isel(lag=0)
    by_head = exact.attention_first / queries
    np.testing.assert_allclose(stats.attention_first(exact), by_head.mean(), rtol=1e-12)
    uniform = uneven.assign(attention_first=stats.existing_heads(uneven) * queries * 0.25)
    np.testing.assert_allclose(stats.attention_first(uniform, ("layer",)), 0.25, rtol=1e-12)


def test_the_share_of_the_first_position_is_its_part_of_the_credit(plain):
    credit = plain.credit_by_position
    expected = credit.isel(position=0).sum(("layer", "head", "side")) / credit.sum(
        ("layer", "head", "side", "position")
    )
    np.testing.assert_allclose(stats.first_position(plain).share, expected, rtol=1e-12)


# ---- the median lag


def shares_of(values, width=1):
    lag = np.arange(len(values)) * width
    return xr.DataArray(values, dims="lag", coords={"lag": lag, "lag_end": ("lag", lag + width - 1)})


@settings(deadline=None)
@given(st.lists(st.integers(-3, 10), min_size=1, max_size=20).filter(lambda one: sum(one) > 0))
def test_the_median_lag_is_the_first_where_half_is_reached(credit):
    total, running, expected = sum(credit), 0, None
    for lag, credit_of_lag in enumerate(credit):
        running += credit_of_lag
        if 2 * running >= total:
            expected = lag
            break
    median = stats.median_lag(shares_of(np.array(credit) / total))
    half_way_is_exact = any(2 * sum(credit[: n + 1]) == total for n in range(len(credit)))
    assert median.item() == expected or half_way_is_exact


def test_the_median_lag_of_bins_is_near_that_of_single_lags():
    exact, octaves = sample(context=128, layers=2, lags="all"), sample(context=128, layers=2)
    for skip in (0, 1, 5, 10, 20, 30):  # take the nearest lags away to move the median out
        medians = [
            stats.median_lag((share := stats.profile(r, ("layer",)).share.where(r.lag >= skip, 0)) / share.sum("lag"))
            for r in (exact, octaves)
        ]
        rounding = 0 if skip <= 1 and (medians[0] <= 15).all() else 0.2 * medians[0]
        assert (abs(medians[0] - medians[1]) <= rounding).all()
    assert (medians[0] > 30).all()


def test_the_median_lag_of_counting_alone_is_known_exactly():
    lags = sample(lags="all", context=64)
    total = np.cumsum(np.arange(64, 0, -1))
    assert stats.median_lag(stats.counts(lags)) == np.argmax(2 * total >= 64 * 65 / 2)
    assert stats.median_lag(stats.counts(sample())) == pytest.approx(np.argmax(2 * total >= 64 * 65 / 2), abs=1)


def test_the_median_lag_is_unknown_inside_one_bin_for_everything():
    assert np.isnan(stats.median_lag(stats.counts(sample(lags="self"))))
    mostly_self = xr.DataArray([0.6, 0.4], dims="lag", coords={"lag": [0, 1], "lag_end": ("lag", [0, 63])})
    assert stats.median_lag(mostly_self) == 0
    assert np.isnan(stats.median_lag(shares_of([0.2, np.nan, 0.8])))
    assert np.isnan(stats.median_lag(shares_of([0.6, np.nan, 0.4])))


# ---- the weights


def gradients(seed=0, documents=7):
    return np.random.default_rng(seed).normal(size=(documents, 4, 3, 2, 30)) + 0.4


def with_weights(gradient):
    norms = weight_norms(gradient)
    result = sample(documents=len(gradient))
    return result.assign({name: (result[name].dims, value) for name, value in norms.items()})


def test_weight_shares_are_inner_products_with_the_whole():
    gradient = gradients()
    whole = gradient.sum(3)
    shares = stats.weight_shares(with_weights(gradient), ("layer",))
    expected = (gradient[..., 0, :] * whole).sum((0, -1)) / (whole**2).sum((0, -1))
    np.testing.assert_allclose(shares.share, expected, rtol=1e-12)
    mean = gradient.mean(0)
    expected = (mean[..., 0, :] * mean.sum(2)).sum(-1) / (mean.sum(2) ** 2).sum(-1)
    np.testing.assert_allclose(shares.share_mean, expected, rtol=1e-12)
    assert (shares.error > 0).all()


def test_agreement_is_the_mean_inner_product_of_two_different_windows():
    gradient = gradients()
    agreement = stats.weight_shares(with_weights(gradient), ("layer",)).agreement
    for part, vectors in {"self": gradient[..., 0, :], "other": gradient[..., 1, :], "whole": gradient.sum(3)}.items():
        inner = np.einsum("alsx,blsx->lsab", vectors, vectors)
        pairs = (inner.sum((-1, -2)) - np.trace(inner, axis1=-2, axis2=-1)) / (7 * 6)
        norm = np.trace(inner, axis1=-2, axis2=-1) / 7
        np.testing.assert_allclose(agreement.sel(part=part), pairs / norm, rtol=1e-10)


def test_windows_that_all_agree_have_agreement_one():
    same = np.repeat(gradients(documents=1), 5, axis=0)
    np.testing.assert_allclose(stats.weight_shares(with_weights(same)).agreement, 1, rtol=1e-12)
    assert stats.weight_shares(with_weights(same[:1])).agreement.isnull().all()


# ---- the balance


def test_the_accounts_of_the_sample_balance(uneven):
    assert (stats.balance(uneven) < 1e-13).all()


@pytest.mark.parametrize("account", ["credit", "credit_by_position", "credit_by_document"])
def test_an_account_that_is_off_shows_in_the_balance(plain, account):
    wrong = plain.copy(deep=True)
    place = {"layer": 2, "head": 1, "stream": 0}
    amount = 0.01 * plain.credit.isel(layer=2, stream=0).sum().item()
    rest = {dim: 0 for dim in wrong[account].dims if dim not in place}
    wrong[account][{**place, **rest}] += amount
    balance = stats.balance(wrong)
    assert balance.isel(layer=2, stream=0).item() == pytest.approx(0.01, rel=0.02)
    assert (balance > 1e-12).sum() == 1


def test_heads_with_almost_no_credit_are_weak(uneven):
    faint = uneven.copy(deep=True)
    faint["credit_by_document"][:, 1, 0] *= 0.01
    weak = stats.weak_heads(faint)
    assert weak.isel(layer=1, head=0).all()
    assert weak.isel(layer=3, head=2).all()
    assert not stats.weak_heads(sample(heads=1)).any()


def test_heads_with_an_uncertain_share_are_weak(plain):
    vague = plain.copy(deep=True)
    size = plain.credit_by_document[:, 1, 0, 0].sum("reader_of").mean().item()
    vague["credit_by_document"][:, 1, 0, 0, 0] = 0
    vague["credit_by_document"][:, 1, 0, 0, 1] = size * np.array([[0, 1], [0, 1], [0, 1], [0, 1], [4, 0]])
    weak = stats.weak_heads(vague)
    assert stats.shares(vague, ("layer", "head")).error[1, 0, 0, 0] > 0.25
    assert weak[1, 0, 0]
    assert not weak.sel(stream=["key", "value"]).any()


# ---- own and later losses, horizons


def test_the_shares_of_own_and_later_losses_add_up():
    result = sample(losses=True)
    np.testing.assert_allclose(stats.loss_shares(result, ("layer",)).share.sum("part"), 1)
    np.testing.assert_allclose(stats.loss_shares_by_position(result).sum(("part", "position")), 1)
    credit = result.credit_by_document.sel(stream=["key", "value"]).sum("side").values
    np.testing.assert_allclose(result.loss_credit_by_document.sum("part"), credit)
    parts = stats.loss_parts(result)
    gram = result.loss_gram.sum(("layer", "head", "position"))
    expected = gram.sel(pair="own . future") / (gram.sel(pair="own") * gram.sel(pair="future")) ** 0.5
    np.testing.assert_allclose(parts.cosine.sel(pair="own . future"), expected)


def test_the_effective_horizon_is_where_half_the_credit_is_reached():
    result = sample(horizons=(1, 2, 4, 8))
    credit = result.credit_by_document.sum("side")

    def with_curve(*curve):
        values = (credit.values[..., None] * np.array(curve)).astype(float)
        return result.assign(horizon_by_document=result.horizon_by_document.copy(data=values))

    assert stats.effective_horizon(with_curve(0.1, 0.4, 0.6, 1)).values == pytest.approx(2**1.5)
    assert stats.effective_horizon(with_curve(0.6, 0.7, 0.8, 1)).values == pytest.approx(1)
    assert np.isinf(stats.effective_horizon(with_curve(0.1, 0.2, 0.3, 0.4))).all()
    assert np.isnan(stats.effective_horizon(with_curve(0.1, np.nan, 0.6, 1))).all()


# ---- what the sums do not have


def test_a_dimension_that_the_sums_do_not_have_is_refused(plain):
    assert stats.shares(plain, ["layer", "head"]).share.dims[:2] == ("layer", "head")
    for function, by in (
        (stats.shares, ("document",)),
        (stats.shares, "layer"),
        (stats.profile, ("layer", "position")),
        (stats.counts, ("head",)),
        (stats.weight_shares, ("layer", "head")),
    ):
        with pytest.raises(InputError, match="by expects a sequence of 'layer'"):
            function(plain, by)


@pytest.mark.parametrize(
    "function",
    [
        stats.loss_shares,
        stats.loss_shares_by_position,
        stats.loss_parts,
        stats.hidden_shares,
        stats.parameter_shares,
        stats.angles,
        stats.horizon_curve,
        stats.effective_horizon,
        stats.weight_shares,
    ],
)
def test_what_was_not_measured_is_refused_with_the_option_that_measures_it(function):
    with pytest.raises(InputError, match=r"was not measured: measure with \w+=.*\(--"):
        function(sample(with_weights=False))


def test_every_public_function_of_stats_is_listed_and_documented():
    functions = {
        "ratio",
        "mean_and_error",
        "existing_heads",
        "has_reader_axis",
        "confidence",
        "uncertainty",
    }  # of ratios
    functions |= {"reach", "uniform_attention"}  # of files of their own
    for path in Path(stats.__file__).parent.glob("*_stats.py"):
        module = import_module(f"posterity.results.{path.stem}")
        functions |= {
            name for name, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__ and name[0] != "_"
        }  # fmt: skip
    assert functions == set(stats.__all__)
    assert all("Returns:" in getattr(stats, name).__doc__ for name in functions)


@pytest.mark.parametrize(
    "name", [n for n in stats.__all__ if "result" in inspect.signature(getattr(stats, n)).parameters]
)
def test_what_is_no_result_is_refused_in_one_line(name):
    function = getattr(stats, name)
    for other in ("run.nc", None, sample_audit()):
        with pytest.raises(InputError, match=rf"stats.{name} expects a result of posterity.measure; got ") as caught:
            function(other)
        assert "\n" not in str(caught.value)
