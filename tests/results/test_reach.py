"""The lags within which attention, mass and credit lie: against sums by hand, and first keys apart from the rest."""

import numpy as np
import pytest
import xarray as xr
from support.sample import sample

import posterity
from posterity import InputError, stats
from posterity.results.lag_bins import lag_at_share, share_at_lag

BY = [(), ("layer",), ("layer", "kv_head")]


def edges_by_hand(result, layer, group, quantity):
    """Return (first, rest) by lag of one key/value head, added up head by head."""
    kind = quantity.split()[-1]
    values = result[kind] if kind == "attention" else result[kind].sel(stream=quantity.split()[0])
    heads = np.flatnonzero(result.kv_head[layer] == group)
    return sum(values.isel(layer=layer, head=head).values for head in heads)


@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("reader_of", ["rest", "all"])
def test_the_reach_of_a_head_is_the_first_lag_from_which_on_the_share_is_reached(heads, reader_of):
    result = sample(heads=heads, lags="all", context=40)
    levels = (0.3, 0.5, 0.9, 0.99)
    reached = posterity.reach(result, levels=levels, reader_of=reader_of)
    for layer in range(4):
        for group in range(reached.sizes["kv_head"]):
            for quantity in reached.quantity.values:
                first, rest = edges_by_hand(result, layer, group, quantity)
                by_lag = rest if reader_of == "rest" else first + rest
                within = by_lag.cumsum() / by_lag.sum()
                place = {"layer": layer, "kv_head": group, "quantity": quantity}
                for level in levels:
                    expected = next(lag for lag in range(40) if (within[lag:] >= level - 1e-12).all())
                    assert reached.lag.sel(place).sel(level=level) == expected
                for window in (1, 2, 32):
                    covered = (first.sum() + rest[:window].sum()) / (first + rest).sum()
                    assert reached.covered.sel(place).sel(window=window) == pytest.approx(covered, abs=1e-12)


def test_bins_are_taken_as_evenly_spread():
    quantities = ["attention", "query credit", "key credit", "value credit"]  # whose sums the sample bins
    results = (posterity.reach(sample(lags=lags), ("layer",)) for lags in ("all", "octaves"))
    exact, binned = (result.sel(quantity=quantities) for result in results)
    near = exact.lag < 16
    assert near.sum() > 15
    xr.testing.assert_allclose(exact.lag.where(near), binned.lag.where(near))
    assert (abs(exact.lag - binned.lag) <= np.maximum(1, 0.2 * exact.lag)).all()
    xr.testing.assert_allclose(exact.covered, binned.covered)


def test_errors_of_heads_are_those_of_a_row_for_each_document():
    """Moments of a model with a single head a layer against the rows of the documents."""
    result = sample(heads=1, documents=6)
    by_head, by_layer = (posterity.reach(result, by) for by in (("layer", "kv_head"), ("layer",)))
    for name in ("lag", "error", "covered", "covered_error"):
        actual, expected = by_head[name].isel(kv_head=0, drop=True), by_layer[name]
        expected = expected.transpose(*actual.dims)
        # what moments leave of an error of zero is the root of a rounding
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=np.finfo(float).eps ** 0.5)
    assert (by_layer.covered_error > 0).any()
    assert (by_layer.error > 0).any()


def test_a_single_window_has_no_error():
    reached = posterity.reach(sample(documents=1))
    assert reached.lag.notnull().all()
    assert reached.covered_error.isnull().all()


@pytest.mark.parametrize("by", BY)
def test_a_head_that_a_layer_does_not_have_is_nan_alone(by):
    reached = posterity.reach(sample(missing_heads=1), by)
    missing = reached.lag.isnull()
    assert missing.sum() == (28 if "kv_head" in by else 0)
    if "kv_head" in by:
        assert missing[-1, -1].all()


def test_what_cannot_be_said_is_refused_in_one_line():
    with pytest.raises(InputError, match="--lags octaves"):
        posterity.reach(sample(lags="self"))
    with pytest.raises(InputError, match="by expects one of"):
        posterity.reach(sample(), ("head",))
    with pytest.raises(InputError, match="levels expects shares"):
        posterity.reach(sample(), levels=(90,))
    with pytest.raises(InputError, match="reader_of expects"):
        posterity.reach(sample(), reader_of="first")


