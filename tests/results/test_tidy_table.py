"""A table holds the numbers of `posterity.stats`, one row each, and nothing of its own."""

import numpy as np
import pytest
import xarray as xr
from support.sample import sample
from support.sample_kinds import earlier_version, sample_audit, sample_comparison

from posterity.errors import InputError
from posterity.results import stats
from posterity.results.comparison_schema import myopia_gaps
from posterity.results.steps import join_steps
from posterity.results.tidy_table import TABLES, table

HEADS, LAYERS = ("layer", "head"), ("layer",)
CREDIT = "share of the credit"


@pytest.fixture(scope="module")
def result():
    """With all that can be measured; the last layer lacks a head."""
    return sample(losses=True, horizons=(1, 4, 16), missing_heads=1)


SHARES = {
    "shares": (CREDIT, stats.shares),
    "profile": (CREDIT, stats.profile),
    "losses": (CREDIT, stats.loss_shares),
    "horizons": ("share of the credit that remains", stats.horizon_curve),
}


def quantities(result, kind, by):
    """Yield name, reader, value and error of every quantity of a table, from `stats`."""
    if kind == "sinks":
        first, zero = stats.first_share(result, by), stats.first_position(result, by).sel(stream=["key", "value"])
        yield "share of the credit of edges into the first positions", None, first.share, first.error
        yield "share of the attention on the first positions", None, stats.first_attention(result, by), None
        yield "share of the credit at position 0", None, zero.share, zero.error
        yield "mean attention weight on position 0", None, stats.attention_first(result, by), None
    if kind == "weights":
        shares = stats.weight_shares(result, by)
        yield "self share, one window", None, shares.share, shares.error
        yield "self share, mean over windows", None, shares.share_mean, None
        yield "agreement of windows", None, shares.agreement, None
    if kind == "reach":
        for reader_of in ("all", "rest"):
            reach = stats.reach(result, by, reader_of=reader_of).rename(quantity="measure")
            yield "lag within which the level lies", reader_of, reach.lag, reach.error
        yield "share of the first positions and the window", "all", reach.covered, reach.covered_error
    for reader_of in ("all", "first", "rest") if kind in SHARES else ():
        name, function = SHARES[kind]
        shares = function(result, by, reader_of)
        yield name, reader_of, shares.share, shares.error
        if kind == "profile":
            yield "share of the edges", reader_of, stats.counts(result, by, reader_of), None
            yield "share of the attention", reader_of, stats.attention_profile(result, by, reader_of), None
        if kind == "horizons":
            yield "effective horizon", reader_of, stats.effective_horizon(result, by, reader_of), None


GROUPS = ("layer", "kv_head")
PARTS = [(kind, by) for kind in ("shares", "sinks", "losses", "horizons") for by in ((), LAYERS, GROUPS, HEADS)]
PARTS += [("reach", by) for by in ((), LAYERS, GROUPS)]
PARTS += [(kind, by) for kind in ("profile", "weights") for by in ((), LAYERS)]


@pytest.mark.parametrize(("kind", "by"), PARTS, ids=str)
def test_a_table_holds_the_numbers_of_stats_and_no_others(result, kind, by):
    """The last layer lacks a head, and with it a key/value head."""
    frame = table(result, kind, by)
    existing = (
        stats.existing_heads(result).drop_vars("kv_head").rename(head=by[-1]) if len(by) > 1 else xr.DataArray(True)
    )
    rows = 0
    for name, reader_of, value, error in quantities(result, kind, by):
        part = frame[frame.quantity == name]
        part = part if reader_of is None else part[part.reader_of == reader_of]
        kept = (existing.broadcast_like(value) | False).transpose(*value.dims).values
        np.testing.assert_array_equal(part.value, value.values[kept])
        right = np.nan if error is None else error.transpose(*value.dims).values[kept]
        np.testing.assert_array_equal(part.error, np.broadcast_to(right, len(part)))
        for dim in value.dims:
            labels = value[dim].broadcast_like(value).transpose(*value.dims).values[kept]
            assert part[dim].tolist() == labels.tolist()
        assert set(part.units) == {value.attrs["units"]}
        rows += len(part)
    assert rows == len(frame)


def test_a_head_stands_beside_its_key_value_head():
    result = sample(heads=4)
    for row in table(result, "shares").itertuples(index=False):
        assert row.kv_head == int(result.kv_head[row.layer, row[3]])


def test_a_file_of_an_earlier_version_has_no_column_of_readers():
    result = earlier_version(sample())
    for kind in ("shares", "profile", "sinks"):
        assert "reader_of" not in table(result, kind)
    assert table(result, "shares", LAYERS).value.tolist() == stats.shares(result, LAYERS).share.values.ravel().tolist()
    with pytest.raises(InputError, match="was not measured: measure with this version of posterity"):
        table(result, "reach")


def test_a_table_stands_by_default_for_the_finest_parts(result):
    for kind, by in {
        "shares": HEADS,
        "losses": HEADS,
        "sinks": HEADS,
        "horizons": HEADS,
        "profile": LAYERS,
        "reach": GROUPS,
    }.items():
        assert table(result, kind).equals(table(result, kind, by))


