"""The ledger of a model: what backward passes add, layer by layer, text by text, and the result made of it."""

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import pad

from posterity.axes import STREAMS
from posterity.decomposition.accumulator import Accumulator, stack_layers
from posterity.decomposition.adapter_gradients import AdapterSplit, merge_passes
from posterity.decomposition.bins import Bins
from posterity.decomposition.credit import EXACT_POSITIONS, check_finite, pass_credit, self_edge_gradients
from posterity.decomposition.edge_sums import sweep_path
from posterity.decomposition.first_keys import SINKS, Spans
from posterity.decomposition.projections import find_projections
from posterity.decomposition.sweep import Scratch
from posterity.decomposition.tail_moments import tail_moments
from posterity.decomposition.weight_gradients import LayerProjections, WeightSplit
from posterity.errors import InputError, NotFiniteError, warn
from posterity.measurement.loss_split import LossSplit
from posterity.measurement.price_account import TEXT, PriceAccount, check_prices, window_sizes
from posterity.measurement.provenance import provenance
from posterity.models.chunked_loss import ChunkedLoss
from posterity.models.watch import Layer, Watch
from posterity.ops.attention import Backward
from posterity.results.schema import build_result


class Ledger:
    """Credit, mass and attention of every layer, summed over documents; `result()` labels the sums."""

    def __init__(
        self,
        model: nn.Module,
        watch: Watch,
        lags: str,
        weights: bool,
        sinks: int = SINKS,
        positions: int = EXACT_POSITIONS,
        prices: str | None = None,
        atomic: bool = False,
    ):
        """Start empty, with the layers in the order of the forward pass; `prices` and `atomic`: see `open_ledger`."""
        self.model, self.watch, self.lags, self.weights, self.atomic = model, watch, lags, weights, atomic
        self.sinks, self.positions = sinks, positions
        self.sums = Accumulator()  # for the whole model: "loss" and "tokens" of each document, if known
        self.left_out = 0  # backward passes with gradients that are not finite
        self.loss_split: LossSplit | None = None
        self._entries = Accumulator() if atomic else self.sums  # of the passes since the last forward pass
        self._not_finite: NotFiniteError | None = None
        self.prices = check_prices(prices)
        self._prices = None if prices is None else PriceAccount(watch, self._entries, sinks, positions)
        self._adapters = AdapterSplit(watch.model, self._entries)
        layers = watch.layers if weights else ()
        self._weights = {layer: WeightSplit(self._entries, str(layer), self._adapters) for layer in layers}
        self._scratch = Scratch()
        self._spans: Spans | None = None

    def split_losses(self, losses: bool, horizons: Sequence[int], parameters: bool) -> LossSplit:
        """Make the loss split of the same documents a part of the ledger."""
        self.loss_split = LossSplit(
            self.model, self.watch, losses, horizons, parameters, self.sums, self.sinks, self.positions
        )
        return self.loss_split

    def observe_forward(self) -> contextlib.AbstractContextManager:
        """Within the block, forward passes can be sent back by `backward`."""
        return contextlib.nullcontext() if self.loss_split is None else self.loss_split.observe_forward()

    def backward(self, loss: ChunkedLoss, spans: Spans | None = None) -> None:
        """Send back one forward pass: once, or as often as the loss split needs.

        `spans`: of the documents packed into each row, whose positions then start again.
        """
        self._spans = spans
        try:
            if self._prices is not None and loss.drawn is not None:
                self._prices.backward(loss.drawn, spans)
            if self.loss_split is None:
                loss.backward()
            else:
                self.loss_split.backward(loss, spans)
            self._adapters.finish_pass()
        finally:
            self._spans = None

    def clear(self) -> None:
        """Forget every document."""
        self.sums.clear()
        self._entries.clear()
        self._adapters.clear()
        self._not_finite, self.left_out = None, 0

    def settle(self) -> None:
        """Enter what has run backward since the last forward pass, or leave it out if a gradient was not finite."""
        if self._not_finite is not None:
            self.left_out += 1
            if self.left_out == 1:
                warn(
                    f"{self._not_finite.quantity} is not finite: this backward pass is left out of the ledger, as a "
                    "GradScaler leaves out its step, and so are later ones like it; the result counts them"
                )
            self._not_finite = None
            self._adapters.clear()
        else:
            self._adapters.finish_pass()
            if self.atomic:
                merge_passes(self.sums, self._entries)
        if self.atomic:
            self._entries.clear()

    def observe(self, layer: Layer, back: Backward, projections: LayerProjections) -> None:
        """Account for one backward pass of one layer."""
        if self._not_finite is not None:
            return
        try:
            self._enter(layer, back, projections)
        except NotFiniteError as error:
            if not self.atomic:
                raise
            self._not_finite = error

    def _enter(self, layer: Layer, back: Backward, projections: LayerProjections) -> None:
        if layer not in self.watch.layers:
            raise InputError(
                f"attention layer {layer} was not called when the model was probed: its calls vary with input"
            )
        self_edge, length = self_edge_gradients(back), back.lse.shape[2]
        bins = Bins.of(self.lags, length)
        credit = pass_credit(back, self_edge, bins, self._scratch, self._spans, self.sinks, self.prices == TEXT)
        by_position = credit.credit_by_position
        check_finite(by_position, f"the gradient of layer {layer}")
        entries, name = self._entries, str(layer)
        if self._prices is not None and credit.prices is not None:
            self._prices.enter(layer, credit.prices, back, self._spans)
        if self.weights:
            self._weights[layer].add(back, self_edge, projections)
            self._check_weights(name, len(back.query))
        totals = {
            "credit": credit.credit,
            "mass": credit.mass,
            "attention": credit.attention,
            "edges": credit.edges,
            "credit_by_position": Bins.of_positions(self.positions, length).sum(by_position),
            "attention_first": credit.attention_first,
        }
        for variable, x in totals.items():
            entries.add((name, variable), x.sum(0))
        by_kernel = sweep_path(back, bins) == "triton"
        entries.add((name, "sweeps"), torch.tensor([by_kernel, not by_kernel]).long())
        entries.add((name, "tail_moment"), tail_moments(credit, back.key.shape[1]))
        entries.append_rows((name, "length"), torch.full((len(by_position),), length))
        entries.append_rows((name, "credit_by_document"), credit.credit_by_side)
        entries.append_rows((name, "first_by_document"), by_position[..., 0].sum(-1))
        entries.append_rows((name, "profile_by_document"), credit.credit.sum(1))
        entries.append_rows((name, "mass_by_document"), credit.mass.sum(1))
        entries.append_rows((name, "attention_by_document"), credit.attention.sum(1))

    def _check_weights(self, layer: str, documents: int) -> None:
        """Raise NotFiniteError unless the gradients of the weights that a layer has are finite."""
        streams = sorted({stream for name, stream, _, _ in self._entries.weight_total if name == layer})
        rows = torch.stack(self._entries.rows[layer, "weight_by_document"][-documents:])
        check_finite(rows[:, streams], f"the gradient of the weights of layer {layer}")

    @property
    def documents(self) -> int:
        """The number of documents accounted for."""
        self.settle()
        return max(self._documents_by_layer().values(), default=0)

    def result(self, texts: list[str] | None = None, **attrs: object) -> xr.Dataset:
        """Label the sums: the schema of `posterity.measure`.

        Args:
            texts: Where each document came from.
            attrs: Provenance to add.

        Raises:
            InputError: No backward pass has been seen, or not by every layer; all gradients are zero.
        """
        self.settle()
        self._check_complete(texts)
        context = max(int(x) for layer in self.watch.layers for x in self.sums.rows[str(layer), "length"])
        bins, positions = Bins.of(self.lags, context), Bins.of_positions(self.positions, context)
        variables = self._layer_variables(len(positions.first), len(bins.first)) | self._document_variables()
        coordinates: dict[str, Sequence[object] | np.ndarray] = {
            "kv_head": self._kv_heads(variables["credit"].shape[1])
        }
        if self.loss_split is not None:
            variables |= self.loss_split.variables()
            coordinates |= self.loss_split.coordinates()
        if self.prices is not None:
            account = PriceAccount(self.watch, self.sums, self.sinks, self.positions)
            variables |= account.variables(len(positions.first), context)
            coordinates["window"] = window_sizes(context)
        ledger_attrs = {
            "context": context,
            "documents": self.documents,
            "lags": self.lags,
            "sinks": self.sinks,
            "prices": self.prices or "",
            "left_out_passes": self.left_out,
            "sweep": self._sweep(),
            "other_paths": "; ".join(self.watch.other_paths),
            "wrong_gradients": "; ".join(self.watch.wrong_gradients),
            "uncut_paths": "; ".join(self.watch.uncut_paths),
        }
        if self.weights:
            coordinates["adapter"] = AdapterSplit(self.watch.model, self.sums).names()
            ledger_attrs["weights_left_out"] = self._packed_weights(variables["weight_mean"])
        return build_result(
            variables,
            modules=[str(layer) for layer in self.watch.layers],
            lag=bins.first,
            lag_end=bins.last,
            position=positions.first,
            position_end=positions.last,
            texts=texts or [""] * self.documents,
            attrs=provenance(self.model) | ledger_attrs | attrs,
            **coordinates,
        )

    def _sweep(self) -> str:
        """Return what summed the edges by lag, where anything did."""
        if not Bins.of(self.lags, 2).needs_sweep:
            return ""
        counts = torch.stack([self.sums.total[str(layer), "sweeps"] for layer in self.watch.layers]).sum(0)
        return " and ".join(name for name, count in zip(("Triton kernels", "blocks"), counts, strict=True) if count)

    def _documents_by_layer(self) -> dict[Layer, int]:
        return {layer: self.sums.count((str(layer), "credit_by_document")) for layer in self.watch.layers}

    def _check_complete(self, texts: list[str] | None) -> None:
        """Raise InputError unless every layer has seen all documents, and each has a text if there are texts."""
        counts, documents = self._documents_by_layer(), self.documents
        if not documents and self.left_out:
            raise InputError(
                f"no backward pass has gradients that are finite ({self.left_out} are left out): check the model, use "
                "float32, or lower the scale of the loss"
            )
        if not documents:
            raise InputError("no backward pass has been seen: call .backward() on a loss inside the `with`")
        for layer, count in counts.items():
            if count < documents:
                seen = f"layer {layer} has seen {count} of {documents} documents"
                if layer in self.watch.without_gradient:
                    raise InputError(
                        f"{seen}: no gradient reaches it, for what it reads requires none (embeddings and layers below "
                        "are frozen): call model.enable_input_require_grads() before the forward pass"
                    )
                raise InputError(f"{seen}: no gradient reaches it (are its inputs detached?)")
        credit = [self.sums.total[str(layer), "credit_by_position"] for layer in counts]
        if not any(bool(x.any()) for x in credit):
            raise InputError(
                "all gradients of queries, keys and values are exactly 0, so nothing can be said of them: check that "
                "the loss depends on the model, and that each of its modules has a backward pass"
            )
        if texts is not None and len(texts) != documents:
            raise InputError(f"expected one text for each of {documents} documents; got {len(texts)}")

    def _kv_heads(self, heads: int) -> np.ndarray:
        """Return the key/value head of each query head, (layer, head); -1 for a head that the layer does not have."""
        numbers = np.full((len(self.watch.layers), heads), -1)
        for row, layer in zip(numbers, map(str, self.watch.layers), strict=True):
            count, groups = len(self.sums.total[layer, "credit"]), len(self.sums.total[layer, "tail_moment"])
            row[:count] = np.arange(count) // (count // groups)
        return numbers

    def _layer_variables(self, positions: int, bins: int) -> dict[str, np.ndarray]:
        """Stack all layers; bins and positions that a layer does not have are zero, heads are NaN."""
        layers, total, rows = [str(layer) for layer in self.watch.layers], self.sums.total, self.sums.rows
        variables = {}
        by_bin = dict.fromkeys(("credit", "mass", "attention", "tail_moment"), bins)
        for name, length in {**by_bin, "credit_by_position": positions}.items():
            variables[name] = stack_layers([_pad_last(total[layer, name], length) for layer in layers], 0)
        variables["attention_first"] = stack_layers([total[layer, "attention_first"] for layer in layers], 0)
        variables["edges"] = torch.stack([_pad_last(total[layer, "edges"], bins).cpu() for layer in layers])
        for name in ("credit_by_document", "first_by_document"):
            variables[name] = stack_layers([torch.stack(rows[layer, name]) for layer in layers], 1)
        for name in ("profile_by_document", "mass_by_document", "attention_by_document"):
            by_layer = [torch.stack([_pad_last(row, bins) for row in rows[layer, name]]) for layer in layers]
            variables[name] = torch.stack([x.cpu() for x in by_layer], 1)
        if self.weights:
            terms = [torch.stack(rows[layer, "weight_by_document"]).cpu() for layer in layers]
            variables["weight_by_document"] = torch.stack(terms, 1)
            adapters = AdapterSplit(self.watch.model, self.sums)
            splits = [WeightSplit(self.sums, layer, adapters) for layer in layers]
            variables["weight_mean"] = torch.stack([split.mean() for split in splits])
            variables |= adapters.variables()
        return {name: x.numpy() for name, x in variables.items()}

    def _packed_weights(self, weight_mean: np.ndarray) -> str:
        """Return which weights have no split because they are packed; "" for none."""
        kinds = [
            set(find_projections(self.watch.model.get_submodule(x.name)).packed.values()) for x in self.watch.layers
        ]
        missing = np.isnan(weight_mean).any(-1) & np.array([bool(kind) for kind in kinds])[:, None]
        if not missing.any():
            return ""
        streams = [
            f"W_{stream[0].upper()} of {count} layers"
            for stream, count in zip(STREAMS, missing.sum(0), strict=True)
            if count
        ]
        names = ", ".join(sorted(set().union(*kinds)))
        return f"{', '.join(streams)}: {names} keeps them packed, and packed weights get no gradient"

    def _document_variables(self) -> dict[str, np.ndarray]:
        """Return loss and tokens of each document, where they are known."""
        rows = self.sums.rows
        if (None, "loss") in rows:
            return {name: torch.stack(rows[None, name]).numpy() for name in ("loss", "tokens")}
        return {"loss": np.full(self.documents, np.nan), "tokens": np.zeros(self.documents, dtype=int)}


def _pad_last(x: Tensor, length: int) -> Tensor:
    """Append zeros along the last axis."""
    return pad(x, (0, length - x.shape[-1]))
