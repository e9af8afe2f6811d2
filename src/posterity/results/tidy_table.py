"""`posterity.table`: the numbers of `posterity.stats` as tidy pandas tables, one row for each number."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from posterity.axes import READER_OF, WRITTEN
from posterity.errors import InputError
from posterity.results import stats
from posterity.results.audit_schema import AUDIT
from posterity.results.comparison_schema import COMPARISON, myopia_gaps
from posterity.results.eviction_schema import EVICTION
from posterity.results.feature_parts import direction_pulls, part_shares
from posterity.results.feature_schema import FEATURES
from posterity.results.kind import Kind, kind_name
from posterity.results.ratios import mean_and_error
from posterity.results.schema import RESULT
from posterity.results.steps import split_steps

LABELS = (  # the columns of labels in their order; a table has those that its rows need
    "quantity", "step", "model", "clause", "verdict", "arm", "seeds", "scorer", "budget", "kept",
    "layer", "kv_head", "head", "stream", "written", "measure", "reader_of", "side", "part", "level", "window",
    "horizon", "lag", "lag_end", "position",
)  # fmt: skip
NUMBERS = ("value", "error", "baseline", "units", "weak")
Parts = tuple[str, ...]  # the dimensions of the parts of a model that have rows of their own


@dataclass(frozen=True)
class Quantity:
    """Numbers with labels, of one name, with standard errors and weak flags where there are any."""

    name: str
    value: xr.DataArray
    error: xr.DataArray | float = np.nan
    weak: xr.DataArray | bool = False
    baseline: xr.DataArray | None = None

    def frame(self) -> pd.DataFrame:
        """Return one row for each number."""
        columns = {"value": self.value, "error": self.error, "weak": self.value.isnull() | self.weak}
        columns |= {} if self.baseline is None else {"baseline": self.baseline}
        numbers = xr.Dataset(columns).expand_dims("row")
        frame = numbers.to_dataframe(dim_order=["row", *self.value.dims]).reset_index()
        return frame.assign(quantity=self.name, units=frame.get("units", self.value.attrs.get("units", "1")))


@dataclass(frozen=True)
class TableKind:
    """One kind of table: its quantities, the finest parts that they stand for, and the Datasets that have them."""

    quantities: Callable[[xr.Dataset, Parts], Iterator[Quantity]]
    parts: Parts = ()
    source: Kind = RESULT


def table(dataset: xr.Dataset, kind: str, by: Sequence[str] | None = None) -> pd.DataFrame:
    """Return one kind of numbers as a tidy table, a row for each number.

    Kinds of a result: "shares" (of the self edge and of all others), "profile" (by lag, beside edges and attention),
    "reach" (lags that hold most of attention, mass and credit, and what windows hold), "sinks" (at the first
    positions), "losses" (own and later), "horizons" (credit that remains under a discount), "weights" (self part in the
    gradients of W_Q, W_K and W_V), "prices" (of cached keys and values) and "windows" (what it costs to look back no
    further). Of an audit: "audit". Of compared runs: "comparison". Of an eviction: "eviction". Of features: "features".
    Every number of a result is one of `posterity.stats`.

    Args:
        dataset: What `posterity.measure`, `audit`, `compare`, `evict` or `features` returned. A result of several
            training steps gives the rows of every step.
        kind: One of the kinds above.
        by: The parts of the model that have rows of their own: (), ("layer",), ("layer", "kv_head") or
            ("layer", "head"); by default the finest that the kind has.

    Returns:
        `quantity` and the labels of a row (layer, head, stream, lag, ...), among them `reader_of`: "all" edges, those
        into the "first" keys of a document, or the "rest" (not in files of earlier versions). `value`; its standard
        `error` over windows, NaN where there is none; `units`; `weak`: True where a value is not known, a share's error
        is above `stats.MAX_ERROR`, a lag's error above the lag, or a head's credit is too small or too uncertain to
        report (`stats.weak_heads`). An audit has `baseline` too, what counting or chance predicts. Heads that a layer
        lacks have no rows.

    Raises:
        InputError: An unknown kind; one that was not measured, naming the option that measures it; one that another
            kind of Dataset has.
    """
    if kind not in TABLES:
        raise InputError(f"expected one of the tables {', '.join(TABLES)}; got {kind!r}")
    entry = TABLES[kind]
    _check_source(dataset, kind, entry.source)
    if entry.source is not RESULT:
        if by:
            raise InputError(f"the table {kind!r} has no parts of a model: leave `by` out; got {by!r}")
        return _assemble(entry.quantities(dataset, ()))
    if isinstance(by, str):
        raise InputError(f"by expects a sequence such as ('layer', 'head'); got {by!r}")
    parts = entry.parts if by is None else tuple(by)
    tables = {
        step: _existing(result, _assemble(entry.quantities(result, parts)))
        for step, result in split_steps(dataset).items()
    }
    if "step" not in dataset.dims:
        return tables[0]
    return _ordered(pd.concat([frame.assign(step=step) for step, frame in tables.items()], ignore_index=True))


def _check_source(dataset: xr.Dataset, kind: str, source: Kind) -> None:
    """Raise InputError unless the Dataset is a valid one of the kind that has this table."""
    name = kind_name(dataset)
    if name != source.name and name in {entry.source.name for entry in TABLES.values()}:
        tables = ", ".join(table_name for table_name, entry in TABLES.items() if entry.source.name == name)
        article = "an" if name == AUDIT.name else "a"
        raise InputError(
            f"the table {kind!r} is of {source.expected}; got {article} {name or 'result'}, which has: {tables}"
        )
    source.check(dataset)


def _assemble(quantities: Iterator[Quantity]) -> pd.DataFrame:
    return _ordered(pd.concat([quantity.frame() for quantity in quantities], ignore_index=True))


def _existing(result: xr.Dataset, frame: pd.DataFrame) -> pd.DataFrame:
    """Leave out the heads that a layer does not have."""
    existing = stats.existing_heads(result)
    if {"layer", "head"} <= set(frame):
        kept = existing.values[frame["layer"], frame["head"]]
    elif {"layer", "kv_head"} <= set(frame):
        groups = {(layer, int(result.kv_head[layer, head])) for layer, head in np.argwhere(existing.values).tolist()}
        kept = [pair in groups for pair in zip(frame["layer"], frame["kv_head"], strict=True)]
    else:
        return frame
    return frame.loc[kept].reset_index(drop=True)


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the columns in their order, whole numbers as such even where some rows have none."""
    frame = frame.loc[:, [name for name in (*LABELS, *NUMBERS) if name in frame]]
    numbers = [name for name in frame if name in LABELS and frame[name].dtype.kind == "f"]
    whole = [name for name in numbers if np.all(frame[name].dropna() % 1 == 0)]
    return frame.astype(dict.fromkeys(whole, "Int64"))


