"""The loss split: which losses send the gradient of every key and value, from a few backward passes of one forward.

Under `Myopic` in all layers one backward pass gives dl_j/dk_j and dl_j/dv_j for all j: the own losses. With the whole
gradient from an ordinary pass and the ledger's self edges that makes three parts of each key's and value's gradient,

    own loss | self edge, later losses | future edge (always later losses).

Under `Discount(1 - 1/h)` losses at distance d count (1 - 1/h)^d: what remains for a few h is the horizon curve.
"""

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity.decomposition.accumulator import Accumulator, stack_layers
from posterity.decomposition.bins import Bins
from posterity.decomposition.credit import check_finite, restart_positions, self_edge_gradients
from posterity.decomposition.first_keys import FirstKeys, Spans
from posterity.decomposition.gram import gram_terms
from posterity.decomposition.projections import is_packed
from posterity.errors import InputError
from posterity.measurement.hidden_gradients import HiddenGradients
from posterity.models.attach import require_whole_gradient
from posterity.models.chunked_loss import ChunkedLoss
from posterity.models.language_model import language_model
from posterity.models.watch import Layer, Observer, Watch
from posterity.ops.attention import Backward
from posterity.ops.horizon_rules import Discount
from posterity.ops.precision import dot, working_dtype

OWN = 1  # the horizon whose discount is 0: nothing but the own loss


class LossSplit:
    """Sums over windows of the loss split and the horizon curve; `variables()` are those of the result."""

    def __init__(
        self,
        model: nn.Module,
        watch: Watch,
        losses: bool,
        horizons: Sequence[int],
        parameters: bool,
        sums: Accumulator,
        sinks: int,
        positions: int,
    ):
        """Start empty; accumulate into `sums`. `sinks` and `positions` as in `posterity.account`.

        Raises:
            InputError: The model has other paths between positions; a horizon is in force; weights that are asked for
                are offloaded.
        """
        require_whole_gradient(watch)
        self.model, self.watch, self.parameters = language_model(model), watch, parameters
        if parameters and any(x.is_meta for x in self.model.parameters()):
            raise InputError("parameters=True needs all weights in memory; some are offloaded: leave it out")
        self.horizons, self.losses = tuple(horizons), losses or parameters
        self.sums, self.sinks, self.positions = sums, sinks, positions
        self._hidden = HiddenGradients(self.model, watch, sums, positions)
        self._total_passes: dict[Layer, Backward] = {}  # the ordinary pass
        self._spans: Spans | None = None  # of the present windows
        self._curve: dict[Layer, list[Tensor]] = {}  # remaining credit of the present windows, by horizon

    @property
    def extra_passes(self) -> tuple[int, ...]:
        """The horizon of each backward pass after the first."""
        return tuple(sorted({*self.horizons} | ({OWN} if self.losses else set())))

    def observe_forward(self) -> contextlib.AbstractContextManager:
        """Within the block, forward passes can be split by `backward`."""
        stack = contextlib.ExitStack()
        stack.enter_context(self.watch.report_to(self._observe_total))
        stack.enter_context(self.watch.discount_states())
        if self.losses:
            stack.enter_context(self._hidden.inputs.hook())
        return stack

    def backward(self, loss: ChunkedLoss, spans: Spans | None = None) -> None:
        """Run all backward passes of one forward pass; the first is the ordinary one, which every observer gets.

        Args:
            loss: Of the forward pass.
            spans: Of the documents packed into each window, whose positions start again.

        Raises:
            NotFiniteError: A gradient is not finite; the message names the layer.
        """
        self._spans = spans
        head = self._parameter_gradients()  # of the parameters behind its input, which the later passes do not reach
        with self._hidden.inputs.collect("total"):
            loss.backward(retain_graph=True)
        total = self._parameter_gradients()
        self._curve = {layer: [] for layer in self.watch.layers}
        for horizon in self.extra_passes:
            rule = Discount(1 - 1 / horizon)
            self._set_parameter_gradients(head)
            part = "own" if horizon == OWN else None
            with self.watch.override_rules((rule, rule), self._observer(horizon)), self._hidden.inputs.collect(part):
                loss.backward(retain_graph=horizon != self.extra_passes[-1])
            if horizon == OWN and self.parameters:
                row = torch.stack(_module_terms(self.model, total, self._parameter_gradients()))
                self.sums.append_rows((None, "parameters"), [check_finite(row, "the gradient of the parameters")])
        if self.losses:
            windows, _, positions = next(iter(self._total_passes.values())).lse.shape
            self._hidden.add(windows, positions, spans)
        for layer, credits in self._curve.items() if self.horizons else ():
            self.sums.append_rows((str(layer), "horizon_by_document"), torch.stack(credits, -1))
        self._set_parameter_gradients({})
        self._total_passes.clear()

    def variables(self) -> dict[str, np.ndarray]:
        """Return the variables of the result; heads that a layer does not have are NaN."""
        layers, total, rows = [str(layer) for layer in self.watch.layers], self.sums.total, self.sums.rows
        variables: dict[str, Tensor] = {}
        if self.losses:
            products = stack_layers([total[layer, "loss_products"] for layer in layers], 0)
            variables["loss_credit"], variables["loss_gram"] = products[..., :3, :], products[..., 3:, :]
            by_layer = [torch.stack(rows[layer, "loss_credit_by_document"]) for layer in layers]
            variables["loss_credit_by_document"] = stack_layers(by_layer, 1)
            variables["hidden"] = total[None, "hidden"]
            variables["hidden_by_document"] = torch.stack(rows[None, "hidden"])
        if self.parameters:
            variables["parameter_by_document"] = torch.stack(rows[None, "parameters"])
        if self.horizons:
            by_layer = [torch.stack(rows[layer, "horizon_by_document"]) for layer in layers]
            variables["horizon_by_document"] = stack_layers(by_layer, 1)
        return {name: x.cpu().numpy() for name, x in variables.items()}

    def coordinates(self) -> dict[str, list]:
        """Return the coordinates that only a result with these variables has."""
        coordinates: dict[str, list] = {}
        if self.horizons:
            coordinates["horizon"] = list(self.horizons)
        if self.parameters:
            coordinates["parameter"] = list(_parameters_by_module(self.model))
        return coordinates

    def _observe_total(self, layer: Layer, back: Backward, projections: object) -> None:
        if layer in self._total_passes:
            raise InputError(f"layer {layer} was sent back twice in one pass: who pays cannot be said")
        self._total_passes[layer] = back

    def _observer(self, horizon: int) -> Observer:
        def observe(layer: Layer, back: Backward, projections: object) -> None:
            total = self._total_passes[layer]
            if horizon == OWN and self.losses:
                self._add_products(layer, total, back)
            if horizon in self.horizons:
                totals = total.total_gradients()
                grads = zip((back.grad_query, back.grad_key, back.grad_value), totals, strict=True)
                credit = torch.stack([dot(x, y).sum(-1, dtype=torch.float64) for x, y in grads], -1)
                check_finite(credit, f"at horizon {horizon} the gradient of layer {layer}")
                first_keys = FirstKeys.of(back, self.sinks, self._spans)
                first = first_keys.sum_by_lag(back, totals).credit.sum(-1).movedim(0, -1)
                self._curve[layer].append(torch.stack((first, credit - first), -1))

        return observe

    def _add_products(self, layer: Layer, total: Backward, own: Backward) -> None:
        """Accumulate credits and inner products of the three parts."""
        self_edge = self_edge_gradients(total)
        _, total_key, total_value = total.total_gradients()
        streams = (
            (own.grad_key, self_edge.key, total.grad_key, total_key),
            (own.grad_value, self_edge.value, total.grad_value, total_value),
        )
        products = torch.stack([_products(*(x.to(working_dtype(x.dtype)) for x in stream)) for stream in streams], 2)
        check_finite(products, f"what the own losses send to layer {layer}")
        if self._spans is not None:
            products = restart_positions(products, self._spans)
        bins = Bins.of_positions(self.positions, products.shape[-1])
        self.sums.add((str(layer), "loss_products"), bins.sum(products.sum(0)))  # head, written, nine, position
        credit = products[..., :3, :]
        by_reader = [x.sum(-1) for x in (credit[..., : self.sinks], credit[..., self.sinks :])]
        self.sums.append_rows((str(layer), "loss_credit_by_document"), torch.stack(by_reader, -2))

    def _parameter_gradients(self) -> dict[str, Tensor]:
        if not self.parameters:
            return {}
        return {name: x.grad.clone() for name, x in self.model.named_parameters() if x.grad is not None}

    def _set_parameter_gradients(self, grads: dict[str, Tensor]) -> None:
        for name, x in self.model.named_parameters() if self.parameters else ():
            x.grad = grads[name].clone() if name in grads else None


