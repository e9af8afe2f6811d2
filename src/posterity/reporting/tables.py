"""The numbers of each chart as tables of text."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import xarray as xr

from posterity.axes import STREAMS, WRITTEN
from posterity.reporting.bins import bin_names, position_bins, sum_positions
from posterity.reporting.module_kinds import shares_by_kind
from posterity.reporting.price_charts import known_window_prices, price_by_position
from posterity.reporting.result_table import LOSS_PARTS
from posterity.reporting.result_words import edges_title, edges_words
from posterity.results import stats
from posterity.results.formatting import UNKNOWN, decimals, horizon_text, number_text, percent, value_with_error
from posterity.results.steps import latest_step

ROUNDING = 1e-5  # of the largest part: the direction of a smaller one is rounding


@dataclass(frozen=True)
class NumberTable:
    """A table with its caption; a row is its label, more words on the label ("" for none), and the cells.

    `reader_of` names the edges that the numbers are of; "" for numbers that are the same whatever edges a page shows.
    """

    caption: str
    head: tuple[str, ...]
    rows: list[tuple[str, str, list[str]]]
    reader_of: str = ""


def chart_tables(result: xr.Dataset, readers: Sequence[str]) -> dict[str, list[NumberTable]]:
    """Return tables by the name of the chart they belong to; none for what was not measured.

    Args:
        result: A result of `posterity.measure`.
        readers: The edges that the page shows, by their key.
    """
    over_steps, result = result, latest_step(result)
    tables = {"layers": [_self_shares(result, reader) for reader in readers]}
    if "step" in over_steps.dims:
        tables["training"] = [_training(over_steps)]
        if "loss_credit" in result:
            tables["training_own"] = [_training_own(over_steps)]
            tables["training_angle"] = [_training_angle(over_steps)]
    if "loss_credit" in result:
        tables["loss_parts"] = [_loss_parts(result, written, reader) for reader in readers for written in WRITTEN]
        tables["inputs"] = [_inputs(result)]
        tables["loss_positions"] = [_loss_positions(result)]
    if "window_price_by_document" in result:
        tables["window_prices"] = [_window_prices(result)]
    if "price_by_document" in result:
        tables["pair_prices"] = [_pair_prices(result)]
        tables["price_positions"] = [_price_positions(result)]
    if "adapter_mean" in result:
        tables["adapters"] = [_adapters(result)]
    if "parameter_by_document" in result:
        tables |= _modules(result)
    if "horizon_by_document" in result:
        tables["horizons"] = [_curves(result, stream, reader) for reader in readers for stream in STREAMS]
    return tables


def _self_shares(result: xr.Dataset, reader: str) -> NumberTable:
    rows = _by_layer(result, _percents(result, stats.shares(result, ("layer",), reader).sel(side="self")))
    return NumberTable(edges_title("Self share by layer", result, reader), ("layer", *STREAMS), rows, reader)


def _adapters(result: xr.Dataset) -> NumberTable:
    """Return the self share in the gradient of each parameter of an adapter, beside the size of that gradient."""
    shares = stats.adapter_shares(result, ("adapter",))
    terms = result.adapter_by_document.mean("document")
    norm = (terms.sel(term="self") + terms.sel(term="other") + 2 * terms.sel(term="inner")).clip(min=0) ** 0.5
    columns = [
        _percents(result, shares),
        format_cells(percent, shares.share_mean.values),
        format_cells(number_text, shares.agreement.sel(part="whole").values),
        format_cells(value_with_error, norm.values),
    ]
    rows = [
        (str(name), "", row) for name, row in zip(result.adapter.values, np.stack(columns, -1).tolist(), strict=True)
    ]
    head = ("parameter", "self share, one window", "in the mean", "agreement of windows", "norm, nats")
    return NumberTable("Gradient of the adapters", head, rows)


def _training(result: xr.Dataset) -> NumberTable:
    shares = stats.shares(result).sel(side="self")
    return NumberTable("Self share by training step", ("step", *STREAMS), _by_step(result, _percents(result, shares)))


def _training_own(result: xr.Dataset) -> NumberTable:
    rows = _by_step(result, _percents(result, stats.loss_shares(result).sel(part="own")))
    return NumberTable("Share of the own loss by training step", ("step", *WRITTEN), rows)


def _training_angle(result: xr.Dataset) -> NumberTable:
    angles = stats.angles(result)
    columns = {"inputs of all layers": angles.hidden}
    if "parameters" in angles:
        columns["all parameters"] = angles.parameters
    columns |= {f"input of layer {layer}": angles.layer_hidden.sel(layer=layer) for layer in result.layer.values}
    cells = np.stack([format_cells(_degrees, column.values) for column in columns.values()], -1)
    caption = "Angle between own and later losses by training step"
    return NumberTable(caption, ("step", *columns), _by_step(result, cells))


def _by_step(result: xr.Dataset, cells: np.ndarray) -> list[tuple[str, str, list[str]]]:
    return [(str(step), "", row) for step, row in zip(result.step.values, cells.tolist(), strict=True)]


def _loss_parts(result: xr.Dataset, written: str, reader: str) -> NumberTable:
    """Return the three parts and the cosines between them, for the model and by layer."""
    rows = []
    pairs = []
    for by in ((), ("layer",)):
        shares = stats.loss_shares(result, by, reader).sel(written=written)
        parts = stats.loss_parts(result, by).sel(written=written)
        small = parts.norm < ROUNDING * parts.norm.max("part")
        pairs = parts.pair.values.tolist()
        cosines = [
            parts.cosine.sel(pair=pair, drop=True).where(~small.sel(part=pair.split(" . ")).any("part"))
            for pair in pairs
        ]
        cosine_cells = format_cells(_two_decimals, np.stack(cosines, -1))
        rows += np.atleast_2d(np.concatenate([_percents(result, shares), cosine_cells], -1)).tolist()
    head = ("layer", *LOSS_PARTS.values(), *(f"cos({pair.replace(' . ', ', ')})" for pair in pairs))
    cosines_of = "; cosines over all positions" if edges_words(result, reader) and reader == "rest" else ""
    caption = f"{edges_title(f'Who pays for the {written}s', result, reader)}{cosines_of}"
    return NumberTable(caption, head, [("all", "", rows[0]), *_by_layer(result, rows[1:])], reader)


def _inputs(result: xr.Dataset) -> NumberTable:
    hidden = stats.hidden_shares(result)
    cells = zip(_percents(result, hidden), map(_two_decimals, hidden.cosine.values), strict=True)
    head = ("layer", "own loss", "cos(own, later)")
    return NumberTable("The residual stream at the layers' inputs", head, _by_layer(result, map(list, cells)))


def _loss_positions(result: xr.Dataset) -> NumberTable:
    """Return the share of the whole credit in each bin of positions."""
    share = stats.loss_shares_by_position(result).transpose("position", "written", "part")
    first, last = position_bins(result)
    binned = sum_positions(share.values, result, axis=0)
    own_and_later = np.stack([binned[..., 0], binned[..., 1] + binned[..., 2]], -1).reshape(len(first), -1)
    head = ("position", *(f"{written}, {loss}" for written in WRITTEN for loss in ("own", "later")))
    names = bin_names(first, last)
    rows = [(name, "", [percent(cell) for cell in row]) for name, row in zip(names, own_and_later, strict=True)]
    return NumberTable("Share of the whole credit by position", head, rows)


def _window_prices(result: xr.Dataset) -> NumberTable:
    prices = known_window_prices(result)
    head = ("layer", *(f"{size:,}" for size in prices.window.values))
    return NumberTable("Price of a window, nats per token", head, _by_layer(result, _price_cells(result, prices)))


def _pair_prices(result: xr.Dataset) -> NumberTable:
    """Return the prices of each layer and of each of its key/value heads."""
    layers, heads = (_price_cells(result, stats.prices(result, by)) for by in (("layer",), ("layer", "kv_head")))
    rows = _by_layer(result, np.concatenate([layers[:, None], heads], 1).tolist())
    head = ("layer", "all heads", *(f"head {number}" for number in range(heads.shape[1])))
    return NumberTable("Price of cached keys and values, nats per token", head, rows)


def _price_positions(result: xr.Dataset) -> NumberTable:
    names, shares = bin_names(*position_bins(result)), price_by_position(result)
    rows = [(name, "", [percent(float(share))]) for name, share in zip(names, shares, strict=True)]
    return NumberTable("Share of all prices by position", ("position", "share"), rows)


def _price_cells(result: xr.Dataset, prices: xr.Dataset) -> np.ndarray:
    windows = result.sizes["document"]
    return format_cells(partial(value_with_error, windows=windows), prices.price.values, prices.error.values)


def _modules(result: xr.Dataset) -> dict[str, list[NumberTable]]:
    places, shares = shares_by_kind(result)
    share = dict(zip(places, _percents(result, shares), strict=True))
    cosine = dict(zip(places, shares.cosine.values, strict=True))
    kinds = list(dict.fromkeys(kind for kind, layer in places if layer is not None))
    layers = sorted({layer for _, layer in places if layer is not None})
    columns = {
        "Own share": share.get,
        "Cosine between own and later": lambda place: _two_decimals(cosine.get(place, np.nan)),
    }
    by_layer = [
        NumberTable(
            caption, ("layer", *kinds),
            [(str(layer), "", [cell((kind, layer)) or UNKNOWN for kind in kinds]) for layer in layers],
        )
        for caption, cell in columns.items()
    ]  # fmt: skip
    rest = [
        (kind, "", [share[kind, None], _two_decimals(cosine[kind, None])]) for kind, layer in places if layer is None
    ]
    head = ("module", "own loss", "cos(own, later)")
    rest_table = [NumberTable("Parameters of modules in no layer", head, rest)]
    return ({"modules": by_layer} if kinds else {}) | ({"rest": rest_table} if rest else {})


def _curves(result: xr.Dataset, stream: str, reader: str) -> NumberTable:
    """Return where the horizon curve reaches one half, and the curve, for the model and by layer."""
    rows = []
    for by in ((), ("layer",)):
        curve = _percents(result, stats.horizon_curve(result, by, reader).sel(stream=stream))
        reach = _lengths(result, stats.effective_horizon(result, by, reader).sel(stream=stream))
        rows += np.atleast_2d(np.concatenate([reach[..., None], curve], -1)).tolist()
    head = ("layer", "effective horizon", *(f"h = {horizon}" for horizon in result.horizon.values))
    caption = edges_title(f"Credit that remains, {stream}", result, reader)
    return NumberTable(caption, head, [("all", "", rows[0]), *_by_layer(result, rows[1:])], reader)


def _by_layer(result: xr.Dataset, cells: Iterable[list[str]]) -> list[tuple[str, str, list[str]]]:
    rows = zip(result.module.values, cells, strict=True)
    return [(str(layer), str(module), row) for layer, (module, row) in enumerate(rows)]


def _percents(result: xr.Dataset, shares: xr.Dataset) -> np.ndarray:
    windows = result.sizes["document"]
    return format_cells(partial(percent, windows=windows), shares.share.values, shares.error.values)


def _lengths(result: xr.Dataset, reach: xr.DataArray) -> np.ndarray:
    ends = int(result.horizon[0]), int(result.horizon[-1])
    return format_cells(lambda length: horizon_text(length, *ends), reach.values)


def format_cells(format_number: Callable[..., str], *numbers: np.ndarray) -> np.ndarray:
    """Format the numbers of arrays of one shape, element by element, as an array of texts."""
    cells = [format_number(*row) for row in zip(*(array.ravel().tolist() for array in numbers), strict=True)]
    return np.array(cells, dtype=object).reshape(numbers[0].shape)


def _degrees(value: float) -> str:
    return UNKNOWN if np.isnan(value) else f"{value:.1f}°"


def _two_decimals(value: float) -> str:
    return UNKNOWN if np.isnan(value) else decimals(value, 2)
