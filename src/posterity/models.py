"""The operator inside a causal language model of transformers, for the length of a `with`.

The way in is transformers' own registry of attention functions, with a mask function under the same name (without it,
padding, packing and sliding windows would be dropped silently). Nothing is believed: before anything is measured, a
probe of a few random tokens compares the logits, finds the layers, and looks for paths between positions outside them.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterity.errors import InputError
from posterity.hook import NAME, Layer, Observer, Recorder, Watch, differ, register, rounding, watches

_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Check:
    """Whether and how a model can be measured."""

    ok: bool
    reason: str
    layers: tuple[Layer, ...] = ()
    other_paths: bool = False

    def __str__(self) -> str:
        """The answer in one line."""
        return f"{'can' if self.ok else 'cannot'} be measured: {self.reason}"


@contextlib.contextmanager
def watched(model: nn.Module, observe: Observer) -> Iterator[Check]:
    """Inside, every attention layer of the model runs on the operator and reports its backward passes to `observe`.

    The forward pass is the model's own to rounding (verified on entry); the model is restored on exit, errors included.

    Raises:
        InputError: The model cannot be measured, with the reason.
    """
    inner = language_model(model)
    check_ = check(inner)
    if not check_.ok:
        raise InputError(f"this model {check_}")
    if any(module in watches for module in inner.modules()):
        raise InputError("this model is being accounted for already: leave the first `with` before the second")
    watch = Watch({layer.name: inner.get_submodule(layer.name) for layer in check_.layers}, observe)
    with watch.installed(), _switched(inner):
        yield check_


def check(model: nn.Module) -> Check:
    """Find out by trying whether the model can be measured: a few forward passes over 16 random tokens."""
    try:
        model = language_model(model)
        with _probing(model):
            return _probe(model)
    except InputError as error:
        return Check(False, str(error))


def language_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers such as torch.compile's or DDP's.

    Raises:
        InputError: There is none, or it is no causal language model by its own account.
    """
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise InputError(f"expected a causal language model of transformers; got {type(model).__name__}")
    if found.config.is_encoder_decoder:
        raise InputError(
            f"{type(found).__name__} is an encoder-decoder; only decoders with causal attention are measured"
        )
    if found.get_output_embeddings() is None:
        raise InputError(f"{type(found).__name__} has no language-model head; load it with AutoModelForCausalLM")
    return found


def first_device(model: PreTrainedModel) -> torch.device:
    """Where the model wants its tokens."""
    return next(model.get_input_embeddings().parameters()).device


def _probe(model: PreTrainedModel) -> Check:
    """Compare the model with itself under the operator, on two rows that differ in the last token only."""
    device = first_device(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, _PROBE_TOKENS), generator=generator).to(device)
    last, first = ids.clone(), ids.clone()
    last[:, -1] = (ids[:, -1] + 1) % model.config.get_text_config().vocab_size
    first[:, 0] = (ids[:, 0] + 1) % model.config.get_text_config().vocab_size

    def logits(*rows: Tensor) -> Tensor:
        return model(input_ids=torch.cat(rows), use_cache=False).logits

    own = logits(ids, last)
    tolerance = rounding(own.dtype) * own.abs().max().item()
    if not own.isfinite().all():
        raise InputError("its logits for random tokens are not finite")
    if differ(own[0, :-1], own[1, :-1]) > tolerance:
        raise InputError("a later token changes earlier logits: only causal models are measured")
    recorder = Recorder(model)
    with recorder, _switched(model):
        ours = logits(ids, last)
    if not recorder.layers:
        raise InputError(f"{type(model).__name__} does not call transformers' attention interface")
    if differ(own, ours) > tolerance:
        raise InputError(
            f"under the operator its logits move by {differ(own, ours):.1e} (at most {tolerance:.1e} is rounding): "
            "its attention does something the operator does not know"
        )
    with Recorder(model, cut=True), _switched(model):
        cut = logits(ids, first)
    leak = differ(cut[0, 1:], cut[1, 1:]) > tolerance
    count = len(recorder.layers)
    reason = f"{count} attention layer{'s' if count > 1 else ''}"
    if leak:
        reason += "; positions also communicate outside of them, so that only the ledger by lag is exact, not who pays"
    return Check(True, reason, tuple(recorder.layers), leak)


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
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"its forward pass fails under the operator: {type(error).__name__}: {reason}") from error
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _switched(model: PreTrainedModel) -> Iterator[None]:
    """Route the text model's attention calls to `_attention_function`; restore every config afterwards."""
    register()
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    for config in list(configs.values()):
        parts = (getattr(config, name, None) for name in config.sub_configs)
        configs |= {id(part): part for part in parts if part is not None}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    text = model.config.get_text_config(decoder=True)
    names = [name for name in model.config.sub_configs if getattr(model.config, name, None) is text]
    try:
        model.set_attn_implementation({"": model.config._attn_implementation, names[0]: NAME} if names else NAME)
        if text._attn_implementation != NAME:
            raise InputError(f"{type(model).__name__} does not let its attention be exchanged")
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