# ---- the quantities of a result


def _readers(result: xr.Dataset) -> tuple[str | None, ...]:
    """Return which edges have rows of their own, by their key; None alone for a file that does not tell them apart."""
    return ("all", *READER_OF) if stats.has_reader_axis(result) else (None,)


def _label_readers(values: xr.DataArray, reader_of: str | None) -> xr.DataArray:
    return values if reader_of is None else values.assign_coords(reader_of=reader_of)


def _shares(result: xr.Dataset, by: Parts) -> Iterator[Quantity]:
    yield from _shares_of_readers(result, "share of the credit", stats.shares, by)


def _profile(result: xr.Dataset, by: Parts) -> Iterator[Quantity]:
    yield from _shares_of_readers(result, "share of the credit", stats.profile, by)
    functions = {"share of the edges": stats.counts, "share of the attention": stats.attention_profile}
    for name, function in functions.items():
        for reader_of in _readers(result):
            yield Quantity(name, _label_readers(function(result, by, reader_of or "all"), reader_of))


def _reach(result: xr.Dataset, by: Parts) -> Iterator[Quantity]:
    for reader_of in ("all", "rest"):
        reach = stats.reach(result, by, reader_of=reader_of).rename(quantity="measure")
        uncertain = reach.error > reach.lag.clip(min=1)
        yield Quantity("lag within which the level lies", _label_readers(reach.lag, reader_of), reach.error, uncertain)
    covered = _label_readers(reach.covered, "all")
    yield Quantity("share of the first positions and the window", covered, reach.covered_error)


def _sinks(result: xr.Dataset, by: Parts) -> Iterator[Quantity]:
    if stats.has_reader_axis(result) and result.attrs.get("sinks") != 0:
        yield _share(result, "share of the credit of edges into the first positions", stats.first_share(result, by))
        yield Quantity("share of the attention on the first positions", stats.first_attention(result, by))
    first = stats.first_position(result, by).sel(stream=list(WRITTEN))  # a query at position 0 has no choice
    yield _share(result, "share of the credit at position 0", first)
    yield Quantity("mean attention weight on position 0", stats.attention_first(result, by))


def _losses(result: xr.Dataset, by: Parts) -> Iterator[Quantity]:
    yield from _shares_of_readers(result, "share of the credit", stats.loss_shares, by)


def _horizons(result: xr.Dataset, by: Parts) -> Iterator[Quantity]:
    yield from _shares_of_readers(result, "share of the credit that remains", stats.horizon_curve, by)
    for reader_of in _readers(result):
        horizon = _label_readers(stats.effective_horizon(result, by, reader_of or "all"), reader_of)
        yield Quantity("effective horizon", horizon, weak=_weak_heads(result, horizon))


