"""The audit: does each clause of the idea hold on this model? One row a clause, one function a row.

A clause is added by writing one function from a `Subject` to a `Finding`, and naming it in `CLAUSES`.
"""

import hashlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import xarray as xr
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from posterity._version import __version__
from posterity.clauses import futures, later_use, self_default
from posterity.clauses import linearity as straight
from posterity.clauses.clause import Clause, Plan, Subject
from posterity.clauses.context_growth import GROWTH
from posterity.clauses.credit_shares import LOOK_AHEAD, LOOK_BACK, WEIGHTS
from posterity.clauses.dataset import assemble
from posterity.clauses.readers import READERS
from posterity.clauses.saved_findings import Kept
from posterity.errors import InputError
from posterity.inputs import windows as corpus
from posterity.measurement.distributed import Processes
from posterity.measurement.provenance import provenance
from posterity.measurement.run_state import fingerprint
from posterity.models.language_model import first_device, language_model, seeded
from posterity.results.audit_schema import REFUSED, Finding

CLAUSES: tuple[Clause, ...] = (
    LOOK_BACK, LOOK_AHEAD, READERS, WEIGHTS, GROWTH,
    *later_use.CLAUSES, *self_default.CLAUSES, *straight.CLAUSES, *futures.CLAUSES,
)  # fmt: skip

RANDOM = "random weights"
TOGETHER = {1, 2, 4}  # they read one measurement
COST = {5: 3, 6: 8, 8: 3}  # of a row on the default model, where it is not about 1
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
    state: str | os.PathLike[str] | None = None,
    processes: Processes | None = None,
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
        state: A folder that keeps what each row found; where it holds some, the audit goes on from there.
        processes: `posterity.Processes.join()` in each process that torchrun started: they share the rows
            and all return the same result. `documents` are read by the first of them only.
        changes: How much is measured (posterity.clauses.clause.Plan), such as `contexts=(64, 128)` or `budget=512`. What
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
    processes = processes or Processes()
    texts = processes.agreed(lambda: _read(documents))
    if control is not None:
        inner[RANDOM] = random_control(next(iter(inner.values())), plan.seed)
    settings = {
        "version": __version__, "plan": repr(plan), "text": _digest(texts),
        "model": [] if state is None else [fingerprint(one) for one in inner.values()],
    }  # fmt: skip
    kept = Kept(state, settings, processes.rank)
    shown = progress and processes.first
    found: dict[tuple[str, int], Finding] = {}
    seconds: dict[int, float] = {}
    with kept.kept():
        for number, (name, one) in enumerate(inner.items()):
            words = next(iter(tokenizer.values())) if isinstance(tokenizer, Mapping) and name == RANDOM else tokenizer
            words = words[name] if isinstance(words, Mapping) else words
            subject = Subject(one, words, texts, plan, shown)
            mine = _share(chosen, processes, number)
            findings = _findings(subject, mine, name if len(inner) > 1 else "", seconds, kept, number)
            found |= {(name, clause): finding for clause, finding in findings.items()}
    found = {at: one for some in processes.every(found) for at, one in some.items()}
    took = {clause: x for some in processes.every(seconds) for clause, x in some.items()}
    by_model = {name: {clause.number: found[name, clause.number] for clause in chosen} for name in inner}
    for findings in by_model.values():
        if all(one.verdict == REFUSED for one in findings.values()):
            raise InputError(next(iter(findings.values())).reason)
    known = {
        "seconds_by_clause": ", ".join(f"{clause}: {took[clause]:.0f}" for clause in sorted(took)),
        "processes": processes.count, "plan": repr(plan),
    }  # fmt: skip
    first = next(iter(inner.values()))
    return processes.agreed(lambda: assemble(by_model, chosen, provenance(first) | known | dict(attrs or {})))


def _share(chosen: Sequence[Clause], processes: Processes, model: int) -> list[Clause]:
    """The rows of one model that this process measures: the dearest first, each to the process with the least to do.

    Rows that read the same measurement stay together.
    """
    groups = [
        [one for one in chosen if one.number in TOGETHER],
        *([one] for one in chosen if one.number not in TOGETHER),
    ]
    groups.sort(key=lambda group: -sum(COST.get(one.number, 1) for one in group))
    loads = [0] * processes.count
    mine: list[Clause] = []
    for group in groups:
        least = loads.index(min(loads))
        loads[least] += sum(COST.get(one.number, 1) for one in group)
        if (least + model) % processes.count == processes.rank:
            mine += group
    return sorted(mine, key=lambda one: one.number)


def _digest(texts: list[tuple[str, Any]]) -> str:
    """SHA-256 (hex) of names and contents."""
    state = hashlib.sha256()
    for name, text in texts:
        content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else repr(list(text)).encode()
        state.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogatepass") + content)
    return state.hexdigest()


def _read(documents: Any) -> list[tuple[str, Any]]:
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


def _findings(
    subject: Subject, clauses: Sequence[Clause], name: str, seconds: dict[int, float], kept: Kept, model: int
) -> dict[int, Finding]:
    """What every clause finds on one model, in evaluation mode, without a random number of the caller's."""
    modes = [(module, module.training) for module in subject.model.modules()]
    found = {}
    try:
        subject.model.eval()
        for clause in clauses:
            before = kept.get(model, clause.number)
            if before is not None:
                found[clause.number] = before
                continue
            if subject.shown:
                Console(stderr=True).print(f"{name and name + ': '}{clause.number} · {clause.name}", style="bold")
            started = time.perf_counter()
            with seeded(subject.plan.seed):
                found[clause.number] = _finding(clause, subject)
            seconds[clause.number] = seconds.get(clause.number, 0.0) + time.perf_counter() - started
            kept.put(model, clause.number, found[clause.number])
    finally:
        for module, mode in modes:
            module.training = mode
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
