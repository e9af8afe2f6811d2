"""features(): which losses train the residual stream at chosen positions, along directions and through the parameters.

r_i is the residual stream in front of a layer at position i. The gradient of the parameters splits by its paths (Rofin,
Naghiyev and Hahn 2026, arXiv 2603.14087): the direct part goes through r_i to the loss of position i, the pre-cached
part through r_i to later losses, and the shared part past r_i, by other positions or behind the layer. Every path
crosses the input of a layer once, so that the parts of several positions of one layer add up, and two backward passes
that start there give them: with dl_i/dr_i, which the pass of the own losses sends there, and with the rest of dL/dr_i.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from posterity._version import __version__
from posterity.axes import FEATURE_PAIRS, FEATURE_PARTS, PULLS
from posterity.decomposition.accumulator import Accumulator
from posterity.decomposition.credit import check_finite
from posterity.errors import InputError, NotFiniteError
from posterity.inputs.arguments import open_model, split_arguments
from posterity.inputs.directions import Directions
from posterity.inputs.named_documents import name_texts, open_files
from posterity.inputs.windows import Window, read_corpus, token_digest
from posterity.measurement.distributed import Processes
from posterity.measurement.measure import CONTEXT, LIMIT, check_tokens, name_windows
from posterity.measurement.provenance import provenance
from posterity.measurement.run_state import RunState, fingerprint
from posterity.measurement.window_batch import WindowBatch
from posterity.models.attach import require_whole_gradient, watch_model
from posterity.models.chunked_loss import ChunkedLoss, LMHead
from posterity.models.context_length import check_context
from posterity.models.language_model import freeze_parameters, language_model, seed_rng
from posterity.models.layer_inputs import LayerInputs
from posterity.models.watch import Layer, Watch
from posterity.models.weight_layout import is_sharded
from posterity.ops.horizon_rules import Myopic
from posterity.ops.precision import working_dtype
from posterity.progress import progress_bar
from posterity.results.feature_schema import FEATURES, KIND

Gradients = dict[str, Tensor]  # of parameters by name


def features(
    model: Any = "default",
    tokenizer: Any = None,
    documents: Any = None,
    *,
    directions: Any = None,
    layers: Sequence[int] | None = None,
    positions: int | tuple[int, int] | None = None,
    influence: bool = False,
    context: int = CONTEXT,
    limit: int = LIMIT,
    seed: int = 0,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
    attrs: dict[str, Any] | None = None,
) -> xr.Dataset:
    """Split what trains the residual stream in front of layers by the losses that it comes from.

    Two backward passes give the gradient at all these inputs, by own and later losses; two more from each layer give
    the gradient of all parameters in its direct, pre-cached and shared parts (Rofin et al. 2026, arXiv 2603.14087).
    Memory: five times that of the parameters, beside a backward pass.

    Args:
        model: As in `posterity.measure`.
        tokenizer: As in `posterity.measure`.
        documents: As in `posterity.measure`.
        directions: A safetensors file, or a dict of tensors, (width) or (direction, width), whose names hold the number
            of a layer: probes, decoder rows of a sparse autoencoder, a lens. They are scaled to length 1.
        layers: Numbers of the layers in front of which the stream is split, from 0; by default those of the directions,
            without any all.
        positions: One position, or the first and the one behind the last; None for all that have a loss behind them.
        influence: Whether to measure what a step along each part does to each direction: a backward pass for each.
        context: Tokens in a window.
        limit: Windows at most.
        seed: For models that draw random numbers even in evaluation mode.
        progress: Whether to show a progress bar on stderr.
        state: A folder that keeps what has been measured; where it holds some, the run goes on from there.
        attrs: Provenance to add.

    Returns:
        Dims, units and what each variable is: `posterity.results.feature_schema`.

    Raises:
        InputError: The model or the input cannot be measured, with the reason and what to do.
    """
    tokenizer, documents = split_arguments(tokenizer, documents)
    chosen = None if layers is None else _check_layers(layers)
    vectors = Directions.read(directions, chosen)
    if influence and not vectors.names:
        raise InputError("influence=True (--influence) is that on directions; got none (--directions)")
    first, stop = _check_positions(positions, context)
    loaded = open_model(model, tokenizer)
    inner = language_model(loaded.model)
    if is_sharded(inner) or any(x.is_meta for x in inner.parameters()):
        raise InputError("features expects all weights in memory, whole; some are offloaded or sharded")
    check_context(inner, context)
    corpus = read_corpus(name_texts(open_files(documents)), loaded.tokenizer, context, limit)
    windows = list(corpus.windows)
    check_tokens(inner, windows)
    with (
        watch_model(loaded.model) as watch,
        freeze_parameters(inner, parameters=True),
        seed_rng(seed),
    ):
        require_whole_gradient(watch)
        split = _StreamSplit(inner, watch, chosen, vectors, slice(first, stop), influence)
        settings = {
            "version": __version__, "kind": KIND, "dtype": str(inner.dtype), "context": context,
            "layers": [*split.layers], "positions": [first, stop], "influence": influence, "seed": seed,
            "directions": [*vectors.names, *map(_weighted_sum, vectors.vectors)],
            "text": token_digest(windows), "model": "" if state is None else fingerprint(inner),
        }  # fmt: skip
        run_state, sums = RunState.open(state, settings, Processes()), Accumulator()
        remaining = run_state.remaining_windows(len(windows))
        head = LMHead.probe(inner)
        with run_state.hold_lock(len(remaining)), split.hook_forward():
            run_state.start(sums)
            with progress_bar(len(remaining), progress, "splitting") as advance:
                for number in remaining:
                    torch.manual_seed(seed + number)
                    with name_windows([windows[number]]):
                        split.add(windows[number], loaded.model, head, sums)
                    run_state.add_windows(sums, [number])
                    advance(1, windows[number].size)
            run_state.finish(sums)
    text = {
        "kind": KIND, "context": context, "positions": f"{first}:{stop}", "seed": seed,
        "text_digest": token_digest(windows), "command": "posterity.features", **corpus.coverage.attrs(),
    }  # fmt: skip
    return split.result(sums, windows, {**text, **provenance(inner), **loaded.attrs, **(attrs or {})})


def _weighted_sum(vector: Float[Tensor, " width"]) -> float:
    """Return a number that tells vectors apart, for the settings of an unfinished run."""
    return float(vector.double() @ torch.arange(1, len(vector) + 1).double())


def _check_layers(layers: Sequence[int]) -> tuple[int, ...]:
    numbers = (layers,) if isinstance(layers, int) else tuple(layers)
    if not numbers or any(not isinstance(x, int) or x < 0 for x in numbers) or len({*numbers}) < len(numbers):
        raise InputError(f"layers expects different numbers of layers from 0 on; got {layers!r}")
    return tuple(sorted(numbers))


def _check_positions(positions: Any, context: int) -> tuple[int, int]:
    """Return the first position and the one behind the last."""
    pair = (0, context - 1) if positions is None else positions
    pair = (pair, pair + 1) if isinstance(pair, int) else pair
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(x, int) for x in pair):
        raise InputError(f"positions expects a position, or the first and the one behind the last; got {positions!r}")
    first, stop = pair
    if not 0 <= first < stop <= context - 1:
        raise InputError(
            f"positions expects positions from 0 to {context - 2}, which have a loss in windows of {context} tokens; "
            f"got {first}:{stop}"
        )
    return first, stop


@dataclass(frozen=True, eq=False)
class _Parts:
    """The gradient of the parameters in its three parts; a parameter that none reaches is left out."""

    direct: Gradients
    pre_cached: Gradients
    shared: Gradients

    @classmethod
    def of(cls, whole: Gradients, direct: Gradients, pre_cached: Gradients) -> "_Parts":
        shared = {}
        for name, total in whole.items():
            rest = total.to(working_dtype(total.dtype))
            for part in (direct, pre_cached):
                rest = rest - part[name].to(rest.dtype) if name in part else rest
            shared[name] = rest
        return cls(direct, pre_cached, shared)

    def gram(self) -> list[float]:
        """Return the inner products in the order of `FEATURE_PAIRS`."""
        d, p, s = self.direct, self.pre_cached, self.shared
        return [_inner(x, y) for x, y in ((d, d), (p, p), (s, s), (d, p), (d, s), (p, s))]

    def along(self, gradient: Gradients) -> list[float]:
        """Return the inner products with another gradient, of each part."""
        return [_inner(part, gradient) for part in (self.direct, self.pre_cached, self.shared)]


def _inner(left: Gradients, right: Gradients) -> float:
    total = 0.0
    for name in left.keys() & right.keys():
        x, y = (part[name].to(working_dtype(part[name].dtype)).flatten() for part in (left, right))
        total += float(torch.dot(x, y.to(x.dtype)))
    return total


class _StreamSplit:
    """Splits the gradient at the inputs of layers, window by window."""

    def __init__(
        self,
        model: nn.Module,
        watch: Watch,
        chosen: tuple[int, ...] | None,
        directions: Directions,
        positions: slice,
        influence: bool,
    ):
        self.model, self.watch, self.directions = model, watch, directions
        self.positions, self.influence = positions, influence
        self.inputs = LayerInputs(model, watch)
        self._by_number = _layers_by_number(model, self.inputs)
        default = tuple(sorted({*directions.layers})) or tuple(sorted(self._by_number))
        self.layers = default if chosen is None else chosen
        for number in {*self.layers, *directions.layers}:
            if number not in self._by_number:
                last = max(self._by_number)
                raise InputError(f"this model has no attention layer {number}; expected numbers from 0 to {last}")

    @contextlib.contextmanager
    def hook_forward(self) -> Any:
        """Within the block, forward passes can be split."""
        with self.watch.discount_states(), self.inputs.hook():
            yield

    def add(self, window: Window, model: nn.Module, head: LMHead, sums: Accumulator) -> None:
        """Measure a window, and append its rows."""
        batch = WindowBatch.of([window])
        loss = ChunkedLoss.run(model, batch.ids, head, batch.targets)
        if not loss.losses.isfinite().all():
            raise NotFiniteError("the loss")
        numbers = sorted({*self.layers, *self.directions.layers})
        for number in numbers:
            self._check_width(number)
        with self.inputs.collect("total"):
            loss.backward(retain_graph=True)
        total_gradients = {name: x.grad.clone() for name, x in self._parameters() if x.grad is not None}
        with self.watch.override_rules((Myopic(), Myopic()), _ignore), self.inputs.collect("own"):
            loss.backward(retain_graph=True)
        sums.append_rows((None, "loss"), loss.losses.cpu().double() / batch.predictions)
        gram: list[list[float]] = []
        pulls: dict[int, list[float]] = {}  # by direction
        influence: dict[int, list[float]] = {}
        for number in numbers:
            own, later = self._stream_gradients(self._by_number[number])
            along = self.directions.of_layer(number)
            pulls |= {index: _pull(own, later, self.directions.vectors[index]) for index in along}
            if number not in self.layers and not self.influence:
                continue
            parts = _Parts.of(total_gradients, self._send_back(number, own), self._send_back(number, later))
            if number in self.layers:
                gram.append(parts.gram())
            for index in along if self.influence else ():
                component = self.directions.vectors[index].to(own).expand_as(own) / len(own)
                influence[index] = [-x for x in parts.along(self._send_back(number, component))]
        by_direction = (("pull", pulls), ("influence", influence))
        for name, rows in (("gram", gram), *((name, [by[index] for index in sorted(by)]) for name, by in by_direction)):
            if rows:
                row = torch.tensor(rows, dtype=torch.float64)
                sums.append_rows((None, name), [check_finite(row, f"the {name} of the residual stream")])
        self.inputs.clear()
        for _, parameter in self._parameters():
            parameter.grad = None

    def result(self, sums: Accumulator, windows: Sequence[Window], attrs: dict[str, Any]) -> xr.Dataset:
        """Return the Dataset."""

        def number(name: str, dims: Sequence[str], long_name: str, units: str) -> xr.Variable:
            rows = torch.stack(sums.rows[None, name]).numpy()
            return xr.Variable(("document", *dims), rows, {"units": units, "long_name": long_name})

        variables = {
            "gram": number(
                "gram", ("layer", "pair"), "inner products of the parts of the parameters' gradient", "nats^2"
            ),
            "loss": number("loss", (), "loss", "nats per token"),
        }
        coords: dict[str, Any] = {
            "document": np.arange(len(windows)),
            "text": ("document", np.array([window.text for window in windows], dtype=str)),
            "layer": np.array(self.layers),
            "pair": np.array(FEATURE_PAIRS, dtype=str),
        }
        if self.directions.names:
            variables["pull"] = number(
                "pull", ("direction", "pull_term"), "mean pull of own and later losses along a direction", "nats"
            )
            coords |= {
                "direction": np.array(self.directions.names, dtype=str),
                "direction_layer": ("direction", np.array(self.directions.layers)),
                "pull_term": np.array(PULLS, dtype=str),
            }
        if self.influence:
            variables["influence"] = number(
                "influence", ("direction", "part"), "change of the mean component along a direction per learning rate",
                "nats",
            )  # fmt: skip
            coords["part"] = np.array(FEATURE_PARTS, dtype=str)
        return FEATURES.check(xr.Dataset(variables, coords, attrs))

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, x) for name, x in self.model.named_parameters() if x.requires_grad]

    def _check_width(self, number: int) -> None:
        """Raise InputError unless the directions in front of a layer are as wide as its input."""
        layer = self._by_number[number]
        if layer not in self.inputs.tensors:
            raise InputError(f"the input of layer {layer} has no gradient: its residual stream cannot be split")
        width = self.inputs.tensors[layer].shape[-1]
        for index in self.directions.of_layer(number):
            name, size = self.directions.names[index], len(self.directions.vectors[index])
            if size != width:
                raise InputError(
                    f"direction {name!r} has {size} numbers; the stream in front of layer {number} has {width}"
                )

    def _stream_gradients(
        self, layer: Layer
    ) -> tuple[Float[Tensor, "position width"], Float[Tensor, "position width"]]:
        """Return the gradients of own and of later losses at the chosen positions of a layer's input."""
        total, own = (self.inputs.grads[part][layer][0, self.positions] for part in ("total", "own"))
        total, own = (x.to(working_dtype(x.dtype)) for x in (total, own))
        return own, total - own

    def _send_back(self, number: int, gradient: Float[Tensor, "position width"]) -> Gradients:
        """Return the gradient of the parameters when this one arrives at the chosen positions of a layer's input."""
        stream = self.inputs.tensors[self._by_number[number]]
        start = torch.zeros_like(stream)
        start[0, self.positions] = gradient.to(stream.dtype)
        names, parameters = zip(*self._parameters(), strict=True)
        grads = torch.autograd.grad(stream, parameters, start, retain_graph=True, allow_unused=True)
        return {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}


def _layers_by_number(model: nn.Module, inputs: LayerInputs) -> dict[int, Layer]:
    """Return the attention layers by the number of the module around them; the first call of each."""
    names = {module: name for name, module in model.named_modules()}
    by_number: dict[int, Layer] = {}
    for index, (layer, module) in enumerate(inputs.modules.items()):
        words = [int(word) for word in names[module].split(".") if word.isdigit()]
        by_number.setdefault(words[-1] if words else index, layer)
    return by_number


def _pull(
    own: Float[Tensor, "position width"], later: Float[Tensor, "position width"], direction: Float[Tensor, " width"]
) -> list[float]:
    """Return the means over positions in the order of `PULLS`; a positive pull makes the component larger."""
    own, later = (-(x @ direction.to(x)).double() for x in (own, later))
    return [float(x.mean()) for x in (own, later, own * own, later * later, own * later)]


def _ignore(layer: Layer, back: object, projections: object) -> None:
    """Take a report of a backward pass."""