def _shares_of_readers(
    result: xr.Dataset, name: str, function: Callable[..., xr.Dataset], by: Parts
) -> Iterator[Quantity]:
    """Yield the shares of a function of `stats`: of all edges, of those into the first keys, and of the rest."""
    for reader_of in _readers(result):
        shares = function(result, by, reader_of or "all")
        yield _share(result, name, shares.assign(share=_label_readers(shares.share, reader_of)))


def _weights(result: xr.Dataset, by: Parts) -> Iterator[Quantity]:
    shares = stats.weight_shares(result, by)
    yield _share(result, "self share, one window", shares)
    yield Quantity("self share, mean over windows", shares.share_mean)
    yield Quantity("agreement of windows", shares.agreement)


def _prices(result: xr.Dataset, by: Parts) -> Iterator[Quantity]:
    price = stats.prices(result, by)
    yield Quantity("price of cached keys and values", price.price, price.error)


def _windows(result: xr.Dataset, by: Parts) -> Iterator[Quantity]:
    price = stats.window_prices(result, by)
    yield Quantity("price of a window", price.price, price.error)


def _share(result: xr.Dataset, name: str, shares: xr.Dataset) -> Quantity:
    weak = (shares.error > stats.MAX_ERROR) | _weak_heads(result, shares.share)
    return Quantity(name, shares.share, shares.error, weak)


def _weak_heads(result: xr.Dataset, values: xr.DataArray) -> xr.DataArray | bool:
    """Return which heads are weak, for numbers by head; for keys and values those of `written` are meant."""
    if "head" not in values.dims:
        return False
    weak = stats.weak_heads(result, str(values.coords.get("reader_of", xr.DataArray("all")).values))
    return weak.sel(stream=values.written).drop_vars("stream") if "written" in values.dims else weak


# ---- the quantities of an audit, of compared runs, of an eviction and of features


def _audit(audit: xr.Dataset, by: Parts) -> Iterator[Quantity]:
    for index, measure in enumerate(audit.measure.values):
        figure = audit.isel(measure=index, drop=True)
        clause = int(audit.of_clause[index])
        labels = {"clause": clause, "verdict": audit.verdict.sel(clause=clause, drop=True)}
        value = figure.figure.assign_coords(labels).assign_attrs(units=str(figure.units_of.values))
        yield Quantity(str(measure), value, figure.error, baseline=figure.baseline)


def _comparison(comparison: xr.Dataset, by: Parts) -> Iterator[Quantity]:
    gaps = myopia_gaps(comparison).set_coords("seeds")
    units = comparison.loss.attrs["units"]
    names = {"loss": "held-out loss", "gap": "myopia gap", "gap_by_position": "myopia gap by position"}
    for variable, name in names.items():
        yield Quantity(name, gaps[variable].assign_attrs(units=units), gaps[f"{variable}_error"])


def _eviction(eviction: xr.Dataset, by: Parts) -> Iterator[Quantity]:
    names = {"divergence": "divergence", "loss_change": "loss change", "correlation": "rank correlation with prices"}
    for variable, name in names.items():
        values = eviction[variable]
        mean, error = mean_and_error(values, values.get_axis_num("document"))
        template = values.isel(document=0, drop=True)
        yield Quantity(name, template.copy(data=mean), template.copy(data=error))


def _features(features: xr.Dataset, by: Parts) -> Iterator[Quantity]:
    shares = part_shares(features)
    yield Quantity("share of the gradient of the parameters", shares.share, shares.error)
    yield Quantity("cosine between direct and pre-cached part", shares.cosine, shares.cosine_error)
    if "pull" not in features:
        return
    pulls = direction_pulls(features)
    names = {
        "later_share": "share of later losses in the squared pull", "cosine": "cosine between own and later pull",
        "own": "pull of own losses", "later": "pull of later losses", "influence": "change by a step along the part",
    }  # fmt: skip
    for variable, name in names.items():
        if variable in pulls:
            yield Quantity(name, pulls[variable], pulls[f"{variable}_error"])


TABLES = {
    "shares": TableKind(_shares, ("layer", "head")),
    "profile": TableKind(_profile, ("layer",)),
    "reach": TableKind(_reach, ("layer", "kv_head")),
    "sinks": TableKind(_sinks, ("layer", "head")),
    "losses": TableKind(_losses, ("layer", "head")),
    "horizons": TableKind(_horizons, ("layer", "head")),
    "weights": TableKind(_weights, ("layer",)),
    "prices": TableKind(_prices, ("layer", "kv_head")),
    "windows": TableKind(_windows, ("layer",)),
    "audit": TableKind(_audit, source=AUDIT),
    "comparison": TableKind(_comparison, source=COMPARISON),
    "eviction": TableKind(_eviction, source=EVICTION),
    "features": TableKind(_features, source=FEATURES),
}
