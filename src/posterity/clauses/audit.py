"""audit(): measure every clause on one or several models, and assemble the findings as one Dataset."""

import hashlib
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import xarray as xr
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from posterity._version import __version__
from posterity.clauses.all_clauses import CLAUSES
from posterity.clauses.clause import Clause
from posterity.clauses.dataset import assemble
from posterity.clauses.saved_findings import SavedFindings
from posterity.clauses.subject import Plan, Subject
from posterity.errors import InputError
from posterity.inputs.arguments import open_model, split_arguments
from posterity.inputs.documents import TextStream, refuse_answers
from posterity.inputs.named_documents import name_documents, open_files
from posterity.inputs.windows import read_corpus
from posterity.measurement.distributed import Processes
from posterity.measurement.provenance import provenance
from posterity.measurement.run_state import fingerprint
from posterity.models.context_length import check_context
from posterity.models.language_model import evaluation_mode, language_model, max_tokens, randomize_weights, seed_rng
from posterity.results.audit_schema import REFUSED, Finding

RANDOM = "random weights"  # name of the control
MAX_CHARACTERS = 4_000_000  # of text that is read

Texts = list[tuple[str, Any]]  # names, and texts or token ids
Findings = dict[int, Finding]  # by the number of the clause


def audit(
    model: Any = "default",
    tokenizer: Any = None,
    documents: Any = None,
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
        model: As in `posterity.measure`: a model, or the name of one; or a mapping of labels to several, which are set
            side by side (checkpoints of one training, say). Restored afterwards.
        tokenizer: As in `posterity.measure`; for several models, one for all or one for each by label.
        documents: As in `posterity.measure`.
        quick: Take a first look: a quarter of the passes or less.
        rows: Numbers of the clauses; all by default.
        control: "random": beside the model, one of the same config with random weights.
        progress: Show progress bars on stderr.
        attrs: Provenance to add.
        state: A folder for the findings of an unfinished audit; where it holds some, the audit continues from there.
        processes: `posterity.Processes.join()` in each process that torchrun started: they share the rows
            and all return the same result. `documents` are read by the first of them only.
        changes: How much is measured (posterity.clauses.subject.Plan), such as `contexts=(64, 128)` or
            `pass_tokens=512`. Lengths that are not given shrink for a model that reads fewer tokens; the plan that was
            used is in `attrs`.

    Returns:
        `verdict` and `reason` (model, clause); `figure`, `error` and `baseline` (model, measure), each measure with its
        clause, formula and units; and what every clause measured, in variables that begin with the clause's prefix.

    Raises:
        InputError: Unknown rows or fields of the plan; as in `posterity.measure`, if no row can be measured. A single
            row that cannot is `not measured` in the table, with the reason.
    """
    clauses = _select_clauses(rows)
    plan = _change_plan(Plan.quick() if quick else Plan(), changes)
    if control not in (None, "random"):
        raise InputError(f'control expects "random"; got {control!r}')
    tokenizer, documents = split_arguments(tokenizer, documents)
    documents = open_files(documents)
    model, tokenizer, attrs = _open_models(model, tokenizer, attrs or {})
    models = _name_models(model, attrs)
    plan = plan.fit_to(_max_tokens(models.values(), plan.longest(changes)), changes)
    processes = processes or Processes()
    texts = processes.broadcast(lambda: _read_texts(documents))
    if control is not None:
        models[RANDOM] = randomize_weights(next(iter(models.values())), plan.seed)
    settings = {
        "version": __version__, "plan": repr(plan), "text": _digest(texts),
        "model": [] if state is None else [fingerprint(named_model) for named_model in models.values()],
    }  # fmt: skip
    saved = SavedFindings.open(state, settings, processes.rank)
    findings: dict[str, Findings] = {}
    seconds: dict[int, float] = {}
    with saved.hold_lock():
        for index, (name, named_model) in enumerate(models.items()):
            subject = Subject(named_model, _tokenizer_of(name, tokenizer), texts, plan, progress and processes.is_first)
            assigned = _assign_clauses(clauses, processes, index)
            title = f"{name}: " if len(models) > 1 else ""
            findings[name] = _measure_clauses(subject, assigned, title, saved, index, seconds)
    findings = _gather_findings(findings, clauses, processes)
    first_name, first_model = next(iter(models.items()))
    run_attrs = _run_attrs(seconds, processes, plan) | _coverage_attrs(
        texts, _tokenizer_of(first_name, tokenizer), plan
    )
    return processes.broadcast(lambda: assemble(findings, clauses, provenance(first_model) | run_attrs | dict(attrs)))


def _max_tokens(models: Collection[PreTrainedModel], length: int) -> int:
    """Return how many tokens all models read: what their configs say, or a length beyond it if they read that."""
    limit = min(map(max_tokens, models))
    try:
        for model in models if length > limit else ():
            check_context(model, length)
    except InputError:
        return limit
    return max(limit, length)


# ---- what is measured


def _select_clauses(rows: Sequence[int] | None) -> list[Clause]:
    numbers = [clause.number for clause in CLAUSES]
    selection = numbers if rows is None else [rows] if isinstance(rows, int) else list(rows)
    if not selection or not set(selection) <= set(numbers):
        raise InputError(f"rows expects numbers from {numbers[0]} to {numbers[-1]}; got {rows!r}")
    return [clause for clause in CLAUSES if clause.number in selection]


def _change_plan(plan: Plan, changes: Mapping[str, Any]) -> Plan:
    names = [field.name for field in fields(Plan)]
    unknown = set(changes) - set(names)
    if unknown:
        raise InputError(f"audit takes {', '.join(names)}; got {', '.join(sorted(unknown))}")
    return replace(plan, **changes)


def _open_models(model: Any, tokenizer: Any, attrs: Mapping[str, object]) -> tuple[Any, Any, Mapping[str, object]]:
    """Load the models that are named; return model, tokenizer and attributes in the form in which they came."""
    if not isinstance(model, Mapping):
        loaded = open_model(model, tokenizer)
        return loaded.model, loaded.tokenizer, loaded.attrs | dict(attrs)
    models = {
        label: open_model(value, tokenizer[label] if isinstance(tokenizer, Mapping) else tokenizer)
        for label, value in model.items()
    }
    return ({label: x.model for label, x in models.items()}, {label: x.tokenizer for label, x in models.items()}, attrs)


def _name_models(model: nn.Module | Mapping[str, nn.Module], attrs: Mapping[str, object]) -> dict[str, PreTrainedModel]:
    """Return the language models by name; one without a name is called as in `attrs`, or by its config."""
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    if not models:
        raise InputError("audit expects at least one model; got none")
    inner = {name: language_model(wrapper) for name, wrapper in models.items()}
    return {
        name or str(attrs.get("model") or module.config._name_or_path or type(module).__name__): module
        for name, module in inner.items()
    }


def _tokenizer_of(name: str, tokenizer: Any) -> Any:
    """Return the tokenizer of a model; the control has that of the first model."""
    if not isinstance(tokenizer, Mapping):
        return tokenizer
    return next(iter(tokenizer.values())) if name == RANDOM else tokenizer[name]


def _read_texts(documents: Any) -> Texts:
    """Read as many named documents as the clauses can use, once: standard input cannot be read again."""
    texts: Texts = []
    remaining = MAX_CHARACTERS
    for name, document in name_documents(documents):
        refuse_answers(name, document)
        if isinstance(document, TextStream):
            pieces: list[str] = []
            for piece in document.pieces():
                pieces.append(piece)
                remaining -= len(piece)
                if remaining <= 0:
                    break
            document = "".join(pieces)
        else:
            remaining -= len(document) if hasattr(document, "__len__") else 0
        texts.append((name, document))
        if remaining <= 0:
            break
    return texts


def _digest(texts: Texts) -> str:
    """Return the SHA-256 (hex) of names and contents."""
    digest = hashlib.sha256()
    for name, text in texts:
        content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else repr(list(text)).encode()
        digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogatepass") + content)
    return digest.hexdigest()


# ---- the measurement


def _assign_clauses(clauses: Sequence[Clause], processes: Processes, index: int) -> list[Clause]:
    """Return the clauses of the model of this index that this process measures.

    The costliest come first, each to the process with the least to do. Clauses that read the ledger stay together.
    """
    groups = [
        [clause for clause in clauses if clause.reads_ledger],
        *([clause] for clause in clauses if not clause.reads_ledger),
    ]
    groups.sort(key=lambda group: -sum(clause.cost for clause in group))
    loads = [0] * processes.count
    assigned: list[Clause] = []
    for group in groups:
        rank = loads.index(min(loads))
        loads[rank] += sum(clause.cost for clause in group)
        if (rank + index) % processes.count == processes.rank:
            assigned += group
    return sorted(assigned, key=lambda clause: clause.number)


def _measure_clauses(
    subject: Subject,
    clauses: Sequence[Clause],
    title: str,
    saved: SavedFindings,
    index: int,
    seconds: dict[int, float],
) -> Findings:
    """Measure clauses on one model, or load their saved findings; the caller's random number generators are restored.

    Args:
        subject: The model and its texts.
        clauses: Those of this process.
        title: What stands before a clause's name on stderr.
        saved: Findings of an earlier attempt; new ones are added.
        index: Number of the model among those of the audit.
        seconds: Time by the number of the clause; added to.
    """
    findings: Findings = {}
    with evaluation_mode(subject.model):
        for clause in clauses:
            finding = saved.load(index, clause.number)
            if finding is None:
                if subject.show_progress:
                    Console(stderr=True).print(f"{title}{clause.number} · {clause.name}", style="bold")
                start = time.perf_counter()
                with seed_rng(subject.plan.seed):
                    finding = _find(clause, subject)
                seconds[clause.number] = seconds.get(clause.number, 0.0) + time.perf_counter() - start
                saved.save(index, clause.number, finding)
            findings[clause.number] = finding
    return findings


def _find(clause: Clause, subject: Subject) -> Finding:
    """Return the finding of a clause; an InputError becomes the verdict "not measured", with its message as reason."""
    try:
        finding = clause.find(subject)
    except InputError as error:
        return Finding((), REFUSED, str(error))
    if not any(figure.error > 0 for figure in finding.figures):
        return replace(finding, reason=f"{finding.reason} (without standard errors: the values alone decide)")
    return finding


def _gather_findings(
    findings: Mapping[str, Findings], clauses: Sequence[Clause], processes: Processes
) -> dict[str, Findings]:
    """Merge the findings of all processes, clauses in order; raise InputError if one model has none but refusals."""
    parts = processes.all_gather(findings)
    merged = {
        name: {clause.number: next(part[name][clause.number] for part in parts if clause.number in part[name])
               for clause in clauses}
        for name in findings
    }  # fmt: skip
    for by_clause in merged.values():
        if all(finding.verdict == REFUSED for finding in by_clause.values()):
            raise InputError(next(iter(by_clause.values())).reason)
    return merged


def _coverage_attrs(texts: Texts, tokenizer: Any, plan: Plan) -> dict[str, int]:
    """Return what the windows of the plan's context leave out of the texts; nothing if there are none."""
    try:
        return read_corpus(texts, tokenizer, plan.context, plan.limit).coverage.attrs()
    except InputError:
        return {}


def _run_attrs(seconds: Mapping[int, float], processes: Processes, plan: Plan) -> dict[str, object]:
    """Return the provenance that the audit adds to that of the model."""
    total = {number: taken for part in processes.all_gather(seconds) for number, taken in part.items()}
    return {
        "seconds_by_clause": ", ".join(f"{number}: {total[number]:.0f}" for number in sorted(total)),
        "processes": processes.count,
        "plan": repr(plan),
    }
