"""What one type of model really is: its own eager path beside Posterity's, by every input that a mask can express.

Nothing of the package is used but its public functions. Both paths run wholly in float64, so that a difference is a
mistake and not rounding: models that compute norms, routers and softmax in float32 are made to use float64 there.
"""

import contextlib
import sys
from dataclasses import dataclass, field
from unittest import mock

import torch
from support.families import IMPOSSIBLE, build
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import posterity
from posterity import InputError

LENGTH, PADDING, FIRST = 20, 4, 9  # tokens of a row, padding tokens, length of the first of two packed documents
POSITION = 7  # of the loss that is sent back alone
# float64 has 16 digits. Sums of up to 1e3 terms over some 30 operations in a row, each of condition up to 1e2, leave 9.
TOLERANCE = 1e-9


@dataclass
class Verdict:
    """The class of a type, why, and what its run showed."""

    kind: str  # exact, ledger only, refused, not built; or wrong, which no type may be
    reason: str = ""
    traits: list[str] = field(default_factory=list)  # what is special in it
    uses_interface: bool = True  # whether its attention goes through transformers' interface
    error: float = 0.0  # the largest relative difference seen


class _Double(TorchFunctionMode):
    """Gives float64 to what asks for float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is FLOAT:
            func = torch.Tensor.double
        return func(*map(widened, args), **{name: widened(x) for name, x in (kwargs or {}).items()})


FLOAT, TO = torch.Tensor.float, torch.Tensor.to


def widened(x):
    return torch.float64 if x is torch.float32 else x


def widened_to(x, *args, **kwargs):
    return TO(x, *map(widened, args), **{name: widened(x) for name, x in kwargs.items()})


@contextlib.contextmanager
def double():
    """Compute in float64 what a model computes in float32; by its methods too, for backward passes know no mode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            _Double(),
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
            mock.patch.object(torch.Tensor, "to", widened_to),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class Call:
    """Arguments of the eager attention function, and the gradients that autograd left at them."""

    module: torch.nn.Module
    streams: list[torch.Tensor]  # query, key, value, each a tensor of this call alone
    shared: list[torch.Tensor]  # the same as the model has them, which other calls may read too
    mask: torch.Tensor | None
    options: dict


@contextlib.contextmanager
def record_calls():
    """Record the calls of the eager attention functions of all modelling files."""
    calls, before = [], []

    def around(eager):
        def attend(module, query, key, value, attention_mask, *args, **kwargs):
            streams = [x.view_as(x) for x in (query, key, value)]
            for x in (*streams, query, key, value):
                if x.requires_grad:
                    x.retain_grad()
            calls.append(Call(module, streams, [query, key, value], attention_mask, kwargs))
            return eager(module, *streams, attention_mask, *args, **kwargs)

        return attend

    for name, file in list(sys.modules.items()):
        if name.startswith("transformers.models.") and "eager_attention_forward" in vars(file):
            before.append((file, file.eager_attention_forward))
            file.eager_attention_forward = around(file.eager_attention_forward)
    try:
        yield calls
    finally:
        for file, eager in before:
            file.eager_attention_forward = eager


def inputs(vocabulary):
    """Named model inputs of two rows, each with labels."""
    ids = torch.randint(3, vocabulary, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    batches = {"plain": {"input_ids": ids, "labels": ids}}
    for name in ("padding on both sides", "padding on the right"):
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[0, -PADDING:] = 0
        if name == "padding on both sides":
            mask[1, :PADDING] = 0
            labels[1, PADDING] = -100  # the last padding token would predict it
        labels[mask == 0] = -100
        batches[name] = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    positions = torch.cat((torch.arange(FIRST), torch.arange(LENGTH - FIRST))).expand(2, -1)
    return batches | {"packed documents": {"input_ids": ids, "labels": ids, "position_ids": positions}}


def nll(logits, labels):
    """Negative log-likelihood of the next token, (row, position)."""
    flat = logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="none").view(len(labels), -1)