# ---- first keys and the rest


@pytest.mark.parametrize("by", [(), ("layer",), ("layer", "head"), ("layer", "kv_head")])
def test_first_and_rest_are_the_whole(by):
    result = sample(heads=4, losses=True, horizons=(2, 8))
    share = stats.first_share(result, by).share
    credit = result.credit_by_document.sum(("document", "side"))
    for variable in ("credit", "mass", "attention", "edges", "credit_by_document", "loss_credit_by_document"):
        parts = [result[variable].sel(reader_of=label) for label in ("first", "rest")]
        np.testing.assert_allclose(sum(parts), result[variable].sum("reader_of"), rtol=1e-12)
    dims = [dim for dim in ("layer", "head") if dim not in by and "kv_head" not in by]
    if "kv_head" not in by:
        expected = (
            (credit.sel(reader_of="first") / credit.sum("reader_of"))
            if by == ("layer", "head")
            else (credit.sel(reader_of="first").sum(dims) / credit.sum("reader_of").sum(dims))
        )
        np.testing.assert_allclose(share, expected, rtol=1e-12)
    whole, first, rest = (stats.shares(result, by, reader_of).share for reader_of in ("all", "first", "rest"))
    np.testing.assert_allclose(share * first + (1 - share) * rest, whole, rtol=1e-9, atol=1e-12)


def test_key_value_heads_are_sums_of_their_query_heads():
    result = sample(heads=4)
    grouped = stats.shares(result, ("layer", "kv_head"), "rest").share
    credit = result.credit_by_document.sel(reader_of="rest").sum("document")
    by_hand = credit.sel(head=[0, 1]).sum("head") / credit.sel(head=[0, 1]).sum(("head", "side"))
    np.testing.assert_allclose(grouped.sel(kv_head=0), by_hand, rtol=1e-12)
    with pytest.raises(InputError, match="by expects"):
        stats.shares(result, ("head", "kv_head"))


@pytest.mark.parametrize("lags", ["octaves", "all"])
def test_a_level_lies_within_its_lag_and_not_within_the_lag_before_by_the_share_at_these_lags(lags):
    result = sample(lags=lags, context=128)
    first, last = result.lag.values, result.lag_end.values
    within = stats.cumulative_profile(result).counted.values
    np.testing.assert_allclose(share_at_lag(last, within, first, last), within, rtol=1e-14)
    for level in np.linspace(0.03, 0.97, 40):
        index = int((within >= level).argmax())
        before = within[index - 1] if index else 0.0
        lag = lag_at_share(level, before, within[index], first[index], last[index])
        shares = share_at_lag(np.array([lag - 1, lag]), within, first, last)
        assert first[index] <= lag <= last[index]
        assert shares[0] < level <= shares[1] + 1e-12


def test_a_file_of_version_one_gives_its_old_numbers(tmp_path):
    result = sample(losses=True, horizons=(2, 8))
    old = result.drop_dims(["group", "quantity", "moment"]).drop_vars(
        ["kv_head", "position_end", "mass_by_document", "attention_by_document"]
    )
    for name, array in old.data_vars.items():
        if "reader_of" in array.dims:
            old[name] = array.sum("reader_of").transpose(*(dim for dim in array.dims if dim != "reader_of"))
            old[name].attrs = array.attrs
    old = old.drop_vars("reader_of").assign_attrs(schema_version=1)
    old["edges"] = old.edges.astype("int64")
    old.to_netcdf(tmp_path / "old.nc", engine="h5netcdf")
    loaded = posterity.load(tmp_path / "old.nc")
    assert not stats.has_reader_axis(loaded)
    for function in (stats.shares, stats.profile, stats.loss_shares, stats.horizon_curve, stats.balance):
        xr.testing.assert_allclose(function(loaded), function(result), rtol=1e-12)
    with pytest.raises(InputError, match="measure again"):
        stats.shares(loaded, (), "rest")
    with pytest.raises(InputError, match="was not measured"):
        posterity.reach(loaded)
    with pytest.raises(InputError, match="earlier version"):
        stats.shares(loaded, ("layer", "kv_head"))
    posterity.save(loaded, tmp_path / "new.nc")
    assert posterity.load(tmp_path / "new.nc").identical(loaded)
