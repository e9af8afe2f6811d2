"""Who pays: which losses send the gradient of every key and value, from a few backward passes of one forward pass.

Under `Myopic` in all layers one backward pass gives dl_j/dk_j and dl_j/dv_j for all j: the own losses. With the whole
from an ordinary pass and the ledger's self edges that makes three parts of each key's and value's gradient,

    own loss | self edge paid by later losses | future edge (always paid by later losses).

Under `Discount(1 - 1/h)` losses at distance d count (1 - 1/h)^d: what remains for a few h is the horizon curve.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity.decomposition.accumulator import Sums
from posterity.decomposition.credit import finite, self_part
from posterity.decomposition.weight_gradients import Projections, norms
from posterity.errors import InputError
from posterity.models.attach import refuse_other_paths
from posterity.models.chunked_loss import Sending
from posterity.models.language_model import holder, language_model
from posterity.models.watch import Layer, Observer, Watch
from posterity.ops.attention import Backward, dot, working
from posterity.ops.horizon_rules import Discount

OWN = 1  # the horizon whose discount is 0: nothing but the own loss


class Payers:
    """Sums over windows of who pays; `variables()` are those of the result."""

    def __init__(
        self, model: nn.Module, watch: Watch, losses: bool, horizons: Sequence[int], parameters: bool, sums: Sums
    ):
        """Nothing yet; everything goes to `sums`.

        Raises:
            InputError: The model has other paths between positions; a horizon is in force.
        """
        refuse_other_paths(watch, "to say who pays")
        if watch.cuts:
            raise InputError("who pays is a question to the whole gradient: leave the `with` of the horizon first")
        self.model, self.watch, self.parameters = language_model(model), watch, parameters
        self.horizons, self.losses = tuple(horizons), losses or parameters
        self.sums = sums
        self._whole: dict[Layer, Backward] = {}
        self._place = ""  # what is being sent, for messages
        self._curve: dict[Layer, list[Tensor]] = {}  # of the pass that is sent: by horizon
        self._hidden = _Hidden(self.model, watch, sums)

    @property
    def passes(self) -> tuple[int, ...]:
        """The horizon of each backward pass after the first."""
        return tuple(sorted({*self.horizons} | ({OWN} if self.losses else set())))

    def watching(self) -> contextlib.AbstractContextManager:
        """Inside, forward passes are ready for `send`."""
        stack = contextlib.ExitStack()
        stack.enter_context(self.watch.reporting(self._keep))
        if self.losses:
            stack.enter_context(self._hidden.watching())
        return stack

    def send(self, sending: Sending, place: str = "") -> None:
        """All backward passes of one forward pass; the first is the ordinary one, which every observer gets.

        Raises:
            InputError: A gradient is not finite; the message names the layer, and `place`.
        """
        self._place = place
        head = self._gradients()  # of the parameters behind its input, which the later passes do not reach
        with self._hidden.taking("whole"):
            sending.backward(again=True)
        whole = self._gradients()
        self._curve = {layer: [] for layer in self.watch.layers}
        for horizon in self.passes:
            rule = Discount(1 - 1 / horizon)
            self._reset(head)
            name = "own" if horizon == OWN else None
            with self.watch.sending((rule, rule), self._observer(horizon)), self._hidden.taking(name):
                sending.backward(again=horizon != self.passes[-1])
            if horizon == OWN and self.parameters:
                rows = torch.stack(_by_module(self.model, whole, self._gradients()))
                self.sums.note("parameters", [finite(rows, "the gradient of the parameters", self._place)])
        if self.losses:
            self._hidden.add(next(iter(self._whole.values())).lse, self._place)
        for layer, rows in self._curve.items() if self.horizons else ():
            self.sums.note(f"{layer}/horizon_by_document", torch.stack(rows, -1))
        self._reset({})
        self._whole.clear()

    def variables(self) -> dict[str, np.ndarray]:
        """The variables of the result, heads that a layer does not have NaN."""
        layers = self.watch.layers
        every = self.sums

        def side_by_side(by_layer: list[Tensor], head: int) -> Tensor:
            """Layers along `head`, which is where the heads were."""
            heads = max(x.shape[head] for x in by_layer)
            fitted = []
            for x in by_layer:
                missing = [*x.shape[:head], heads - x.shape[head], *x.shape[head + 1 :]]
                fitted.append(torch.cat((x, x.new_full(missing, torch.nan)), head).cpu())
            return torch.stack(fitted, head)

        def rows(name: str) -> Tensor:
            return side_by_side([torch.stack(every.rows[f"{layer}/{name}"]) for layer in layers], 1)

        found: dict[str, Tensor] = {}
        if self.losses:
            sums = side_by_side([every.total[f"{layer}/loss_products"] for layer in layers], 0)
            found["loss_credit"], found["loss_gram"] = sums[..., :3, :], sums[..., 3:, :]
            found["loss_credit_by_document"] = rows("loss_credit_by_document")
            found["hidden"], found["hidden_by_document"] = every.total["hidden"], torch.stack(every.rows["hidden"])
        if self.parameters:
            found["parameter_by_document"] = torch.stack(every.rows["parameters"])
        if self.horizons:
            found["horizon_by_document"] = rows("horizon_by_document")
        return {name: x.cpu().numpy() for name, x in found.items()}

    def coordinates(self) -> dict[str, list]:
        """The coordinates that only this result has."""
        found: dict[str, list] = {}
        if self.horizons:
            found["horizon"] = list(self.horizons)
        if self.parameters:
            found["parameter"] = [name for name, _ in _owners(self.model)]
        return found

    def _keep(self, layer: Layer, back: Backward, project: object) -> None:
        if layer in self._whole:
            raise InputError(f"layer {layer} was sent back twice in one pass: who pays cannot be said")
        self._whole[layer] = back

    def _observer(self, horizon: int) -> Observer:
        def observe(layer: Layer, back: Backward, project: Callable[[int], Projections]) -> None:
            whole = self._whole[layer]
            if horizon == OWN and self.losses:
                self._split(layer, whole, back)
            if horizon in self.horizons:
                grads = (back.grad_query, back.grad_key, back.grad_value)
                left = [dot(x, y).sum(-1, dtype=torch.float64) for x, y in zip(grads, whole.wholes, strict=True)]
                curve = finite(
                    torch.stack(left, -1), f"at horizon {horizon} the gradient of layer {layer}", self._place
                )
                self._curve[layer].append(curve)

        return observe

    def _split(self, layer: Layer, whole: Backward, own: Backward) -> None:
        """Add credits and inner products of the three parts."""
        part = self_part(whole)
        streams = (
            (own.grad_key, part.key, whole.grad_key, whole.wholes[1]),
            (own.grad_value, part.value, whole.grad_value, whole.wholes[2]),
        )
        sums = torch.stack([_products(*(x.to(working(x.dtype)) for x in stream)) for stream in streams], 2)
        finite(sums, f"what the own losses send to layer {layer}", self._place)
        self.sums.add(f"{layer}/loss_products", sums.sum(0))  # head, written, 9, position
        self.sums.note(f"{layer}/loss_credit_by_document", sums[..., :3, :].sum(-1))

    def _gradients(self) -> dict[str, Tensor]:
        if not self.parameters:
            return {}
        return {name: x.grad.clone() for name, x in self.model.named_parameters() if x.grad is not None}

    def _reset(self, grads: dict[str, Tensor]) -> None:
        for name, x in self.model.named_parameters() if self.parameters else ():
            x.grad = grads[name].clone() if name in grads else None


def _products(
    own: Float[Tensor, "batch head position dim"],
    own_edge: Float[Tensor, "batch head position dim"],
    head: Float[Tensor, "batch head position dim"],
    whole: Float[Tensor, "batch head position dim"],
) -> Float[Tensor, "batch head nine position"]:
    """Credits of the three parts, then the six inner products between them, in the order of the result's labels."""
    parts = torch.stack((own, own_edge - own, head - own_edge, whole), 3)
    gram = parts[..., :3, :] @ parts.mT
    pairs = ((0, 3), (1, 3), (2, 3), (0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
    return torch.stack([gram[..., one, two] for one, two in pairs], 2).double()


class _Hidden:
    """Gradients of the hidden states at the input of each layer: the module that holds the attention module."""

    def __init__(self, model: nn.Module, watch: Watch, sums: Sums):
        self.watch, self.layers, self.sums = watch, watch.layers, sums
        self.grads: dict[str, dict[Layer, Tensor]] = {"whole": {}, "own": {}}
        self.name: str | None = None
        self.modules = {layer: holder(model, layer.name) for layer in watch.layers}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, forward passes leave their marks."""
        hooks = [
            module.register_forward_pre_hook(self._mark(layer), with_kwargs=True)
            for layer, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def taking(self, name: str | None) -> Iterator[None]:
        """Inside, gradients of marked hidden states are kept under a name, if there is one."""
        self.name = name
        try:
            yield
        finally:
            self.name = None

    def add(self, like: Float[Tensor, "window head position"], place: str) -> None:
        """Squared norms and inner product of the own and the later part, by position; NaN where none was seen."""
        rows = []
        for layer in self.layers:
            whole, own = (self.grads[name].get(layer) for name in ("whole", "own"))
            if whole is None or own is None:
                rows.append(like.new_full((len(like), 3, like.shape[2]), torch.nan, dtype=torch.float64))
                continue
            whole, own = (x.to(working(x.dtype)) for x in (whole, own))
            later = whole - own
            terms = [(x * y).sum(-1) for x, y in ((own, own), (later, later), (own, later))]
            row = torch.stack(terms, 1).double()
            rows.append(finite(row, f"the gradient of the hidden states of layer {layer}", place))
        found = torch.stack([row.cpu() for row in rows], 1)  # window, layer, term, position
        self.sums.add("hidden", found.sum(0))
        self.sums.note("hidden", found.sum(-1))
        for grads in self.grads.values():
            grads.clear()

    def _mark(self, layer: Layer) -> Callable:
        def mark(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()), None)
            if x is None or x.dim() != 3 or not x.requires_grad or not self.watch.comes(layer):
                return

            def take(grad: Tensor) -> None:
                if self.name is not None:
                    self.grads[self.name][layer] = grad.clone()  # a leaf adds later passes to it

            x.register_hook(take)

        return mark


def _owners(model: nn.Module) -> list[tuple[str, list[str]]]:
    """Modules that own parameters, and the names of these; shared ones count where they come first."""
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return list(found.items())


def _by_module(model: nn.Module, whole: dict[str, Tensor], own: dict[str, Tensor]) -> list[Tensor]:
    """|own|^2, |later|^2 and their inner product for each module."""
    rows = []
    for _, names in _owners(model):
        pairs = []
        for name in names:
            if name in whole:
                one = own.get(name, torch.zeros_like(whole[name])).to(working(whole[name].dtype))
                pairs.append((one, whole[name].to(one.dtype) - one))
        rows.append(norms(list(zip(*pairs, strict=True))).cpu() if pairs else torch.zeros(3, dtype=torch.float64))
    return rows