class InputGates:
    """Lets no gradient pass from attention modules on to their inputs while `closed`."""

    def __init__(self, model):
        self.closed = False
        self.hooks = [module.register_forward_pre_hook(self.enter, with_kwargs=True) for module in model.modules()]

    def enter(self, module, args, kwargs):
        if "attention" not in type(module).__name__.lower():
            return None
        return tree_map(self.gate, args), {name: self.gate(x) for name, x in kwargs.items()}

    def gate(self, x):
        if not isinstance(x, torch.Tensor) or not x.requires_grad:
            return x
        inside = x.view_as(x)
        inside.register_hook(lambda grad: torch.zeros_like(grad) if self.closed else grad)
        return inside


def total_gradients(calls):
    """What all calls that read a query, key or value of the model send to it, by its id."""
    totals = {}
    for call in calls:
        for x, shared in zip(call.streams, call.shared, strict=True):
            totals[id(shared)] = totals.get(id(shared), 0) + x.grad
    return totals


def weight_norms(calls, rows):
    """Squared norms of what each query, key and value sends to the projections of its module: (row, call, stream).

    Of all calls that read it; NaN but for the first of them, and where no projection made it.
    """
    seen, norms = set(), torch.full((rows, len(calls), 3), torch.nan)
    for number, call in enumerate(calls):
        parameters = projections(call.module)
        for stream, x in enumerate(call.shared):
            if id(x) in seen or not x.requires_grad or not parameters:
                continue
            seen.add(id(x))
            for row in range(rows):
                grad = torch.zeros_like(x.grad)
                grad[row] = x.grad[row]
                grads = torch.autograd.grad(x, parameters, grad, retain_graph=True, allow_unused=True)
                squares = [g.square().sum() for g in grads if g is not None]
                norms[row, number, stream] = sum(squares) if squares else torch.nan
    return norms


def projections(module):
    """Weights and biases inside an attention module, but for norms and other vectors."""
    parts = [list(part.parameters(recurse=False)) for part in module.modules()]
    return [x for part in parts if any(x.dim() > 1 for x in part) for x in part]


def run(model, batch, retain_graph=False):
    """(logits, loss, gradients by parameter) of one forward and backward pass."""
    model.zero_grad()
    output = model(**batch, use_cache=False)
    loss = output.loss if output.loss is not None else nll(output.logits, batch["labels"]).mean()
    loss.backward(retain_graph=retain_graph)
    grads = {name: None if x.grad is None else x.grad.clone() for name, x in model.named_parameters()}
    return output.logits.detach(), loss.detach(), grads


@dataclass
class EagerPass:
    """What the model's own eager path gives for one input."""

    logits: torch.Tensor
    loss: torch.Tensor
    grads: dict
    calls: list[Call]
    credit: (
        torch.Tensor
    )  # of each call that has gradients, at the query, key and value that the model has: (call, stream)
    weight_norms: torch.Tensor | None = None  # (row, call, stream)


def eager_pass(model, batch, weights=False):
    """One forward and backward pass of the model's own eager path; `weights` takes two more for each gradient."""
    gates = InputGates(model) if weights else None
    with record_calls() as calls:
        logits, loss, grads = run(model, batch, retain_graph=weights)
    with_grad = [call for call in calls if call.streams[0].grad is not None]
    totals = total_gradients(with_grad)
    credit = torch.tensor(
        [
            [(x.grad * totals[id(shared)]).sum() for x, shared in zip(call.streams, call.shared, strict=True)]
            for call in with_grad
        ]
    )
    norms = None
    if gates is not None:
        gates.closed = True
        norms = weight_norms(with_grad, len(batch["input_ids"]))
        for hook in gates.hooks:
            hook.remove()
    return EagerPass(logits, loss, grads, calls, credit, norms)


def relative_difference(x, y, scale=None):
    """Largest difference, relative to the largest number; infinite if something is not a number."""
    scale = y.abs().max() if scale is None else scale
    difference = ((x - y).abs().max() / scale.clamp(min=1e-300)).item()
    return difference if difference == difference else float("inf")


