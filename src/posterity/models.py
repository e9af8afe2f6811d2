"""The operator inside a causal language model of transformers, for the length of a `with`.

The way in is transformers' own registry of attention functions, with a mask function under the same name (without it,
padding, packing and sliding windows would be dropped silently). Nothing is believed: before anything is measured, a
probe of a few random tokens compares the logits, finds the layers, and looks for paths between positions outside them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterity.errors import InputError
from posterity.hook import NAME, Cut, Layer, Observer, Recorder, Watch, register, watches
from posterity.horizon import Rule, by_lag
from posterity.leaks import find_leaks
from posterity.replay import differ, rounding

_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Check:
    """Whether and how a model can be measured."""

    ok: bool
    reason: str
    layers: tuple[Layer, ...] = ()
    leaks: tuple[str, ...] = ()  # modules that carry information between positions outside attention

    @property
    def other_paths(self) -> bool:
        """Whether positions also communicate outside attention."""
        return bool(self.leaks)

    def __str__(self) -> str:
        """The answer in one line."""
        return f"{'can' if self.ok else 'cannot'} be measured: {self.reason}"


@contextlib.contextmanager
def watched(model: nn.Module, observe: Observer) -> Iterator[Watch]:
    """Inside, every attention layer of the model runs on the operator and reports its backward passes to `observe`.

    The forward pass is the model's own to rounding (verified on entry); the model is restored on exit, errors included.

    Raises:
        InputError: The model cannot be measured, with the reason.
    """
    with watching(model) as watch, watch.reporting(observe):
        yield watch


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[Watch]:
    """The watch over a model, new or that of an outer `with`."""
    inner = language_model(model)
    outer = next((watches[module] for module in inner.modules() if module in watches), None)
    if isinstance(outer, Watch):
        yield outer
        return
    found = check(inner)
    if not found.ok:
        raise InputError(f"this model {found}")
    modules = {layer.name: inner.get_submodule(layer.name) for layer in found.layers}
    watch = Watch(modules, found.layers, found.leaks)
    with watch.installed(), _switched(inner):
        yield watch


@contextlib.contextmanager
def horizon(
    model: nn.Module,
    rule: Rule,
    cut: str = "kv",
    streams: Sequence[str] = ("key", "value"),
    layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """Limit which later losses may shape keys and values, in any forward and backward passes of your own.

    The forward pass is untouched. Both passes must be inside the `with`. Horizons nest with each other where they do
    not contradict, and with `posterity.account`, which then counts what the horizon lets through.

    Args:
        model: A causal language model of transformers (or a wrapper around one); restored on exit.
        rule: `Full()`, `Myopic()`, `Discount(rate)`, `EdgeWindow(lags)`, or your own with a method `weight(lag)`.
        cut: "kv": the gradient at the key and value itself is cut, so that W_K and W_V learn only from what remains.
            "hidden": W_K and W_V keep all terms, but what is cut does not flow on into the hidden state that the
            attention module reads (Wu, Morris and Levine 2024, arXiv 2404.00859).
        streams: "key", "value" or both.
        layers: Numbers of attention layers, from 0; negative ones count from the end. All by default.

    Raises:
        InputError: A wrong argument; a model that cannot be measured or whose positions also communicate outside
            attention; a horizon that contradicts an outer one; no forward pass with gradients inside the `with`.
    """
    by_lag(rule, 2, torch.empty(0))
    if cut not in ("kv", "hidden"):
        raise InputError(f'cut expects "kv" or "hidden"; got {cut!r}')
    wanted = [streams] if isinstance(streams, str) else list(streams)
    if not wanted or not set(wanted) <= {"key", "value"}:
        raise InputError(f'streams expects "key", "value" or both; got {streams!r}')
    with watching(model) as watch:
        refuse_other_paths(watch, "a horizon")
        new = Cut(rule, cut, frozenset(wanted), _chosen(watch.layers, layers))
        for old in watch.cuts:
            if old.streams & new.streams and old.layers & new.layers and (old.rule, old.where) != (rule, cut):
                raise InputError(
                    f"this horizon ({rule}, cut={cut!r}) contradicts the one around it ({old.rule}, cut={old.where!r}) "
                    "for the same streams and layers: leave that `with` first, or choose others"
                )
        watch.cuts.append(new)
        try:
            yield
        finally:
            watch.cuts.remove(new)
            new.closed = True
        if not new.met:
            raise InputError(
                "a horizon changes gradients, but no forward pass with gradients came inside its `with`: call the "
                "model inside it, without torch.no_grad(), and let its parameters or inputs require gradients"
            )


def refuse_other_paths(watch: Watch, what: str) -> None:
    """Raise InputError if losses reach keys and values by paths that attention does not see."""
    if watch.other_paths:
        raise InputError(
            f"{what} needs every path between positions to go through attention, but {', '.join(watch.other_paths)} "
            "carries information between them too; only the ledger by lag is exact for this model"
        )


def _chosen(layers: tuple[Layer, ...], numbers: Sequence[int] | None) -> frozenset[Layer]:
    if numbers is None:
        return frozenset(layers)
    wanted = [numbers] if isinstance(numbers, int) else list(numbers)
    for number in wanted:
        if not isinstance(number, int) or isinstance(number, bool) or not -len(layers) <= number < len(layers):
            raise InputError(
                f"layers expects numbers from 0 to {len(layers) - 1}, or from the end with -1; got {number!r}"
            )
    if not wanted:
        raise InputError("layers expects at least one number; got none: leave it out for all layers")
    return frozenset(layers[number] for number in wanted)


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
    inside = model.modules() if isinstance(model, nn.Module) else ()
    found = next((module for module in inside if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise InputError(
            f"expected a causal language model of transformers; got {type(model).__name__}: load it with "
            "AutoModelForCausalLM.from_pretrained"
        )
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
    with Recorder(model, cut=True) as cut, _switched(model):
        leaks = find_leaks(model, cut, ids, first, tolerance)
    count = len(recorder.layers)
    reason = f"{count} attention layer{'s' if count > 1 else ''}"
    if leaks:
        reason += (
            f"; positions also communicate through {', '.join(leaks)}, so that only the ledger by lag is exact, "
            "not who pays"
        )
    return Check(True, reason, tuple(recorder.layers), leaks)


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