def test_weak_numbers_are_those_that_stats_does_not_report(result):
    result = result.copy(deep=True)
    result["credit_by_document"].loc[{"layer": 0, "head": 0, "reader_of": "rest"}] *= 1e-3
    frame = table(result, "shares")
    weak_of = {reader_of: stats.weak_heads(result, reader_of) for reader_of in ("all", "first", "rest")}
    assert len({int(weak.sum()) for weak in weak_of.values()}) > 1
    for row in frame.itertuples():
        labels = {"layer": row.layer, "head": row[4]}
        uncertain = row.error > stats.MAX_ERROR
        assert row.weak == (bool(weak_of[row.reader_of].sel(**labels, stream=row.stream)) or uncertain)
    for row in table(result, "losses").itertuples():
        labels = {"layer": row.layer, "head": row[4]}
        weak = weak_of[row.reader_of]
        assert row.weak == (bool(weak.sel(**labels, stream=row.written)) or row.error > stats.MAX_ERROR)


def test_an_uncertain_share_is_weak_for_layers_too():
    result = sample(documents=2)
    credit = result.credit_by_document.copy()
    credit[0, 1, ..., 1] = credit[1, 1, ..., 0] = 0  # of layer 1, one window has self edges alone, the other has none
    frame = table(result.assign(credit_by_document=credit), "shares", LAYERS)
    assert (frame.weak == (frame.error > stats.MAX_ERROR)).all()
    assert set(frame[frame.weak].layer) == {1}


def test_a_number_that_is_not_known_is_weak():
    frame = table(sample(lags="self"), "profile")
    attention = frame[(frame.quantity == "share of the attention") & (frame.lag > 0)]
    assert len(attention)
    assert attention.value.isna().all()
    assert attention.weak.all()


def test_whole_numbers_stay_whole_beside_rows_without_them(result):
    frame = table(result, "horizons")
    assert frame.horizon.dropna().tolist()[:3] == [1, 4, 16]
    assert str(frame.horizon.dtype) == "Int64"
    assert frame.horizon.isna().sum() == (frame.quantity == "effective horizon").sum()


def test_a_table_of_several_steps_has_the_rows_of_each():
    results = {step: sample(seed=step) for step in (2, 10)}
    frame = table(join_steps(results), "shares", LAYERS)
    for step, result in results.items():
        part = frame[frame.step == step].drop(columns="step").reset_index(drop=True)
        assert part.equals(table(result, "shares", LAYERS))
    assert frame.columns[:2].tolist() == ["quantity", "step"]


def test_the_table_of_an_audit_holds_its_figures():
    audit = sample_audit()
    frame = table(audit, "audit")
    assert len(frame) == audit.figure.size
    for row in frame.itertuples():
        figure = audit.sel(model=row.model, measure=row.quantity)
        numbers = [row.value, row.error, row.baseline]
        np.testing.assert_array_equal(numbers, [figure.figure, figure.error, figure.baseline])
        assert (row.clause, row.units) == (int(figure.of_clause), str(figure.units_of.values))
        assert row.verdict == str(figure.verdict.sel(clause=row.clause).values)
        assert row.weak == np.isnan(row.value)


def test_the_table_of_a_comparison_holds_its_gaps():
    comparison = sample_comparison()
    gaps = myopia_gaps(comparison)
    frame = table(comparison, "comparison")
    for name, variable in {
        "held-out loss": "loss",
        "myopia gap": "gap",
        "myopia gap by position": "gap_by_position",
    }.items():
        part = frame[frame.quantity == name]
        np.testing.assert_array_equal(part.value, gaps[variable].values.ravel())
        np.testing.assert_array_equal(part.error, gaps[f"{variable}_error"].values.ravel())
        assert set(part.units) == {"nats"}
        assert set(part.seeds) == {2}


OPTIONS = {"losses": "--losses", "horizons": "--horizons", "weights": "--weights"}


@pytest.mark.parametrize("kind", OPTIONS)
def test_what_was_not_measured_names_the_option_that_measures_it(kind):
    with pytest.raises(InputError, match=f"was not measured: measure with .*{OPTIONS[kind]}"):
        table(sample(with_weights=False), kind)


def test_wrong_kinds_and_parts_are_told_in_one_line(result):
    for match, arguments in {
        r"expected one of the tables shares, profile, .*; got 'lags'": (result, "lags"),
        r"'audit' is of an audit .*; got a result, which has: shares, profile": (result, "audit"),
        r"'shares' is of a result .*; got an audit, which has: audit": (sample_audit(), "shares"),
        r"'shares' is of a result .*; got a comparison, which has: comparison": (sample_comparison(), "shares"),
        r"expected a result as posterity.measure returns it, but dict came": ({}, "shares"),
        r"by expects a sequence of 'layer' and 'head' and 'kv_head'.*got \('layers',\)": (result, "shares", ["layers"]),
        r"by expects a sequence such as .*got 'layer'": (result, "shares", "layer"),
        r"by expects a sequence of 'layer' or": (result, "profile", HEADS),
        r"'audit' has no parts of a model: leave `by` out": (sample_audit(), "audit", LAYERS),
    }.items():
        with pytest.raises(InputError, match=match):
            table(*arguments)


def test_every_table_is_named_in_the_docstring_and_the_help():
    from posterity.cli.tables import table_command

    for kind in TABLES:
        assert f'"{kind}"' in table.__doc__
        assert kind in table_command.__annotations__["kind"].__metadata__[0].help
