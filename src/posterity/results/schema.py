"""The Dataset of a result: its schema (every variable's dimensions, units and long name), construction, validation.

A result holds sums and counts only; ratios are formed in `posterity.stats`, once.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from posterity.axes import (
    LOSS_TERMS,
    MOMENTS,
    PAIRS,
    PARTS,
    QUANTITIES,
    READER_LEVELS,
    READER_OF,
    READER_QUANTITIES,
    SIDES,
    STREAMS,
    TERMS,
    WRITTEN,
)
from posterity.results.kind import Kind
from posterity.results.netcdf import portable_value

SCHEMA_VERSION = 2
UNSPLIT = ("all",)  # labels of `reader_of` in a result of version 1, which does not tell first keys apart
TIDY = "posterity.table(result, kind); result.to_dataframe() would hold every combination of labels"  # in the repr
AXIS_LABELS = {
    "stream": STREAMS,
    "reader_of": READER_OF,
    "quantity": QUANTITIES,
    "moment": MOMENTS,
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
    "kv_head": Entry(("layer", "head"), "1", "key/value head of a query head, -1 for none", "int", required=False),
    "group": Entry(("group",), "1", "key/value head", "int", required=False),
    "stream": Entry(("stream",), "", "whose gradient is accounted", "str"),
    "lag": Entry(("lag",), "tokens", "lag, first of the bin", "int"),
    "lag_end": Entry(("lag",), "tokens", "lag, last of the bin", "int"),
    "side": Entry(("side",), "", "self edge or all other edges", "str"),
    "reader_of": Entry(("reader_of",), "", "edges into the first keys of a document, and all others", "str"),
    "quantity": Entry(("quantity",), "", "what lies at a lag", "str", required=False),
    "moment": Entry(("moment",), "", "second moment of a tail, with what", "str", required=False),
    "position": Entry(("position",), "tokens", "position in the window, first of the bin", "int"),
    "position_end": Entry(("position",), "tokens", "position in the window, last of the bin", "int"),
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
    "window": Entry(("window",), "tokens", "positions that a query sees, its own included", "int", required=False),
    "token": Entry(("position",), "", "token at this position", "str", required=False),
    "step": Entry(("step",), "steps", "training step of the model", "int", required=False),
}
_HEADS = ("layer", "head", "stream")
SCHEMA = {
    "credit": Entry((*_HEADS, "reader_of", "lag"), "nats^2", "credit of the edges of a lag"),
    "mass": Entry((*_HEADS, "reader_of", "lag"), "nats", "sum of the norms of the terms of a lag"),
    "attention": Entry(("layer", "head", "reader_of", "lag"), "1", "sum of the attention weights of a lag"),
    "edges": Entry(("layer", "reader_of", "lag"), "1", "number of edges per head", "int"),
    "credit_by_position": Entry((*_HEADS, "side", "position"), "nats^2", "credit by position of key or query"),
    "attention_first": Entry(("layer", "head"), "1", "sum of the attention weights on the first key"),
    "credit_by_document": Entry(("document", *_HEADS, "reader_of", "side"), "nats^2", "credit of one window"),
    "first_by_document": Entry(("document", *_HEADS), "nats^2", "credit of the first position of one window"),
    "profile_by_document": Entry(
        ("document", "layer", "stream", "reader_of", "lag"), "nats^2", "credit of one window, all heads"
    ),
    "mass_by_document": Entry(
        ("document", "layer", "stream", "reader_of", "lag"), "nats", "mass of one window, all heads", required=False
    ),
    "attention_by_document": Entry(
        ("document", "layer", "reader_of", "lag"), "1", "attention of one window, all heads", required=False
    ),
    "tail_moment": Entry(
        ("layer", "group", "quantity", "moment", "lag"), "squared units of the quantity",
        "second moment of a lag and all beyond", required=False,
    ),
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
        ("document", "layer", "head", "written", "reader_of", "part"), "nats^2", "credit of one window by who pays",
        required=False,
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
        ("document", *_HEADS, "reader_of", "horizon"), "nats^2", "credit of one window under a discount",
        required=False,
    ),
    "price": Entry(("layer", "group", "position"), "nats", "price of cached keys and values", required=False),
    "price_by_document": Entry(
        ("document", "layer", "group"), "nats", "price of the keys and values of one window of text", required=False
    ),
    "window_price": Entry(("layer", "head", "window"), "nats", "price of a window for one head", required=False),
    "window_price_by_document": Entry(
        ("document", "layer", "window"), "nats", "price of a window for a layer, one window of text", required=False
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
    ("mass_by_document", "attention_by_document", "tail_moment", "kv_head", "group"),
    ("weight_by_document", "weight_mean"),
    ("adapter_by_document", "adapter_mean"),
    ("loss_credit", "loss_gram", "loss_credit_by_document", "hidden", "hidden_by_document"),
    ("price", "price_by_document"),
    ("window_price", "window_price_by_document", "window"),
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
    position: Sequence[int] | np.ndarray,
    position_end: Sequence[int] | np.ndarray,
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
        position: First position of each bin.
        position_end: Last position of each bin, inclusive.
        texts: For each window the name of the text it came from.
        attrs: Provenance; None becomes "".
        coordinates: Those that only some results have: `kv_head`, `adapter`, `parameter`, `horizon`, `token`.
    """
    head = np.shape(variables["credit"])[1]
    groups = np.shape(variables["tail_moment"])[1] if "tail_moment" in variables else 0
    values = {
        **{name: np.array(labels) for name, labels in AXIS_LABELS.items()}, **coordinates,
        "loss_position": np.asarray(position), "group": np.arange(groups),
        "layer": np.arange(len(modules)), "module": _texts(modules), "head": np.arange(head),
        "lag": np.asarray(lag), "lag_end": np.asarray(lag_end),
        "position": np.asarray(position), "position_end": np.asarray(position_end),
        "document": np.arange(len(texts)), "text": _texts(texts),
    }  # fmt: skip
    assert set(variables) <= set(SCHEMA), set(variables) - set(SCHEMA)
    data = {name: _variable(SCHEMA[name], variables[name]) for name in SCHEMA if name in variables}
    used = {dim for name in data for dim in SCHEMA[name].dims}
    coords = {
        name: _variable(entry, values[name])
        for name, entry in COORDINATES.items()
        if entry.required or (name in values and (name in used or name in ("token", "kv_head")))
    }
    provenance = {name: portable_value(value) for name, value in attrs.items()}
    result = xr.Dataset(data, coords, {"tidy": TIDY, **provenance, "schema_version": SCHEMA_VERSION})
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
        if name == "reader_of" and tuple(result[name].values) == UNSPLIT:
            continue
        if name in result.variables and tuple(result[name].values) != labels:
            return f"the labels of {name!r} are {list(map(str, result[name].values))} where {list(labels)} belong"
    for name in ("layer", "head", "group", "document"):
        if name in result.variables and not np.array_equal(result[name], np.arange(result.sizes[name])):
            return f"{name!r} does not count from 0 to {result.sizes[name] - 1}"
    if "loss_position" in result and not np.array_equal(result["loss_position"], result["position"]):
        return "its positions of losses are not its positions"
    for name in ("horizon", "window"):
        sizes = result[name].values if name in result else np.array([1])
        if (sizes < 1).any() or (np.diff(sizes) <= 0).any():
            return f"its {name}s do not begin at 1 or more and grow"
    if "step" in result.dims and ((result.step < 0).any() or (np.diff(result.step) <= 0).any()):
        return "its steps do not begin at 0 or more and grow"
    for name in ("lag", "position"):
        first, last = result[name].values, result[f"{name}_end"].values
        if first[0] != 0 or last[0] != 0 or (last < first).any() or not np.array_equal(first[1:], last[:-1] + 1):
            return f"its {name}s do not begin with {name} 0 alone and go on without a gap"
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


