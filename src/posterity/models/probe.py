"""The operator inside a causal language model of transformers, for the length of a `with`.

The way in is transformers' own registry of attention functions, with a mask function under the same name (without it,
padding, packing and sliding windows would be dropped silently). Nothing is believed: before anything is measured, a
probe of a few random tokens compares the logits, finds the layers, and looks for paths between positions outside them.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterity.errors import InputError
from posterity.models.interface import NAME, switched
from posterity.models.language_model import differ, first_device, language_model, rounding
from posterity.models.masks import WRITTEN
from posterity.models.other_paths import find_leaks
from posterity.models.watch import Layer, Recorder

_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Check:
    """Whether and how a model can be measured."""

    ok: bool
    reason: str
    layers: tuple[Layer, ...] = ()
    leaks: tuple[str, ...] = ()  # modules that carry information between positions outside attention
    name: str = NAME  # under which transformers knows the operator for this model
    entries: Mapping[str, int] = field(default_factory=dict)  # calls an entry, of modules entered several times a pass
    right_only: bool = False  # padding on the left reaches the tokens after it

    @property
    def other_paths(self) -> bool:
        """Whether positions also communicate outside attention."""
        return bool(self.leaks)

    def __str__(self) -> str:
        """The answer in one line."""
        return f"{'can' if self.ok else 'cannot'} be measured: {self.reason}"


def check(model: nn.Module) -> Check:
    """Find out by trying whether the model can be measured: a few forward passes over 16 random tokens."""
    try:
        model = language_model(model)
        with _probing(model):
            return _probe(model)
    except InputError as error:
        return Check(False, str(error))


def _probe(model: PreTrainedModel) -> Check:
    """Compare the model with itself under the operator, on two rows that differ in the last token only."""
    device = first_device(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, _PROBE_TOKENS), generator=generator).to(device)
    last, first = ids.clone(), ids.clone()
    last[:, -1] = (ids[:, -1] + 1) % model.config.get_text_config().vocab_size
    first[:, 0] = (ids[:, 0] + 1) % model.config.get_text_config().vocab_size

    def logits(*rows: Tensor, **more: Tensor) -> Tensor:
        return model(input_ids=torch.cat(rows), use_cache=False, **more).logits

    try:
        own = logits(ids, last)
    except Exception as error:
        streams = getattr(model.config.get_text_config(decoder=True), "num_codebooks", 1)
        reason = f"it reads {streams} streams of tokens at once, not one" if streams > 1 else _first_line(error)
        raise InputError(f"its own forward pass fails on plain token ids: {reason}") from error
    tolerance = rounding(own.dtype) * own.abs().max().item()
    if not own.isfinite().all():
        raise InputError("its logits for random tokens are not finite")
    if differ(own[0, :-1], own[1, :-1]) > tolerance:
        raise InputError("a later token changes earlier logits: only causal models are measured")
    name, recorder, ours = _under_the_operator(model, lambda: logits(ids, last), own, tolerance)
    if not recorder.layers:
        raise InputError(f"{type(model).__name__} does not call transformers' attention interface")
    if differ(own, ours) > tolerance:
        raise InputError(
            f"under the operator its logits move by {differ(own, ours):.1e} (at most {tolerance:.1e} is rounding): "
            "its attention does something the operator does not know"
        )
    with Recorder(model, cut=True) as cut, switched(model, name):
        leaks = find_leaks(model, cut, ids, first, tolerance)
    right_only = _right_only(model, name, lambda padding: logits(ids, last, attention_mask=padding), tolerance)
    count = len(recorder.reached)
    reason = f"{count} attention layer{'s' if count > 1 else ''}"
    if name == WRITTEN:
        reason += "; it computes with its mask, which is therefore written out, N x N"
    if leaks:
        reason += (
            f"; positions also communicate through {', '.join(leaks)}, so that only the ledger by lag is exact, "
            "not who pays"
        )
    return Check(True, reason, tuple(recorder.reached), leaks, name, _entries(recorder), right_only)


def _under_the_operator(
    model: PreTrainedModel, run: Callable[[], Tensor], own: Tensor, tolerance: float
) -> tuple[str, Recorder, Tensor]:
    """Logits under the operator, by which of its names, and what was called.

    A model that computes with its mask fails, or moves, until the mask is written out for it.
    """
    for name in (NAME, WRITTEN):
        recorder = Recorder(model)
        try:
            with recorder, switched(model, name), torch.enable_grad():
                ours = run().detach()
        except InputError:
            raise
        except Exception:
            if name == WRITTEN:
                raise
            continue
        if name == WRITTEN or differ(own, ours) <= tolerance:
            break
    return name, recorder, ours


def _right_only(model: PreTrainedModel, name: str, run: Callable[[Tensor], Tensor], tolerance: float) -> bool:
    """Whether padding on the left moves the logits of later tokens, by what stands in rows that see nothing."""
    padding = torch.ones(2, _PROBE_TOKENS, dtype=torch.long, device=first_device(model))
    padding[1, : _PROBE_TOKENS // 4] = 0
    try:
        own = run(padding)
    except Exception:  # it takes no padding
        return True
    real = padding.bool()
    if not own[real].isfinite().all():  # in float64 the eager path of most models makes empty rows NaN
        return False
    with switched(model, name):
        ours = run(padding)
    return not differ(own[real], ours[real]) <= tolerance


def _entries(recorder: Recorder) -> dict[str, int]:
    """How many attention calls an entry makes, of the modules that one pass enters several times."""
    calls, found = Counter(layer.name for layer in recorder.layers), {}
    for name, count in calls.items():
        entries = recorder.entries[name]
        if entries > 1:
            if count % entries:
                raise InputError(f"{name} is entered {entries} times in one pass and attends {count} times in all")
            found[name] = count // entries
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


@contextlib.contextmanager
def _probing(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients; the mode of every module comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"its forward pass fails under the operator: {_first_line(error)}") from error
    finally:
        for module, mode in modes:
            module.training = mode