def compare(model, batch, eager, weights):
    """Errors of one input, by name."""
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    with posterity.account(model, weights=weights) as ledger:
        ours = run(model, batch)
    errors = {
        "logits": relative_difference(ours[0][real], eager.logits[real]),
        "loss": relative_difference(ours[1], eager.loss),
    }
    zero = torch.zeros(())
    largest = max(x.abs().max() for x in eager.grads.values() if x is not None)
    for name, eager_grad in eager.grads.items():
        grad, eager_grad = (zero if x is None else x for x in (ours[2][name], eager_grad))
        errors[f"gradient of {name}"] = relative_difference(grad, eager_grad, largest)
    result = ledger.result()
    credit = torch.tensor(result.credit.sum(("head", "reader_of", "lag")).values)
    if len(eager.credit) != len(credit):
        return errors | {f"{len(credit)} calls accounted for instead of {len(eager.credit)}": float("inf")}
    for number, (layer_credit, eager_credit) in enumerate(zip(credit, eager.credit, strict=True)):
        errors[f"balance of call {number}"] = relative_difference(layer_credit, eager_credit)
    if weights:
        errors["balance of the weights"] = weight_error(result, eager.weight_norms)
    return errors


def weight_error(result, norms):
    """How far |self + other|² of W_Q, W_K and W_V is from autograd's own gradient, (row, call, stream)."""
    own, other, inner = torch.tensor(result.weight_by_document.transpose("term", ...).values)
    squares = own + other + 2 * inner
    if not torch.equal(squares.isnan(), norms.isnan()):
        return float("inf")
    return relative_difference(squares.nan_to_num(), norms.nan_to_num())


def eager_own_loss(model, ids):
    """Credit of the loss at `POSITION` in its own keys and values, (call, key or value)."""
    with record_calls() as calls:
        losses = nll(model(input_ids=ids, use_cache=False).logits, ids)
        losses[0, POSITION].backward(retain_graph=True)
        calls = [call for call in calls if call.streams[0].grad is not None]
        own = [[x.grad[0, :, POSITION].clone() for x in call.streams[1:]] for call in calls]
        for x in (x for call in calls for x in call.streams):
            x.grad = None
        losses.sum().backward()
        totals = total_gradients(calls)
        total = [[totals[id(x)][0, :, POSITION] for x in call.shared[1:]] for call in calls]
    return torch.tensor(
        [[(x * y).sum() for x, y in zip(*grads, strict=True)] for grads in zip(own, total, strict=True)]
    )


def own_loss(model, ids):
    """The same from Posterity."""
    result = posterity.measure(model, None, ids, context=LENGTH, losses=True, weights=False, progress=False)
    credit = result.loss_credit.isel(part=0, position=POSITION).sum("head").transpose("layer", ...)
    return torch.tensor(credit.values)


def verify(name):
    """The verdict on one type."""
    if name in IMPOSSIBLE:
        return Verdict("not built", IMPOSSIBLE[name])
    with double():
        model = build(name, torch.float64)
        answer = posterity.check(model)
        if not answer.ok:
            return Verdict("refused", answer.reason, uses_interface=calls_interface(model))
        verdict = Verdict("ledger only" if answer.uncut_paths else "exact", ", ".join(answer.other_paths))
        batches = inputs(model.config.get_text_config().vocab_size)
        eager = {what: eager_pass(model, batch, weights=what == "plain") for what, batch in batches.items()}
        verdict.traits = traits(model, eager["plain"].calls)
        if "written out" in answer.reason:
            verdict.traits.append("its N × N mask")
        if not isolates(model, batches["packed documents"], eager["packed documents"].logits):
            verdict.traits.append("packed documents see each other")
        ids = batches["plain"]["input_ids"][:1]
        eager_credit = None if answer.uncut_paths else eager_own_loss(model, ids)
        errors = {}
        with posterity.account(model, weights=False):  # one probe for all that follows
            for what, batch in batches.items():
                if what != "padding on the right" or "padding on the right only" in verdict.traits:
                    input_errors = attempt(model, batch, eager[what], what, verdict.traits)
                    errors |= {f"{what}: {error}": size for error, size in input_errors.items()}
            if eager_credit is not None:
                errors["own loss"] = relative_difference(own_loss(model, ids), eager_credit)
            else:
                with contextlib.suppress(InputError):
                    own_loss(model, ids)
                    errors["who pays is not refused"] = float("inf")
    worst = max(errors, key=errors.__getitem__)
    verdict.error = errors[worst]
    if verdict.error > TOLERANCE:
        verdict.kind, verdict.reason = "wrong", f"{worst} is off by {verdict.error:.1e}"
    return verdict