def _products(
    own: Float[Tensor, "batch head position dim"],
    self_edge: Float[Tensor, "batch head position dim"],
    head: Float[Tensor, "batch head position dim"],
    total: Float[Tensor, "batch head position dim"],
) -> Float[Tensor, "batch head nine position"]:
    """Return the credits of the three parts, then their six inner products (`posterity.axes.PAIRS`).

    `self_edge` and `head` are each query head's own gradient, over the self edge and over all edges; `total` is the
    gradient of the key or value itself.
    """
    parts = torch.stack((own, self_edge - own, head - self_edge, total), 3)
    gram = parts[..., :3, :] @ parts.mT
    pairs = ((0, 3), (1, 3), (2, 3), (0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
    return torch.stack([gram[..., row, column] for row, column in pairs], 2).double()


def _parameters_by_module(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the parameters that each module owns; a shared parameter counts where it comes first.

    Packed parameters, which get no gradient, are left out.
    """
    names: dict[str, list[str]] = {}
    for name in (name for name, x in model.named_parameters() if not is_packed(x)):
        names.setdefault(name.rpartition(".")[0], []).append(name)
    return names


def _module_terms(model: nn.Module, total: dict[str, Tensor], own: dict[str, Tensor]) -> list[Tensor]:
    """Return |own|², |later|² and their inner product for each module."""
    rows = []
    for names in _parameters_by_module(model).values():
        pairs = []
        for name in names:
            if name in total:
                own_part = own.get(name, torch.zeros_like(total[name])).to(working_dtype(total[name].dtype))
                pairs.append((own_part, total[name].to(own_part.dtype) - own_part))
        rows.append(gram_terms(*zip(*pairs, strict=True)).cpu() if pairs else torch.zeros(3, dtype=torch.float64))
    return rows