def _upgrade(result: xr.Dataset) -> xr.Dataset:
    """Give a file of version 1, which has no `reader_of`, that axis with a single label; other Datasets as they are."""
    if portable_value(result.attrs.get("schema_version")) != 1:
        return result
    variables = dict(result.variables)
    for name, entry in SCHEMA.items():
        if "reader_of" in entry.dims and name in variables:
            variable, dims = variables[name], ("step", *entry.dims) if "step" in result.dims else entry.dims
            axis = dims.index("reader_of")
            if variable.dims == (*dims[:axis], *dims[axis + 1 :]):
                variables[name] = xr.Variable(dims, np.expand_dims(variable.values, axis), variable.attrs)
    variables["reader_of"] = xr.Variable("reader_of", _texts(UNSPLIT))
    if "position" in variables and variables["position"].dims == ("position",):
        variables["position_end"] = variables["position"].copy()
    coords = {name: variables.pop(name) for name in (*result.coords, "reader_of", "position_end") if name in variables}
    return xr.Dataset(variables, coords, {**result.attrs, "schema_version": SCHEMA_VERSION})


RESULT = Kind(
    name="",
    expected="a result as posterity.measure returns it",
    advice="pass that Dataset unchanged",
    expected_file="a result file of posterity",
    file_advice="run `posterity measure` again, or read it with the version that wrote it",
    find_flaw=_flaw,
    upgrade=_upgrade,
    restore=_restore,
)
