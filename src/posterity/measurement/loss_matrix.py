"""The exact matrix of loss position against key position for one short text, by one backward pass per loss."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from posterity.axes import READER_LEVELS, READER_QUANTITIES
from posterity.decomposition.credit import check_finite
from posterity.decomposition.reader_lags import edge_sums, lags_within
from posterity.errors import InputError
from posterity.inputs.arguments import open_model, split_arguments
from posterity.inputs.documents import document_ids
from posterity.inputs.named_documents import refuse_path
from posterity.measurement.measure import measure
from posterity.models.attach import refuse_uncut_paths, watch_model
from posterity.models.chunked_loss import token_losses, window_losses
from posterity.models.language_model import freeze_parameters, input_device, language_model, seed_rng
from posterity.models.watch import Layer
from posterity.ops.attention import Backward
from posterity.ops.precision import working_dtype
from posterity.progress import progress_bar
from posterity.results.schema import extend_result

LONGEST = 256  # tokens: the matrices have tokens^2 numbers for every layer


def inspect(
    model: Any = "default",
    tokenizer: Any = None,
    text: Any = None,
    *,
    horizons: tuple[int, ...] = (),
    batch: int = 8,
    progress: bool = True,
    seed: int = 0,
    attrs: Mapping[str, object] | None = None,
) -> xr.Dataset:
    """Measure one text, and which loss pays for the key and value of every position.

    `inspect_credit[layer, written, loss_position, position]` is the inner product of dl_t/dk_j (dl_t/dv_j) with the
    total gradient of k_j (v_j), over all key heads; `inspect_norm` the norm of dl_t/dk_j. Both are 0 where t < j.
    `reader_lag[layer, reader_quantity, level, position]` is the lag within which 50 and 90 % of the attention on token
    j, of its key credit and of its value credit lie; `reader_lag_all` the same of all layers together.

    Args:
        model: As in `posterity.measure`: a model, or the name of one.
        tokenizer: Its tokenizer. It may be left out, and the text come second, where the model brings it or the text is
            token ids.
        text: A str or token ids, at most 256 tokens.
        horizons: As in `posterity.measure`.
        batch: Loss positions in one backward pass.
        progress: Whether to show a progress bar on stderr.
        seed: For models that draw random numbers even in evaluation mode.
        attrs: Provenance to add to the result.

    Returns:
        The result of `posterity.measure(..., losses=True)` on this text, with these and `token`.

    Raises:
        InputError: The text is too short or too long; as in `posterity.measure`.
    """
    tokenizer, text = split_arguments(tokenizer, text)
    if text is None:
        raise InputError(f"inspect expects a text of 2 to {LONGEST} tokens; got none: pass a str or token ids")
    refuse_path(text)
    loaded = open_model(model, tokenizer)
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = document_ids(text, tokenizer)
    if not 2 <= len(ids) <= LONGEST:
        raise InputError(f"inspect expects a text of 2 to {LONGEST} tokens; got {len(ids)}: choose another part of it")
    if batch < 1:
        raise InputError(f"expected a batch of at least 1; got {batch}")
    result = measure(
        model, None, [("the text", ids)], context=len(ids), losses=True, horizons=horizons, progress=progress,
        seed=seed, attrs={"command": "posterity.inspect"} | loaded.attrs | dict(attrs or {}),
    )  # fmt: skip
    matrices = _LossMatrices(len(ids))
    inner = language_model(model)
    with freeze_parameters(inner), seed_rng(seed), watch_model(model) as watch:
        refuse_uncut_paths(watch, "inspect")
        with watch.report_to(matrices.observe_total):
            window_losses(model, ids[None]).sum().backward()
        with (
            watch.report_to(matrices.observe),
            progress_bar(len(ids) - 1, progress, "inspecting", "losses") as advance,
        ):
            for first in range(0, len(ids) - 1, batch):
                positions = range(first, min(first + batch, len(ids) - 1))
                _backward_single_losses(model, ids[: positions.stop + 1], positions)
                matrices.add_rows(positions)
                advance(len(positions), len(positions) * (positions.stop + 1))
    variables = matrices.variables(watch.layers)
    return extend_result(result, variables, token=[_visible_token(tokenizer, token) for token in ids.tolist()])


def _backward_single_losses(model: nn.Module, ids: Tensor, positions: range) -> None:
    """Send back one loss per row of a batch, those at `positions`; tokens after the last of them are left out."""
    rows = ids.expand(len(positions), -1).to(input_device(language_model(model)))
    logits = model(input_ids=rows, use_cache=False).logits
    columns = torch.tensor(positions, device=logits.device)
    logits = logits[torch.arange(len(columns), device=logits.device), columns]
    targets = rows.to(logits.device)[0, columns + 1]
    token_losses(logits, targets).sum().backward()


class _LossMatrices:
    """Credit and norm of the gradients that single losses send to the keys and values of every layer."""

    def __init__(self, length: int):
        self.length = length
        self._latest: dict[Layer, list[Tensor]] = {}  # what each layer sends to keys and values in the present pass
        self._totals: dict[Layer, list[Tensor]] = {}  # their gradients of all losses, over all layers that read them
        self._sums: dict[Layer, Tensor] = {}  # credit or norm, written, loss position, position
        self._reader_lags: dict[Layer, Tensor] = {}  # quantity, level, position
        self._edges = torch.zeros(len(READER_QUANTITIES), length, length, dtype=torch.float64)  # of all layers

    def observe_total(self, layer: Layer, back: Backward, projections: object) -> None:
        """Keep the gradients of the pass of all losses, and how far away the readers of each position are."""
        self._totals[layer] = [_in_working_dtype(back.stream_gradient(stream)) for stream in (1, 2)]
        edges = edge_sums(back).cpu()
        self._reader_lags[layer] = lags_within(edges, READER_LEVELS)
        self._edges += edges

    def observe(self, layer: Layer, back: Backward, projections: object) -> None:
        """Keep the gradients of this pass."""
        self._latest[layer] = [_in_working_dtype(back.call_gradient(stream)) for stream in (1, 2)]

    def add_rows(self, positions: range) -> None:
        """Enter the gradients of the present pass in the rows of the losses at `positions`."""
        for layer, total_grads in self._totals.items():
            sums = self._sums.setdefault(layer, torch.zeros(2, 2, self.length, self.length, dtype=torch.float64))
            for written, (total, single) in enumerate(zip(total_grads, self._latest[layer], strict=True)):
                length = single.shape[2]
                credit = (single * total[:, :, :length]).sum((1, 3))
                norm = single.square().sum((1, 3)).sqrt()
                for kind, rows in enumerate((credit, norm)):
                    sums[kind, written, positions.start : positions.stop, :length] = rows.double().cpu()
        self._latest = {}

    def variables(self, layers: tuple[Layer, ...]) -> dict[str, np.ndarray]:
        """Return the matrices of all layers."""
        sums = [check_finite(self._sums[layer], f"the gradient of single losses in layer {layer}") for layer in layers]
        credit, norm = torch.stack(sums, 1).numpy()
        return {
            "inspect_credit": credit, "inspect_norm": norm,
            "reader_lag": torch.stack([self._reader_lags[layer] for layer in layers]).numpy(),
            "reader_lag_all": lags_within(self._edges, READER_LEVELS).numpy(),
        }  # fmt: skip


def _in_working_dtype(x: Tensor) -> Tensor:
    return x.to(working_dtype(x.dtype))


def _visible_token(tokenizer: Any, token: int) -> str:
    """Return a token as text, line ends and tabs visible."""
    if tokenizer is None:
        return str(token)
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return text.replace("\r", "").replace("\n", "\u23ce").replace("\t", "\u21e5")
