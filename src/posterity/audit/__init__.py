"""The audit: does each clause of the idea hold on this model? One row a clause, one function a row.

A clause is added by writing one function from a `Subject` to a `Finding`, and naming it in `CLAUSES`.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import xarray as xr
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from posterity import corpus
from posterity.audit import futures, later_use, self_default, straight
from posterity.audit.clause import REFUSED, Clause, Finding, Plan, Subject
from posterity.audit.gradients import LOOK_AHEAD, LOOK_BACK, WEIGHTS
from posterity.audit.growth import GROWTH
from posterity.audit.many_readers import READERS
from posterity.audit.outcome import assemble
from posterity.errors import InputError
from posterity.measure import seeded
from posterity.models import first_device, language_model
from posterity.provenance import provenance

CLAUSES: tuple[Clause, ...] = (
    LOOK_BACK, LOOK_AHEAD, READERS, WEIGHTS, GROWTH,
    *later_use.CLAUSES, *self_default.CLAUSES, *straight.CLAUSES, *futures.CLAUSES,
)  # fmt: skip

RANDOM = "random weights"
CHARACTERS = 4_000_000  # of text that is read at most


def audit(
    model: nn.Module | Mapping[str, nn.Module],
    tokenizer: Any,
    documents: Any,
    *,
    quick: bool = False,
    rows: Sequence[int] | None = None,
    control: str | None = None,
    progress: bool = True,
    attrs: Mapping[str, object] | None = None,
    **changes: Any,
) -> xr.Dataset:
    """Ask of a model, clause by clause, whether what is commonly asserted of keys and values holds.

    Args:
        model: A causal language model of transformers, or several by name, which are set side by side (checkpoints of
            one training, say). Restored afterwards.
        tokenizer: Its tokenizer (for several models, one for all or one for each by name); None if `documents` are
            token ids.
        documents: As in `posterity.measure`.
        quick: Whether a first look is enough: a quarter of the passes or less.
        rows: Numbers of the clauses; all by default.
        control: "random": beside the model, one of the same config with random weights.
        progress: Whether to show progress bars on stderr.
        attrs: Provenance to add.
        changes: How much is measured (posterity.audit.clause.Plan), such as `contexts=(64, 128)` or `budget=512`. What
            is not given shrinks for a model that reads fewer tokens; the plan that was used is in `attrs`.

    Returns:
        `verdict` and `reason` (model, clause); `figure`, `error` and `baseline` (model, measure), each measure with its
        clause, formula and units; and what every row measured, in variables that begin with its name.

    Raises:
        InputError: Unknown rows or fields of the plan; as in `posterity.measure`, if no row can be measured. A single
            row that cannot is `not measured` in the table, with the reason.
    """
    chosen = _chosen(rows)
    plan = _planned(Plan.quick() if quick else Plan(), changes)
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    if not models:
        raise InputError("audit expects at least one model; got none")
    inner = {name: language_model(one) for name, one in models.items()}
    inner = {name or str((attrs or {}).get("model") or one.config._name_or_path or type(one).__name__): one
             for name, one in inner.items()}  # fmt: skip
    if control not in (None, "random"):
        raise InputError(f'control expects "random"; got {control!r}')
    plan = plan.fitted(min(map(_longest, inner.values())), changes)
    texts = _kept(documents)
    found: dict[str, dict[int, Finding]] = {}
    seconds: dict[int, float] = {}
    for name, one in inner.items():
        words = tokenizer[name] if isinstance(tokenizer, Mapping) else tokenizer
        several = len(inner) > 1 or control is not None
        found[name] = _findings(Subject(one, words, texts, plan, progress), chosen, name if several else "", seconds)
    first = next(iter(inner.values()))
    words = next(iter(tokenizer.values())) if isinstance(tokenizer, Mapping) else tokenizer
    if control is not None:
        random = random_control(first, plan.seed)
        found[RANDOM] = _findings(Subject(random, words, texts, plan, progress), chosen, RANDOM, seconds)
    spent = {"seconds_by_clause": ", ".join(f"{number}: {x:.0f}" for number, x in seconds.items())}
    return assemble(found, chosen, provenance(first) | spent | {"plan": repr(plan)} | dict(attrs or {}))


def _kept(documents: Any) -> list[tuple[str, Any]]:
    """As many named documents as the rows can use, read once: standard input cannot be read again."""
    kept: list[tuple[str, Any]] = []
    left = CHARACTERS
    for name, document in corpus.named(documents):
        if isinstance(document, corpus.Stream):
            pieces: list[str] = []
            for piece in document.pieces():
                pieces.append(piece)
                left -= len(piece)
                if left <= 0:
                    break
            document = "".join(pieces)
        else:
            left -= len(document) if hasattr(document, "__len__") else 0
        kept.append((name, document))
        if left <= 0:
            break
    return kept


def random_control(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same config with random weights, on the same device and in the same precision."""
    with seeded(seed):
        made = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    return made.to(first_device(model)).eval()  # type: ignore[arg-type]


def _findings(subject: Subject, clauses: Sequence[Clause], name: str, seconds: dict[int, float]) -> dict[int, Finding]:
    """What every clause finds on one model, in evaluation mode, without a random number of the caller's."""
    modes = [(module, module.training) for module in subject.model.modules()]
    found = {}
    try:
        subject.model.eval()
        with seeded(subject.plan.seed):
            for clause in clauses:
                if subject.shown:
                    Console(stderr=True).print(f"{name and name + ': '}{clause.number} · {clause.name}", style="bold")
                started = time.perf_counter()
                found[clause.number] = _finding(clause, subject)
                seconds[clause.number] = seconds.get(clause.number, 0.0) + time.perf_counter() - started
    finally:
        for module, mode in modes:
            module.training = mode
    if all(one.verdict == REFUSED for one in found.values()):
        raise InputError(next(iter(found.values())).reason)
    return found


def _finding(clause: Clause, subject: Subject) -> Finding:
    """What one clause finds; what it needs and this model or text has not is its reason, and the others go on."""
    try:
        found = clause.measure(subject)
    except InputError as error:
        return Finding((), REFUSED, str(error))
    if not any(one.error > 0 for one in found.figures):
        return replace(found, reason=f"{found.reason} (without standard errors: the values alone decide)")
    return found


def _longest(model: PreTrainedModel) -> int:
    """How many tokens a model reads at most, as far as its config says."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else sys.maxsize


def _chosen(rows: Sequence[int] | None) -> list[Clause]:
    numbers = [clause.number for clause in CLAUSES]
    wanted = numbers if rows is None else [rows] if isinstance(rows, int) else list(rows)
    if not wanted or not set(wanted) <= set(numbers):
        raise InputError(f"rows expects numbers from {numbers[0]} to {numbers[-1]}; got {rows!r}")
    return [clause for clause in CLAUSES if clause.number in wanted]


def _planned(plan: Plan, changes: Mapping[str, Any]) -> Plan:
    known = [one.name for one in fields(Plan)]
    unknown = set(changes) - set(known)
    if unknown:
        raise InputError(f"audit takes {', '.join(known)}; got {', '.join(sorted(unknown))}")
    return replace(plan, **changes)
