"""Probe of a model: can it be measured, and how.

The way in is transformers' own registry of attention functions, with a mask function under the same name (without it,
padding, packing and sliding windows would be dropped silently). Nothing is believed: before anything is measured, a
few random tokens show whether the logits stay what they were, which modules call attention, and whether positions
communicate outside it.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterity.errors import InputError, first_line
from posterity.models.gradient_check import describe_wrong_gradients, find_wrong_gradients
from posterity.models.horizon_check import horizons_hold
from posterity.models.interface import NAME, switch_attention
from posterity.models.language_model import evaluation_mode, input_device, language_model, max_difference, rounding
from posterity.models.masks import EXPLICIT
from posterity.models.other_paths import find_other_paths
from posterity.models.packed_weights import check_backward
from posterity.models.recorder import Recorder
from posterity.models.transformers_logging import silence_transformers
from posterity.models.watch import Layer, Watch
from posterity.models.weight_layout import is_sharded, refuse_layout, reshard

_PROBE_TOKENS = 16
_GRADIENT_ROWS = 3  # texts on which a gradient must disagree with finite differences


@dataclass(frozen=True)
class Check:
    """The answer of `check`: whether and how a model can be measured."""

    ok: bool
    reason: str
    layers: tuple[Layer, ...] = ()
    other_paths: tuple[str, ...] = ()  # modules that carry information between positions outside attention
    uncut_paths: tuple[str, ...] = ()  # the same if horizons do not hold there: who pays is refused
    name: str = NAME  # under which transformers knows the operator for this model
    # Attention calls in one forward() of a module, for modules whose forward() runs several times in one pass.
    entries: Mapping[str, int] = field(default_factory=dict)
    right_only: bool = False  # padding on the left reaches the tokens after it
    wrong_gradients: tuple[str, ...] = ()  # modules whose backward pass is not the derivative of their forward pass
    # Layers whose masks and sums over edges go block by block in plain PyTorch, by the reason; the others by kernels.
    without_kernels: Mapping[str, tuple[Layer, ...]] = field(default_factory=dict)

    def describe_kernels(self) -> str:
        """Say what computes masks and sums over edges on the device where the model is, in one line."""
        parts = [
            f"block by block in plain PyTorch{self._count(layers)} ({reason})"
            for reason, layers in self.without_kernels.items()
        ]
        number = len(self.layers) - sum(map(len, self.without_kernels.values()))
        if number:
            parts.insert(0, "Triton kernels" + (f" in {number} of {len(self.layers)} layers" if parts else ""))
        return f"sums over edges: {'; '.join(parts)}"

    def _count(self, layers: tuple[Layer, ...]) -> str:
        return "" if len(layers) == len(self.layers) else f" in {len(layers)} of {len(self.layers)} layers"

    def __str__(self) -> str:
        """Return the answer in one line."""
        return f"{'can' if self.ok else 'cannot'} be measured: {self.reason}"


def check(model: nn.Module) -> Check:
    """Find out by trying whether the model can be measured: a few forward passes over 16 random tokens.

    Returns:
        `ok` and, in one line, the `reason`; the attention `layers`; `other_paths`, the modules that carry information
        between positions outside attention; `uncut_paths`, the same modules if horizons do not hold there, so that
        only the ledger by lag is exact.
    """
    try:
        inner = language_model(model)
        refuse_layout(inner)
        with _probing(inner):
            return _probe(inner)
    except InputError as error:
        return Check(False, str(error))


def _probe(model: PreTrainedModel) -> Check:
    """Compare the model with itself under the operator, on two rows that differ in the last token only."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    ids = ids.to(input_device(model))
    other_last, other_first = ids.clone(), ids.clone()
    other_last[:, -1] = (ids[:, -1] + 1) % vocabulary
    other_first[:, 0] = (ids[:, 0] + 1) % vocabulary

    def logits(**options: Tensor) -> Tensor:
        return model(input_ids=torch.cat((ids, other_last)), use_cache=False, **options).logits

    plain = _plain_logits(model, logits)
    tolerance = rounding(plain.dtype) * plain.abs().max().item()
    if max_difference(plain[0, :-1], plain[1, :-1]) > tolerance:
        raise InputError("a later token changes earlier logits: only causal models are measured")
    name, recorder, ours = _under_the_operator(model, logits, plain, tolerance)
    if not recorder.layers:
        raise InputError(f"{type(model).__name__} does not call transformers' attention interface")
    if (difference := max_difference(plain, ours)) > tolerance:
        raise InputError(
            f"under the operator its logits move by {difference:.1e} (at most {tolerance:.1e} is rounding): "
            "its attention does something the operator does not know"
        )
    check_backward(model, ids)
    with Recorder(model, silence=True).record() as silence, switch_attention(model, name):
        other_paths = find_other_paths(model, silence, ids, other_first, tolerance)
    right_only = _right_only(model, name, lambda padding: logits(attention_mask=padding), tolerance)
    layers = tuple(recorder.differentiable)
    wrong_gradients = ()
    if not is_sharded(model):  # else a module by itself has not the whole of its weights
        with switch_attention(model, name):
            wrong_gradients = find_wrong_gradients(model, _random_rows(model, _GRADIENT_ROWS))
    entries, uncut_paths = _calls_per_entry(recorder), other_paths
    if other_paths:
        watch = Watch(model, layers, other_paths, entries)
        with watch.install(), switch_attention(model, name):
            uncut_paths = () if horizons_hold(watch, ids) else other_paths
    reason = _describe(len(layers), name, other_paths, uncut_paths, wrong_gradients)
    without_kernels = {
        reason: tuple(layer for layer in refused if layer in layers) for reason, refused in recorder.refusals.items()
    }
    return Check(
        True, reason, layers, other_paths, uncut_paths, name, entries, right_only, wrong_gradients, without_kernels
    )


