"""Kinds of steps that are compared: a plain training step, and accounts of increasing detail; and their tables."""

import contextlib
import statistics
import time

from rich.table import Table
from timing import ROUNDS, console, default_window, median_ratio, peak_memory, run_alone, seconds
from torch import nn

from posterity.measurement.account import account
from posterity.models.chunked_loss import ChunkedLoss, LMHead, window_losses
from posterity.models.language_model import freeze_parameters

LABELS = {
    "plain": "plain training step (all parameter gradients, sdpa)",
    "frozen": "plain step, frozen parameters",
    "self": "self/other split",
    "lags": "everything by lag, without the weights",
    "weights": "everything, with the weights",
}
HORIZONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SPLIT_LABELS = {
    "plain": LABELS["plain"],
    "frozen": LABELS["frozen"],
    "losses": "everything, with own and later losses",
    **{f"curve {k}": f"everything but the weights, with a horizon curve of {k} points" for k in (1, 3, 9)},
}
SPLITS = {  # own and later losses, horizons
    "losses": (True, ()),
    "long": (True, (4, 64)),
    **{f"curve {k}": (False, HORIZONS[-k:]) for k in (1, 3, 9)},
}
SAMPLE = 8  # positions of which each has a backward pass of its own
NOTE = "time: to the plain step; memory: peak of the process, to the plain step with frozen parameters"


@contextlib.contextmanager
def step_kind(name, model):
    """Yield a function that does one step of this kind on token ids."""
    if name == "plain":
        model.requires_grad_(True)
        yield lambda ids: (model.zero_grad(), window_losses(model, ids).sum().backward())
        model.zero_grad()
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(freeze_parameters(model))
        if name == "frozen":
            yield lambda ids: window_losses(model, ids).sum().backward()
            return
        lags, weights = "self" if name == "self" else "octaves", name in ("weights", "losses")
        ledger = stack.enter_context(account(model, lags, weights))
        if name in SPLITS:
            ledger.split_losses(*SPLITS[name], parameters=False)
        stack.enter_context(ledger.observe_forward())
        head = LMHead.probe(model)
        yield lambda ids: ledger.backward(ChunkedLoss.run(model, ids, head))


def seconds_in_turns(names, model, ids):
    """Seconds of each kind of step in every round; the first round and the first step of a kind warm up."""
    times = {name: [] for name in names}
    for _ in range(ROUNDS + 1):
        for name in names:
            with step_kind(name, model) as step:
                step(ids)  # an account checks the projections of its first window
                times[name].append(seconds(step, ids))
    return times


def steps():
    table = Table("SmolLM2-135M, one window", title="Time and peak memory of one step")
    contexts = (512, 1024)
    for context in contexts:
        table.add_column(f"{context}: time ratio", justify="right")
        table.add_column("memory ratio", justify="right")
    cells = {name: [] for name in LABELS}
    for context in contexts:
        times = seconds_in_turns(LABELS, *default_window(context))
        peaks = {name: run_alone(step_peak, name, context)["peak"] for name in LABELS}
        for name in LABELS:
            ratio = median_ratio(times[name], times["plain"])
            cells[name] += [f"{ratio:.2f}", f"{peaks[name] / peaks['frozen']:.2f}"]
        console.print(
            f"context {context}: plain step {statistics.median(times['plain'][1:]):.2f} s, "
            f"frozen step peak {peaks['frozen'] / 1e9:.2f} GB"
        )
    for name, label in LABELS.items():
        table.add_row(label, *cells[name])
    console.print(table)
    console.print(NOTE)


def losses():
    table = Table("SmolLM2-135M, one window of 512", "time ratio", "memory ratio", title="Who pays")
    model, ids = default_window(512)
    times = seconds_in_turns(SPLIT_LABELS, model, ids)
    peaks = {name: run_alone(step_peak, name, 512)["peak"] for name in SPLIT_LABELS}
    for name, label in SPLIT_LABELS.items():
        ratio, memory = median_ratio(times[name], times["plain"]), peaks[name] / peaks["frozen"]
        table.add_row(label, f"{ratio:.2f}", f"{memory:.2f}")
    ratio = seconds_by_position(model, ids) / statistics.median(times["plain"][1:])
    table.add_row(f"own losses by one backward pass per position (timed for {SAMPLE} of 511)", f"{ratio:.0f}", "")
    console.print(table)
    console.print(NOTE)


def seconds_by_position(model, ids):
    """Seconds for one forward pass and one backward pass per position, from a sample over the whole window."""
    with freeze_parameters(model):
        started = time.perf_counter()
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        position_losses = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        forward, count = time.perf_counter() - started, len(position_losses)
        started = time.perf_counter()
        for position in range(0, count, count // SAMPLE + 1):
            position_losses[position].backward(retain_graph=True)
        return forward + (time.perf_counter() - started) / SAMPLE * count


def step_peak(name, context):
    """Peak memory of a process that does two steps."""
    model, ids = default_window(int(context))
    with step_kind(name, model) as step:
        step(ids)
        step(ids)
    return {"peak": peak_memory()}
