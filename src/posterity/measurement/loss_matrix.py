"""One text under the glass: the exact matrix of loss position against key position, by one backward pass per loss."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from posterity.decomposition.credit import finite
from posterity.errors import InputError
from posterity.inputs import windows as corpus
from posterity.measurement.measure import measure
from posterity.models.attach import refuse_other_paths, watched
from posterity.models.chunked_loss import run
from posterity.models.language_model import first_device, frozen, language_model, seeded
from posterity.models.watch import Layer
from posterity.ops.attention import Backward, group_sum, working
from posterity.progress import progress_bar
from posterity.results.schema import extended

LONGEST = 256  # tokens: the matrices have tokens^2 numbers for every layer


def inspect(
    model: nn.Module,
    tokenizer: Any,
    text: Any,
    *,
    horizons: tuple[int, ...] = (),
    batch: int = 8,
    progress: bool = True,
    seed: int = 0,
    attrs: Mapping[str, object] | None = None,
) -> xr.Dataset:
    """Measure one text, and which loss pays for the key and value of every position.

    `inspect_credit[layer, written, loss_position, position]` is the inner product of dl_t/dk_j (dl_t/dv_j) with the
    whole gradient of k_j (v_j), over all key heads; `inspect_norm` the norm of dl_t/dk_j. Both are 0 where t < j.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer; None if `text` is token ids.
        text: str or token ids, at most 256 tokens.
        horizons: As in `posterity.measure`.
        batch: Loss positions in one backward pass.
        progress: Whether to show a progress bar on stderr.
        seed: For models that draw random numbers even in evaluation mode.
        attrs: Provenance to add to the result.

    Returns:
        The result of `posterity.measure(..., losses=True)` on this text, with the two matrices and `token`.

    Raises:
        InputError: The text is too short or too long; as in `posterity.measure`.
    """
    ids = corpus.whole(text, tokenizer)
    if not 2 <= len(ids) <= LONGEST:
        raise InputError(f"inspect expects a text of 2 to {LONGEST} tokens; got {len(ids)}: choose another part of it")
    if batch < 1:
        raise InputError(f"expected a batch of at least 1; got {batch}")
    known = {"command": "posterity.inspect"} | dict(attrs or {})
    result = measure(
        model, None, [("the text", ids)], context=len(ids), losses=True, horizons=horizons, progress=progress,
        seed=seed, attrs=known,
    )  # fmt: skip
    matrices = _Matrices(len(ids))
    inner = language_model(model)
    with frozen(inner), seeded(seed), watched(model, matrices.observe) as watch:
        refuse_other_paths(watch, "inspect")
        run(model, ids[None]).sum().backward()
        matrices.whole, matrices.latest = matrices.latest, {}
        with progress_bar(len(ids) - 1, progress, "inspecting", "losses") as advance:
            for first in range(0, len(ids) - 1, batch):
                losses = range(first, min(first + batch, len(ids) - 1))
                _send(model, ids[: losses.stop + 1], losses)
                matrices.add(losses)
                advance(len(losses), len(losses) * (losses.stop + 1))
    variables = matrices.variables(watch.layers)
    return extended(result, variables, token=[_shown(tokenizer, int(one)) for one in ids])


def _send(model: nn.Module, ids: Tensor, losses: range) -> None:
    """One backward pass for each of some losses: each row of the batch has one. Tokens after the last are left out."""
    rows = ids.expand(len(losses), -1).to(first_device(language_model(model)))
    logits = model(input_ids=rows, use_cache=False).logits
    at = torch.tensor(losses, device=logits.device)
    chosen = logits[torch.arange(len(at), device=logits.device), at]
    targets = rows.to(logits.device)[0, at + 1]
    nn.functional.cross_entropy(chosen.to(working(chosen.dtype)), targets, reduction="sum").backward()


class _Matrices:
    """Gradients of the keys and values of every layer: of all losses, and of single ones."""

    def __init__(self, length: int):
        self.length = length
        self.whole: dict[Layer, list[Tensor]] = {}
        self.latest: dict[Layer, list[Tensor]] = {}
        self.sums: dict[Layer, Tensor] = {}  # credit or norm, written, loss position, position

    def observe(self, layer: Layer, back: Backward, project: object) -> None:
        """Keep the gradients of this pass."""
        groups = back.key.shape[1]
        grads = (group_sum(back.grad_key, groups), group_sum(back.grad_value, groups))
        self.latest[layer] = [x.to(working(x.dtype)) for x in grads]

    def add(self, losses: range) -> None:
        """Enter the rows of some losses."""
        for layer, wholes in self.whole.items():
            sums = self.sums.setdefault(layer, torch.zeros(2, 2, self.length, self.length, dtype=torch.float64))
            for written, (whole, single) in enumerate(zip(wholes, self.latest[layer], strict=True)):
                length = single.shape[2]
                credit = (single * whole[:, :, :length]).sum((1, 3))
                norm = single.square().sum((1, 3)).sqrt()
                for kind, rows in enumerate((credit, norm)):
                    sums[kind, written, losses.start : losses.stop, :length] = rows.double().cpu()
        self.latest = {}

    def variables(self, layers: tuple[Layer, ...]) -> dict[str, np.ndarray]:
        """The matrices of all layers."""
        every = [finite(self.sums[layer], f"the gradient of single losses in layer {layer}") for layer in layers]
        both = torch.stack(every, 1).numpy()
        return {"inspect_credit": both[0], "inspect_norm": both[1]}


def _shown(tokenizer: Any, token: int) -> str:
    """A token as text; line ends and tabs visible."""
    if tokenizer is None:
        return str(token)
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return text.replace("\r", "").replace("\n", "\u23ce").replace("\t", "\u21e5")