def _random_rows(model: PreTrainedModel, count: int) -> list[Tensor]:
    """Return texts of random tokens, (1, position); no padding token, whose zero embedding is a kink of norms."""
    embeddings = model.get_input_embeddings()
    padding = getattr(embeddings, "padding_idx", None)
    if padding is None:
        padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    vocabulary = model.config.get_text_config().vocab_size
    rows = torch.randint(vocabulary - 1, (count, _PROBE_TOKENS), generator=torch.Generator().manual_seed(1))
    if isinstance(padding, int):
        rows = rows + (rows >= padding)
    return list(rows.to(input_device(model)).split(1))


def _plain_logits(model: PreTrainedModel, run: Callable[[], Tensor]) -> Tensor:
    """Return the model's own logits, which must be finite."""
    try:
        logits = run()
    except Exception as error:
        streams = getattr(model.config.get_text_config(decoder=True), "num_codebooks", 1)
        reason = (
            f"it reads {streams} streams of tokens at once, not one" if streams > 1 else first_line(error, typed=True)
        )
        raise InputError(f"its own forward pass fails on plain token ids: {reason}") from error
    if not logits.isfinite().all():
        raise InputError("its logits for random tokens are not finite")
    return logits


def _describe(
    layers: int, name: str, other_paths: tuple[str, ...], uncut_paths: tuple[str, ...], wrong_gradients: tuple[str, ...]
) -> str:
    """Say what was found, in one line."""
    reason = f"{layers} attention layer{'s' if layers > 1 else ''}"
    if name == EXPLICIT:
        reason += "; it computes with its mask, which is therefore written out, N x N"
    if other_paths:
        reason += f"; positions also communicate through {', '.join(other_paths)}"
        reason += ", so that only the ledger by lag is exact, not who pays" if uncut_paths else ", under a horizon too"
    if wrong_gradients:
        reason += f"; {describe_wrong_gradients(wrong_gradients)}"
    return reason


def _under_the_operator(
    model: PreTrainedModel, run: Callable[[], Tensor], plain: Tensor, tolerance: float
) -> tuple[str, Recorder, Tensor]:
    """Return logits under the operator, by which of its names, and what was called.

    A model that computes with its mask fails, or moves, until the mask is written out for it.
    """
    for name in (NAME, EXPLICIT):
        recorder = Recorder(model)
        try:
            with recorder.record(), switch_attention(model, name), torch.enable_grad():
                logits = run().detach()
        except InputError:
            raise
        except Exception:
            if name == EXPLICIT:
                raise
            continue
        if name == EXPLICIT or max_difference(plain, logits) <= tolerance:
            break
    return name, recorder, logits


def _right_only(model: PreTrainedModel, name: str, run: Callable[[Tensor], Tensor], tolerance: float) -> bool:
    """Return whether padding on the left moves the logits of later tokens, by what stands in rows that see nothing."""
    padding = torch.ones(2, _PROBE_TOKENS, dtype=torch.long, device=input_device(model))
    padding[1, : _PROBE_TOKENS // 4] = 0
    try:
        plain = run(padding)
    except Exception:  # it takes no padding
        return True
    real = padding.bool()
    if not plain[real].isfinite().all():  # in float64 the eager path of most models makes empty rows NaN
        return False
    with switch_attention(model, name):
        ours = run(padding)
    return not max_difference(plain[real], ours[real]) <= tolerance


def _calls_per_entry(recorder: Recorder) -> dict[str, int]:
    """Return how many attention calls an entry makes, of the modules that one pass enters several times."""
    calls_per_entry = {}
    for name, calls in Counter(layer.name for layer in recorder.layers).items():
        entries = recorder.entries[name]
        if entries > 1:
            if calls % entries:
                raise InputError(f"{name} is entered {entries} times in one pass and attends {calls} times in all")
            calls_per_entry[name] = calls // entries
    return calls_per_entry


@contextlib.contextmanager
def _probing(model: PreTrainedModel) -> Iterator[None]:
    """Run the model in evaluation mode without gradients; any failure becomes an InputError."""
    try:
        with silence_transformers(), evaluation_mode(model), torch.no_grad():
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"its forward pass fails under the operator: {first_line(error, typed=True)}") from error
    finally:
        reshard(model)