def attempt(model, batch, eager, what, traits):
    """Errors of one input; what is refused of it goes to the traits."""
    try:
        return compare(model, batch, eager, weights=what == "plain")
    except InputError as error:
        if "measure without the weights" in str(error):
            traits.append("no split of the weights")
            return compare(model, batch, eager, weights=False)
        if "put the padding on the right" in str(error) and what == "padding on both sides":
            traits.append("padding on the right only")
        elif "packed documents are not measured" in str(error) and what == "packed documents":
            traits.append("no packed documents")
        else:
            raise
        return {}


def row(name, verdict):
    """The line of one type in docs/models.md."""
    words = "; ".join(x for x in (verdict.reason, ", ".join(verdict.traits)) if x)
    return f"| {name} | {verdict.kind} | {words.replace('|', '∣')} |"


def calls_interface(model):
    """Whether a plain forward pass of the type comes through transformers' attention interface."""
    ids = torch.arange(4 * LENGTH).view(4, LENGTH) % 60 + 3  # four rows: for four streams of tokens at once
    with record_calls() as calls, contextlib.suppress(Exception), torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return bool(calls)


def isolates(model, batch, logits):
    """Whether, in the model itself, a packed document does not depend on the one before."""
    ids = batch["input_ids"].clone()
    ids[:, 0] = (ids[:, 0] + 1) % 60 + 3
    with torch.no_grad():
        other = model(**batch | {"input_ids": ids}, use_cache=False).logits
    return relative_difference(other[:, FIRST:], logits[:, FIRST:]) < TOLERANCE


def traits(model, calls):
    """What is special in the attention of a type, from the calls of a plain forward pass of two rows."""
    names = []
    modules = [call.module for call in calls]
    shapes = {(call.streams[1].shape[-1], call.streams[2].shape[-1]) for call in calls}
    owners = {}
    for call in calls:
        owners.setdefault(id(call.shared[1]), set()).add(call.module)
    towers = [getattr(model.config, part, None) for part in model.config.sub_configs]
    towers = [part for part in towers if part is not None and part is not model.config.get_text_config(decoder=True)]
    if any(part is getattr(module, "config", None) for module in model.modules() for part in towers):
        names.append("language tower only")
    names += dict.fromkeys(x for call in calls for x in mask_traits(call.mask))
    for name, words in (("s_aux", "sinks"), ("sinks", "sinks of each query"), ("softcap", "soft-cap")):
        if any(call.options.get(name) is not None for call in calls):
            names.append(words)
    if any(call.options.get("position_bias") is not None for call in calls):
        names.append("position bias")
    if any(key != value for key, value in shapes):
        names.append("keys wider than values" if all(k >= v for k, v in shapes) else "values wider than keys")
    if any(len(modules_of_key) > 1 for modules_of_key in owners.values()):
        names.append("keys and values shared by layers")
    if len(set(modules)) < len(modules):
        names.append("modules called several times")
    if any(not call.streams[0].requires_grad for call in calls):
        names.append("some calls without gradient")
    return names


def mask_traits(mask):
    """What a mask (two rows, head, query, key) shows."""
    if mask is None or mask.dim() != 4:
        return
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if mask.dtype != torch.bool and mask.masked_fill(~allowed, 0).any():
        yield "learned mask"
    if len(allowed) > 1 and (allowed[0] != allowed[1]).any():
        yield "keys chosen by content"
        return
    visible = allowed[0, 0].sum(-1)
    if (visible < torch.arange(1, len(visible) + 1)).any():
        yield "sliding window" if (visible.diff() >= 0).all() else "chunks"
