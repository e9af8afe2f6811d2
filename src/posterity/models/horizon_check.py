"""Measurement whether horizons hold on every path between positions of a model, those outside attention included.

Eight random tokens stand in eight equal rows, and row t sends back from its position t alone. Under a discount each
gradient at position j must be the model's own times rate^(t-j): at the embeddings, at all keys and values, and at the
input of each module that mixes positions. At rate 0 it must be exactly 0 for j < t, so that a path which was missed
is seen however little it carries.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterity.models.language_model import freeze_parameters, max_difference, rounding
from posterity.models.state_horizon import find_mixers
from posterity.models.watch import Layer, Watch
from posterity.ops.attention import Backward
from posterity.ops.horizon_rules import Discount, Full, Rule

_TOKENS = 8  # more than the taps of any known convolution
_RATES = (0.0, 0.5, 1.0)


def horizons_hold(watch: Watch, ids: Tensor) -> bool:
    """Return whether discounts are exact and leave the forward pass as it is; the watch is installed by the caller.

    Args:
        watch: The watch over the model, whose other paths a horizon may or may not reach.
        ids: Tokens, (1, position).
    """
    model = watch.model
    assert isinstance(model, PreTrainedModel)
    rows, mixers = ids[:, :_TOKENS].expand(_TOKENS, -1), find_mixers(model)
    with freeze_parameters(model):
        originals = _Pass(watch, rows, mixers)
        own = originals.gradients(Full())
        tolerance = rounding(originals.logits.dtype)
        try:
            with watch.discount_states():
                discounted = _Pass(watch, rows, mixers)
                moves = max_difference(discounted.logits, originals.logits)
                return moves <= tolerance * originals.logits.abs().max().item() and all(
                    _agree(discounted.gradients(Discount(rate)), own, rate, tolerance) for rate in _RATES
                )
        except Exception:  # a kernel that has the name of another one, and other arguments
            return False


class _Pass:
    """One forward pass over equal rows, and its backward passes."""

    def __init__(self, watch: Watch, rows: Tensor, mixers: Iterable[nn.Module]):
        self.watch, self.points = watch, {}
        with self._keep_inputs(mixers):
            logits = watch.model(input_ids=rows, use_cache=False).logits
        self.logits = logits.detach()
        positions = torch.arange(len(rows), device=logits.device)
        weights = torch.linspace(-1, 1, logits.shape[-1], device=logits.device).to(logits.dtype)
        self._loss = (logits[positions, positions] * weights).sum()

    def gradients(self, rule: Rule) -> dict[str, Float[Tensor, "row position dim"]]:
        """Return the gradient at every point under a rule."""
        grads: dict[str, Tensor] = {}

        def observe(layer: Layer, back: Backward, projections: object) -> None:
            for name, grad in (("key", back.grad_key), ("value", back.grad_value)):
                grads[f"{layer} {name}"] = grad.transpose(1, 2).flatten(2)

        points = list(self.points.values())
        with self.watch.override_rules((rule, rule), observe):
            at_points = torch.autograd.grad(self._loss, points, retain_graph=True, allow_unused=True)
        grads |= {name: x for name, x in zip(self.points, at_points, strict=True) if x is not None}
        return {name: grad.float() for name, grad in grads.items()}

    @contextlib.contextmanager
    def _keep_inputs(self, mixers: Iterable[nn.Module]) -> Iterator[None]:
        """Keep the embeddings and the inputs of the mixing modules in a forward pass."""
        names = {module: name for name, module in self.watch.model.named_modules()}

        def keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad), None)
            if x is not None:
                self.points[f"input of {names[module]}"] = x

        def keep_embeddings(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            self.points["embeddings"] = output

        hooks = [x.register_forward_pre_hook(keep_input, with_kwargs=True) for x in mixers]
        assert isinstance(self.watch.model, PreTrainedModel)
        hooks.append(self.watch.model.get_input_embeddings().register_forward_hook(keep_embeddings))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _agree(discounted: dict[str, Tensor], own: dict[str, Tensor], rate: float, tolerance: float) -> bool:
    """Return whether all gradients are the model's own times rate^lag, to rounding; exactly 0 where the factor is 0."""
    if not own or discounted.keys() != own.keys():
        return False
    for name, expected in own.items():
        rows, positions = (torch.arange(n, device=expected.device) for n in expected.shape[:2])
        factors = rate ** (rows[:, None] - positions).clamp(min=0).float()
        difference = (discounted[name] - factors[..., None] * expected).abs().amax(-1)
        allowed = tolerance * expected.abs().max() * (factors > 0)
        if not (difference <= allowed).all():
            return False
    return True
