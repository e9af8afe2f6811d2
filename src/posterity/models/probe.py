"""The operator inside a causal language model of transformers, for the length of a `with`.

The way in is transformers' own registry of attention functions, with a mask function under the same name (without it,
padding, packing and sliding windows would be dropped silently). Nothing is believed: before anything is measured, a
probe of a few random tokens compares the logits, finds the layers, and looks for paths between positions outside them.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from posterity.errors import InputError
from posterity.models.masks import WRITTEN
from posterity.models.other_paths import find_leaks
from posterity.models.recompute import differ, rounding
from posterity.models.watch import NAME, Cut, Layer, Observer, Recorder, Watch, register, watches
from posterity.ops.horizon_rules import Rule, by_lag

SENSES = ("vision", "image", "audio", "speech")  # in the names of sub-configs
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
    watch = Watch(inner, found.layers, found.leaks, found.entries)
    watch.right_only = found.right_only
    with watch.installed(), _switched(inner, found.name):
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
    with Recorder(model, cut=True) as cut, _switched(model, name):
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
            with recorder, _switched(model, name), torch.enable_grad():
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
    with _switched(model, name):
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


@contextlib.contextmanager
def _switched(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Route the text model's attention calls to the operator's function; restore every config afterwards."""
    register(name)
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    for config in list(configs.values()):
        parts = (getattr(config, name, None) for name in config.sub_configs)
        configs |= {id(part): part for part in parts if part is not None}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    text = model.config.get_text_config(decoder=True)
    parts = [
        part for part in model.config.sub_configs if isinstance(getattr(model.config, part, None), PreTrainedConfig)
    ]
    if text is model.config:  # all but the towers that see and hear
        wanted = dict.fromkeys(["", *(part for part in parts if not any(sense in part for sense in SENSES))], name)
    else:
        own = next((part for part in parts if getattr(model.config, part) is text), None)
        wanted = name if own is None else {"": model.config._attn_implementation, own: name}
    try:
        model.set_attn_implementation(wanted)
        if text._attn_implementation != name:
            raise InputError(f"{type(model).__name__} does not let its attention be exchanged")
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
