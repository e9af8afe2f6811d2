"""The Dataset of a result: its schema (every variable's dimensions, units and long name), construction, validation.

A result holds sums and counts only; ratios are formed in `posterity.stats`, once.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from posterity.axes import (
    LOSS_TERMS,
    PAIRS,
    PARTS,
    READER_LEVELS,
    READER_QUANTITIES,
    SIDES,
    STREAMS,
    TERMS,
    WRITTEN,
)
from posterity.results.kind import Kind
from posterity.results.netcdf import portable_value

SCHEMA_VERSION = 1
AXIS_LABELS = {
    "stream": STREAMS,
    "side": SIDES,
    "term": TERMS,
    "written": WRITTEN,
    "part": PARTS,
    "pair": PAIRS,
    "loss_term": LOSS_TERMS,
    "reader_quantity": READER_QUANTITIES,
    "level": READER_LEVELS,
}


@dataclass(frozen=True)
class Entry:
    """One variable of the schema."""

    dims: tuple[str, ...]
    units: str
    long_name: str
    kind: str = "float"  # "float" (float64), "int" (int64) or "str"
    required: bool = True


COORDINATES = {
    "layer": Entry(("layer",), "1", "attention layer", "int"),
    "module": Entry(("layer",), "", "name of the attention module", "str"),
    "head": Entry(("head",), "1", "query head", "int"),
    "stream": Entry(("stream",), "", "whose gradient is accounted", "str"),
    "lag": Entry(("lag",), "tokens", "lag, first of the bin", "int"),
    "lag_end": Entry(("lag",), "tokens", "lag, last of the bin", "int"),
    "side": Entry(("side",), "", "self edge or all other edges", "str"),
    "position": Entry(("position",), "tokens", "position in the window", "int"),
    "document": Entry(("document",), "1", "window of text", "int"),
    "text": Entry(("document",), "", "where the window came from", "str"),
    "term": Entry(("term",), "", "term of a squared norm", "str"),
    "written": Entry(("written",), "", "what a position writes: key or value", "str", required=False),
    "part": Entry(("part",), "", "which loss pays, through which edge", "str", required=False),
    "pair": Entry(("pair",), "", "squared norm of a part, or inner product of two", "str", required=False),
    "loss_term": Entry(("loss_term",), "", "term of a squared norm: own loss, later losses", "str", required=False),
    "parameter": Entry(("parameter",), "", "module whose parameters are meant", "str", required=False),
    "adapter": Entry(("adapter",), "", "parameter of an adapter", "str", required=False),
    "horizon": Entry(("horizon",), "tokens", "horizon h of the discount rate 1 - 1/h", "int", required=False),
    "loss_position": Entry(("loss_position",), "tokens", "position of the loss", "int", required=False),
    "reader_quantity": Entry(("reader_quantity",), "", "what a token's readers take from it", "str", required=False),
    "level": Entry(("level",), "1", "part of it, nearest readers first", required=False),
    "token": Entry(("position",), "", "token at this position", "str", required=False),
    "step": Entry(("step",), "steps", "training step of the model", "int", required=False),
}
_HEADS = ("layer", "head", "stream")
SCHEMA = {
    "credit": Entry((*_HEADS, "lag"), "nats^2", "credit of the edges of a lag"),
    "mass": Entry((*_HEADS, "lag"), "nats", "sum of the norms of the terms of a lag"),
    "attention": Entry(("layer", "head", "lag"), "1", "sum of the attention weights of a lag"),
    "edges": Entry(("layer", "lag"), "1", "number of edges per head", "int"),
    "credit_by_position": Entry((*_HEADS, "side", "position"), "nats^2", "credit by position of key or query"),
    "attention_first": Entry(("layer", "head"), "1", "sum of the attention weights on the first key"),
    "credit_by_document": Entry(("document", *_HEADS, "side"), "nats^2", "credit of one window"),
    "first_by_document": Entry(("document", *_HEADS), "nats^2", "credit of the first position of one window"),
    "profile_by_document": Entry(("document", "layer", "stream", "lag"), "nats^2", "credit of one window, all heads"),
    "loss": Entry(("document",), "nats", "mean loss of a token"),
    "tokens": Entry(("document",), "tokens", "number of losses", "int"),
    "weight_by_document": Entry(
        ("document", "layer", "stream", "term"), "nats^2", "weight gradient of one window, squared norm", required=False
    ),
    "weight_mean": Entry(
        ("layer", "stream", "term"), "nats^2", "mean weight gradient, squared norm", required=False
    ),
    "adapter_by_document": Entry(
        ("document", "adapter", "term"), "nats^2", "gradient of an adapter, one window, squared norm", required=False
    ),
    "adapter_mean": Entry(("adapter", "term"), "nats^2", "mean gradient of an adapter, squared norm", required=False),
    "loss_credit": Entry(
        ("layer", "head", "written", "part", "position"), "nats^2", "credit by who pays", required=False
    ),
    "loss_gram": Entry(
        ("layer", "head", "written", "pair", "position"), "nats^2", "inner products of the parts", required=False
    ),
    "loss_credit_by_document": Entry(
        ("document", "layer", "head", "written", "part"), "nats^2", "credit of one window by who pays", required=False
    ),
    "hidden": Entry(
        ("layer", "loss_term", "position"), "nats^2", "gradient of the layer's input, squared norm", required=False
    ),
    "hidden_by_document": Entry(
        ("document", "layer", "loss_term"), "nats^2", "gradient of the layer's input, one window", required=False
    ),
    "parameter_by_document": Entry(
        ("document", "parameter", "loss_term"), "nats^2", "gradient of a module's parameters", required=False
    ),
    "horizon_by_document": Entry(
        ("document", *_HEADS, "horizon"), "nats^2", "credit of one window under a discount", required=False
    ),
    "inspect_credit": Entry(
        ("layer", "written", "loss_position", "position"), "nats^2", "credit of one loss", required=False
    ),
    "inspect_norm": Entry(
        ("layer", "written", "loss_position", "position"), "nats", "norm of the gradient of one loss", required=False
    ),
    "reader_lag": Entry(
        ("layer", "reader_quantity", "level", "position"), "tokens", "lag of the readers of a part", required=False
    ),
    "reader_lag_all": Entry(
        ("reader_quantity", "level", "position"), "tokens", "lag of the readers of a part, all layers", required=False
    ),
}  # fmt: skip
GROUPS = (  # optional variables that a result has all of, or none
    ("weight_by_document", "weight_mean"),
    ("adapter_by_document", "adapter_mean"),
    ("loss_credit", "loss_gram", "loss_credit_by_document", "hidden", "hidden_by_document"),
    ("inspect_credit", "inspect_norm", "token"),
    ("reader_lag", "reader_lag_all"),
)
_DTYPES = {"float": np.dtype("float64"), "int": np.dtype("int64")}


def build_result(
    variables: Mapping[str, np.ndarray],
    *,
    modules: Sequence[str],
    lag: Sequence[int] | np.ndarray,
    lag_end: Sequence[int] | np.ndarray,
    texts: Sequence[str],
    attrs: Mapping[str, object],
    **coordinates: Sequence[object] | np.ndarray,
) -> xr.Dataset:
    """Build a result from its sums. A wrong shape or name is a bug of the caller.

    Args:
        variables: Arrays by the names of `SCHEMA`, of its dimensions and units.
        modules: Name of each attention layer, in order.
        lag: First lag of each bin; the first bin is lag 0 alone.
        lag_end: Last lag of each bin, inclusive.
        texts: For each window the name of the text it came from.
        attrs: Provenance; None becomes "".
        coordinates: Those that only some results have: `adapter`, `parameter`, `horizon`, `token`.
    """
    head, position = np.shape(variables["credit"])[1], np.shape(variables["credit_by_position"])[-1]
    values = {
        **{name: np.array(labels) for name, labels in AXIS_LABELS.items()}, **coordinates,
        "loss_position": np.arange(position),
        "layer": np.arange(len(modules)), "module": _texts(modules), "head": np.arange(head),
        "lag": np.asarray(lag), "lag_end": np.asarray(lag_end), "position": np.arange(position),
        "document": np.arange(len(texts)), "text": _texts(texts),
    }  # fmt: skip
    assert set(variables) <= set(SCHEMA), set(variables) - set(SCHEMA)
    data = {name: _variable(SCHEMA[name], variables[name]) for name in SCHEMA if name in variables}
    used = {dim for name in data for dim in SCHEMA[name].dims}
    coords = {
        name: _variable(entry, values[name])
        for name, entry in COORDINATES.items()
        if entry.required or (name in values and (name in used or name == "token"))
    }
    provenance = {name: portable_value(value) for name, value in attrs.items()}
    result = xr.Dataset(data, coords, {**provenance, "schema_version": SCHEMA_VERSION})
    flaw = _flaw(result)
    assert flaw is None, flaw
    return result


def extend_result(
    result: xr.Dataset, variables: Mapping[str, np.ndarray], **coordinates: Sequence[object] | np.ndarray
) -> xr.Dataset:
    """Add variables of the schema, and their coordinates, to a result."""
    values = {**AXIS_LABELS, "loss_position": result.position.values, **coordinates}
    used = {dim for name in variables for dim in SCHEMA[name].dims} | set(coordinates)
    data = {name: _variable(SCHEMA[name], array) for name, array in variables.items()}
    coords = {name: _variable(COORDINATES[name], np.asarray(array)) for name, array in values.items() if name in used}
    return RESULT.check(result.assign(data).assign_coords(coords))


def _flaw(result: xr.Dataset) -> str | None:
    """Return the first flaw as half a sentence; None if there is none."""
    return _flaw_of_form(result) or _flaw_of_values(result)


def _flaw_of_form(result: xr.Dataset) -> str | None:
    """Return the first flaw of names, dimensions and dtypes."""
    version = portable_value(result.attrs.get("schema_version"))
    if version != SCHEMA_VERSION:
        return f"its schema version is {version!r} and this is posterity for version {SCHEMA_VERSION}"
    for name, entry in {**COORDINATES, **SCHEMA}.items():
        if name not in result.variables:
            if entry.required:
                return f"it has no {name!r}"
            continue
        variable = result.variables[name]
        dims = ("step", *entry.dims) if "step" in result.dims and name in SCHEMA else entry.dims
        if variable.dims != dims:
            return f"{name!r} has the dimensions {variable.dims} where {dims} belong"
        if entry.kind == "str" and variable.dtype.kind not in "UO":
            return f"{name!r} holds {variable.dtype} where text belongs"
        if entry.kind != "str" and variable.dtype.newbyteorder("=") != _DTYPES[entry.kind]:
            return f"{name!r} holds {variable.dtype} where {_DTYPES[entry.kind]} belongs"
        missing_dim = next((dim for dim in dims if dim not in result.variables), None)
        if missing_dim is not None:
            return f"{name!r} has no coordinate {missing_dim!r}"
    for group in GROUPS:
        missing = [name for name in group if name not in result.variables]
        if 0 < len(missing) < len(group):
            return f"it has no {missing[0]!r}"
    unknown = set(result.variables) - set(SCHEMA) - set(COORDINATES)
    if unknown:
        return f"it holds {sorted(map(str, unknown))}, which no result has"
    return f"its dimensions {dict(result.sizes)} hold nothing" if 0 in result.sizes.values() else None


def _flaw_of_values(result: xr.Dataset) -> str | None:
    """Return the first flaw of the values."""
    for name, labels in AXIS_LABELS.items():
        if name in result.variables and tuple(result[name].values) != labels:
            return f"the labels of {name!r} are {list(map(str, result[name].values))} where {list(labels)} belong"
    for name in ("layer", "head", "position", "document", "loss_position"):
        if name in result.variables and not np.array_equal(result[name], np.arange(result.sizes[name])):
            return f"{name!r} does not count from 0 to {result.sizes[name] - 1}"
    horizon = result["horizon"].values if "horizon" in result else np.array([1])
    if (horizon < 1).any() or (np.diff(horizon) <= 0).any():
        return "its horizons do not begin at 1 or more and grow"
    if "step" in result.dims and ((result.step < 0).any() or (np.diff(result.step) <= 0).any()):
        return "its steps do not begin at 0 or more and grow"
    lag, lag_end = result["lag"].values, result["lag_end"].values
    if lag[0] != 0 or lag_end[0] != 0 or (lag_end < lag).any() or not np.array_equal(lag[1:], lag_end[:-1] + 1):
        return "its lags do not begin with lag 0 alone and go on without a gap"
    for name, entry in SCHEMA.items():
        if name in result and entry.kind == "float" and np.isinf(result[name].values).any():
            return f"{name!r} holds an infinite number"
        if name in result and entry.kind == "int" and (result[name].values < 0).any():
            return f"{name!r} holds a negative number"
    return None


def _variable(entry: Entry, values: object, dims: Sequence[Hashable] | None = None) -> xr.Variable:
    array = np.asarray(values)
    if entry.kind == "str":
        array = _texts(array)
    else:
        assert array.dtype.kind in ("iu" if entry.kind == "int" else "iuf"), (entry.long_name, array.dtype)
        array = array.astype(_DTYPES[entry.kind])
    dims = entry.dims if dims is None else dims
    assert array.ndim == len(dims), (entry.long_name, array.shape)
    units = {"units": entry.units} if entry.units else {}
    return xr.Variable(dims, array, {**units, "long_name": entry.long_name})


def _texts(values: Sequence[object] | np.ndarray) -> np.ndarray:
    return np.array([str(portable_value(str(value))) for value in values], dtype=str)


def _restore(result: xr.Dataset) -> xr.Dataset:
    """Give the variables of a file the dtypes, units and long names of the schema."""
    entries = {**SCHEMA, **COORDINATES}
    variables = {
        name: _variable(entries[str(name)], variable.values, variable.dims)
        for name, variable in result.variables.items()
    }
    coords = {name: variables.pop(name) for name in COORDINATES if name in variables}
    return xr.Dataset(variables, coords, result.attrs)


RESULT = Kind(
    name="",
    expected="a result as posterity.measure returns it",
    advice="pass that Dataset unchanged",
    expected_file="a result file of posterity",
    file_advice="run `posterity measure` again, or read it with the version that wrote it",
    find_flaw=_flaw,
    restore=_restore,
)
