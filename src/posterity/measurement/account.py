"""The ledger of a model: every backward pass inside the `with` is accounted for, layer by layer, text by text."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from posterity.axes import SIDES, STREAMS, TERMS
from posterity.decomposition.accumulator import Sums
from posterity.decomposition.credit import Bins, finite, self_part, tally
from posterity.decomposition.lag_sums import Scratch
from posterity.decomposition.weight_gradients import Projections, WeightSplit
from posterity.errors import InputError
from posterity.measurement.loss_split import Payers
from posterity.measurement.provenance import provenance
from posterity.models.attach import watching
from posterity.models.watch import Layer, Watch
from posterity.ops.attention import Backward
from posterity.results import schema as result


@contextlib.contextmanager
def account(model: nn.Module, lags: str = "octaves", weights: bool = True) -> Iterator["Ledger"]:
    """Account for any forward and backward passes of your own.

    Each row of a batch counts as one document, each backward pass as new ones. Padding is honoured where the model is
    told of it (a 2D `attention_mask`): padding is no reader, and positions count from a row's first real token. (With
    padding on the left, transformers' own loss lets the last padding token predict the first real one: set its label to
    -100.) Packed documents share one row of positions. The weights of attention are never returned here
    (`output_attentions`).

    Args:
        model: A causal language model of transformers (or a wrapper around one); restored on exit.
        lags: "octaves" (exact up to 15, then a quarter octave each), "all", or "self" (self and other only, no sweep:
            mass and attention of the others are NaN).
        weights: Whether to split the gradients of W_Q, W_K and W_V too.

    Raises:
        InputError: The model cannot be measured, with the reason.
    """
    Bins.of(lags, 2)
    with watching(model) as watch:
        ledger = Ledger(model, watch, lags, weights)
        with watch.reporting(ledger.observe):
            yield ledger


class Ledger:
    """Sums over documents of the accounts of every layer; `result()` labels them."""

    def __init__(self, model: nn.Module, watch: Watch, lags: str, weights: bool):
        """Start empty, with the layers in the order of the forward pass."""
        self.model, self.watch, self.lags, self.weights = model, watch, lags, weights
        self.place = ""  # what is being measured now, for messages
        self.sums = Sums()  # by layer and name; "loss" and "tokens" of each document, where known
        self._weights = {layer: WeightSplit(self.sums, str(layer)) for layer in watch.layers} if weights else {}
        self._scratch = Scratch()

    def clear(self) -> None:
        """Forget every document."""
        self.sums.total.clear()
        self.sums.rows.clear()

    def observe(self, layer: Layer, back: Backward, project: Callable[[int], Projections]) -> None:
        """Account for one backward pass of one layer."""
        if layer not in self.watch.layers:
            raise InputError(
                f"attention layer {layer} was not called when the model was probed: its calls vary with input"
            )
        part = self_part(back)
        entry = tally(back, part, Bins.of(self.lags, back.lse.shape[2]), self._scratch)
        finite(entry.credit_by_position, f"the gradient of layer {layer}", self.place)
        if self.weights:
            self._weights[layer].add(back, part, project)
        for name, x in vars(entry).items():
            self.sums.add(f"{layer}/{name}", x.sum(0))
        by_position = entry.credit_by_position
        self.sums.note(f"{layer}/credit_by_document", by_position.sum(-1))
        self.sums.note(f"{layer}/first_by_document", by_position[..., 0].sum(-1))
        self.sums.note(f"{layer}/profile_by_document", entry.credit.sum(1))

    @property
    def documents(self) -> int:
        """How many documents have been accounted for."""
        return max(self._counts().values(), default=0)

    def _counts(self) -> dict[Layer, int]:
        return {layer: self.sums.count(f"{layer}/credit_by_document") for layer in self.watch.layers}

    def result(self, texts: list[str] | None = None, payers: Payers | None = None, **attrs: object) -> xr.Dataset:
        """Label the sums: the schema of `posterity.measure`.

        Args:
            texts: Where each document came from.
            payers: Who pays, of the same documents.
            attrs: Provenance to add.

        Raises:
            InputError: No backward pass has been seen, or not by every layer.
        """
        counts = self._counts()
        if not self.documents:
            raise InputError("no backward pass has been seen: call .backward() on a loss inside the `with`")
        short = next((layer for layer, count in counts.items() if count < self.documents), None)
        if short is not None:
            raise InputError(
                f"layer {short} has seen {counts[short]} of {self.documents} documents: no gradient reaches it "
                "(are its inputs detached?)"
            )
        if texts is not None and len(texts) != self.documents:
            raise InputError(f"expected one text for each of {self.documents} documents; got {len(texts)}")
        context = max(self.sums.total[f"{layer}/credit_by_position"].shape[-1] for layer in counts)
        bins = Bins.of(self.lags, context)
        known = [torch.stack(self.sums.rows[name]).numpy() for name in ("loss", "tokens") if name in self.sums.rows]
        losses, tokens = known or (np.full(self.documents, np.nan), np.zeros(self.documents, dtype=int))
        variables = self._stacked(context, len(bins.first)) | {"loss": losses, "tokens": tokens}
        if payers is not None:
            variables |= payers.variables()
        known = {
            "context": context,
            "documents": self.documents,
            "lags": self.lags,
            "other_paths": "; ".join(self.watch.other_paths),
        }
        return result.build(
            variables,
            modules=[str(layer) for layer in counts],
            lag=bins.first,
            lag_end=bins.last,
            texts=texts or [""] * self.documents,
            attrs=provenance(self.model) | known | attrs,
            **({} if payers is None else payers.coordinates()),
        )

    def _stacked(self, context: int, bins: int) -> dict[str, np.ndarray]:
        """All layers side by side; heads that a layer does not have are NaN."""
        layers = self.watch.layers

        def total(name: str) -> list[Tensor]:
            return [self.sums.total[f"{layer}/{name}"] for layer in layers]

        def rows(name: str, *shape: int) -> list[Tensor]:
            return [torch.stack([_fit(x, shape) for x in self.sums.rows[f"{layer}/{name}"]]) for layer in layers]

        heads = max(len(x) for x in total("attention_first"))
        s = len(STREAMS)
        shapes = {
            "credit": (heads, s, bins),
            "mass": (heads, s, bins),
            "attention": (heads, bins),
            "edges": (bins,),
            "credit_by_position": (heads, s, len(SIDES), context),
            "attention_first": (heads,),
        }
        found = {name: [_fit(x, shape) for x in total(name)] for name, shape in shapes.items()} | {
            "credit_by_document": rows("credit_by_document", heads, s, len(SIDES)),
            "first_by_document": rows("first_by_document", heads, s),
            "profile_by_document": rows("profile_by_document", s, bins),
        }
        if self.weights:
            found["weight_by_document"] = rows("weight_by_document", s, len(TERMS))
            found["weight_mean"] = [self._weights[layer].mean() for layer in layers]
        by_document = {name for name in found if name.endswith("_by_document")}
        return {
            name: torch.stack([x.cpu() for x in xs], int(name in by_document)).numpy() for name, xs in found.items()
        }


def _fit(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Pad bins and positions with zeros and missing heads with NaN."""
    x = torch.nn.functional.pad(x, (0, shape[-1] - x.shape[-1])) if x.dim() > 1 or not x.is_floating_point() else x
    if len(x) < shape[0]:
        missing = x.new_full((shape[0] - len(x), *x.shape[1:]), torch.nan)
        x = torch.cat((x, missing))
    return x
