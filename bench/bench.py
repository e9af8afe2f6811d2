"""`make bench`: the table of the README. Time as ratios of medians taken in turns; memory in a process of its own each.

python bench/bench.py            all of it (about 40 minutes on two cores)
python bench/bench.py steps      ratio to a plain training step on SmolLM2-135M
python bench/bench.py payers     own and later losses, the horizon curve, and one backward pass per position
python bench/bench.py naive      the same lag profile with eager attention and everything kept
python bench/bench.py long       a two-layer model at long contexts
python bench/bench.py context    memory on SmolLM2-135M up to 8192 tokens, beside what was estimated (12 GB)
python bench/bench.py precision  bfloat16, float16 and autocast beside float32, on SmolLM2-135M
python bench/bench.py sweep      the accounts of one layer beside torch's fused attention of the same layer
python bench/bench.py monitor    training with a Monitor at its default
"""

import contextlib
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    TrainerCallback,
    TrainingArguments,
)
from transformers.masking_utils import eager_mask
from transformers.trainer_callback import PrinterCallback

from posterity import Monitor, Trainer, attention
from posterity.decomposition.credit import Bins, self_part, tally
from posterity.decomposition.lag_sums import Scratch
from posterity.inputs import model as loading
from posterity.inputs import windows as corpus
from posterity.measurement.account import account
from posterity.measurement.estimate import estimate
from posterity.measurement.loss_split import Payers
from posterity.measurement.measure import measure
from posterity.models.attach import watched
from posterity.models.chunked_loss import Head, Sending, run
from posterity.models.language_model import frozen
from posterity.ops.fused_kernels import CPU
from posterity.results import stats as derived
from posterity.training import run as runs

ROUNDS = 5
EXACT = "float64"  # what the other precisions are compared with
PRECISIONS = {
    EXACT: torch.float64,
    "float32": torch.float32,
    "autocast": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LABELS = {
    "plain": "plain training step (all parameter gradients, sdpa)",
    "frozen": "plain step, frozen parameters",
    "self": "self/other split",
    "lags": "everything by lag, without the weights",
    "weights": "everything, with the weights",
}
HORIZONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PAYERS = {
    "plain": LABELS["plain"],
    "frozen": LABELS["frozen"],
    "losses": "everything, with own and later losses",
    **{f"curve {k}": f"everything but the weights, with a horizon curve of {k} points" for k in (1, 3, 9)},
}
WHO_PAYS = {"losses": (True, ()), "long": (True, (4, 64)), **{f"curve {k}": (False, HORIZONS[-k:]) for k in (1, 3, 9)}}
SWEEPS = tuple(
    (heads, groups, dim, context)
    for context in (1024, 4096)
    for heads, groups, dim in ((9, 3, 64), (9, 9, 64), (32, 32, 128))
)
SWEEP_ROUNDS = 5
console = Console(width=130)


def window(context):
    loaded = loading.load_model(None)
    return loaded.model, corpus.windows([corpus.default_text()], loaded.tokenizer, context, 1)[0].ids[None]


@contextlib.contextmanager
def mode(name, model):
    """Inside, one call of what is yielded is one step of this kind."""
    if name == "plain":
        model.requires_grad_(True)
        yield lambda ids: (model.zero_grad(), run(model, ids).sum().backward())
        model.zero_grad()
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        if name in WHO_PAYS:
            losses, horizons = WHO_PAYS[name]
            ledger = stack.enter_context(account(model, "octaves", name == "losses"))
            payers = Payers(model, ledger.watch, losses, horizons, False, ledger.sums)
            stack.enter_context(payers.watching())
            head = Head(model)
            yield lambda ids: payers.send(Sending(model, ids, head))
            return
        if name == "frozen":
            yield lambda ids: run(model, ids).sum().backward()
            return
        stack.enter_context(account(model, "self" if name == "self" else "octaves", name == "weights"))
        head = Head(model)
        yield lambda ids: Sending(model, ids, head).backward()


def timed(step, ids):
    started = time.perf_counter()
    step(ids)
    return time.perf_counter() - started


def steps():
    table = Table("SmolLM2-135M, one window", title="Time and peak memory of one step")
    contexts = (512, 1024)
    for context in contexts:
        table.add_column(f"{context}: time ratio", justify="right")
        table.add_column("memory ratio", justify="right")
    cells = {name: [] for name in LABELS}
    for context in contexts:
        model, ids = window(context)
        seconds = in_turns(LABELS, model, ids)
        ratio = {name: paired(seconds[name], seconds["plain"]) for name in LABELS}
        peak = {name: alone("peak", name, context)["peak"] for name in LABELS}
        for name in LABELS:
            cells[name] += [f"{ratio[name]:.2f}", f"{peak[name] / peak['frozen']:.2f}"]
        console.print(
            f"context {context}: plain step {statistics.median(seconds['plain'][1:]):.2f} s, "
            f"frozen step peak {peak['frozen'] / 1e9:.2f} GB"
        )
    for name, label in LABELS.items():
        table.add_row(label, *cells[name])
    console.print(table)
    console.print("time: to the plain step; memory: peak of the process, to the plain step with frozen parameters")


def payers():
    table = Table("SmolLM2-135M, one window of 512", "time ratio", "memory ratio", title="Who pays")
    model, ids = window(512)
    seconds = in_turns(PAYERS, model, ids)
    peaks = {name: alone("peak", name, 512)["peak"] for name in PAYERS}
    for name, label in PAYERS.items():
        ratio, memory = paired(seconds[name], seconds["plain"]), peaks[name] / peaks["frozen"]
        table.add_row(label, f"{ratio:.2f}", f"{memory:.2f}")
    each = one_by_one(model, ids) / statistics.median(seconds["plain"][1:])
    table.add_row("own losses by one backward pass per position (timed for 8 of 511)", f"{each:.0f}", "")
    console.print(table)
    console.print("time: to the plain step; memory: peak of the process, to the plain step with frozen parameters")


def one_by_one(model, ids):
    """Seconds for one forward pass and one backward pass per position, from 8 positions over the whole window."""
    with frozen(model):
        started = time.perf_counter()
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        forward = time.perf_counter() - started
        started = time.perf_counter()
        for position in range(0, len(losses), len(losses) // 8 + 1):
            losses[position].backward(retain_graph=True)
        return forward + (time.perf_counter() - started) / 8 * len(losses)


def in_turns(names, model, ids):
    """Seconds of each kind of step in every round; the first round warms up."""
    seconds = {name: [] for name in names}
    for _ in range(ROUNDS + 1):
        for name in names:
            with mode(name, model) as step:
                seconds[name].append(timed(step, ids))
    return seconds


def paired(ours, plain):
    """Median over the rounds of the ratio within a round; the first round warms up."""
    return statistics.median(mine / step for mine, step in zip(ours[1:], plain[1:], strict=True))


def peak(name, context):
    """Peak memory of a process that does two steps."""
    model, ids = window(int(context))
    with mode(name, model) as step:
        step(ids)
        step(ids)
    return {"peak": resident()}


def resident():
    """Peak memory of this process. A child's ru_maxrss begins at its parent's, so Linux is asked another way."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def alone(*arguments):
    """Run one measurement in a process of its own; None where it ran out of memory."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        if done.returncode == -9 or "allocate" in done.stderr:
            return None
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def naive():
    table = Table(
        "context", "Posterity: s", "GB", "eager with hooks: s", "GB", "time", "memory", "largest disagreement"
    )
    table.title = "The lag profile of all three streams, SmolLM2-135M"
    for context in (256, 512, 1024, 2048):
        ours, theirs = alone("profile", "ours", context), alone("profile", "eager", context)
        row = [str(context), f"{ours['seconds']:.1f}", f"{ours['peak'] / 1e9:.1f}"]
        if theirs is None:
            row += ["out of memory", "", "", "", ""]
        else:
            off = torch.tensor(ours["credit"]) - torch.tensor(theirs["credit"])
            off = off.abs().max() / torch.tensor(theirs["credit"]).abs().max()
            row += [f"{theirs['seconds']:.1f}", f"{theirs['peak'] / 1e9:.1f}"]
            row += [
                f"{theirs['seconds'] / ours['seconds']:.1f} x",
                f"{theirs['peak'] / ours['peak']:.1f} x",
                f"{off:.0e}",
            ]
        table.add_row(*row)
    console.print(table)


def profile(name, context):
    """Credit by lag of all layers and heads, in two ways: seconds of the second pass, peak memory, sums over heads."""
    model, ids = window(int(context))
    for _ in range(2):
        if name == "ours":
            with frozen(model), account(model, "all", weights=False) as ledger:
                started = time.perf_counter()
                run(model, ids).sum().backward()
                seconds = time.perf_counter() - started
            credit = torch.from_numpy(ledger.result().credit.sum("head").values)
        else:
            started = time.perf_counter()
            credit = eager_profile(model, ids)
            seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": resident(), "credit": credit.tolist()}


def eager_profile(model, ids):
    """What one would write today: eager attention, patterns and their gradients kept, N x N products afterwards."""
    kept = []

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        share = query.shape[1] // key.shape[1]
        key_, value_ = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        pattern = torch.softmax(query @ key_.mT * scaling + attention_mask, -1)
        output = pattern @ value_
        for x in (query, key, value, pattern, output):
            x.retain_grad()
        kept.append((query, key, value, pattern, output, scaling, share))
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("kept", attend)
    AttentionMaskInterface.register("kept", eager_mask)
    model.set_attn_implementation("kept")
    with frozen(model):
        run(model, ids).sum().backward()
    model.set_attn_implementation("sdpa")
    profiles = []
    for query, key, value, pattern, output, scaling, share in kept:
        weight = pattern.detach()
        score = scaling * weight * (pattern.grad - (pattern.grad * weight).sum(-1, keepdim=True))
        key_grad, value_grad = key.grad.repeat_interleave(share, 1), value.grad.repeat_interleave(share, 1)
        credits = (
            score * (query.grad @ key.detach().repeat_interleave(share, 1).mT),
            score * (query.detach() @ key_grad.mT),
            weight * (output.grad @ value_grad.mT),
        )
        by_lag = [torch.stack([x.diagonal(-lag, -2, -1).sum() for lag in range(x.shape[-1])]) for x in credits]
        profiles.append(torch.stack(by_lag))
    return torch.stack(profiles)


def long():
    table = Table("context", "step: s", "accounts / fused", "peak GB", "KB a token")
    for kind in ("window of 512", "who pays"):
        for column in (f"{kind}: s", "peak GB", "KB a token"):
            table.add_column(column)
    table.title = (
        "Two layers of 9 heads of 64, everything by lag and the weights; the same with a sliding window; "
        "with own and later losses and two horizons"
    )
    before = None
    for context in (2048, 4096, 8192, 16384, 32768):
        found = {"context": context, **alone("two_layers", context)}
        for kind in ("sliding", "paid"):
            found |= {f"{kind} {name}": x for name, x in alone(f"two_layers_{kind}", context).items()}
        row = [str(context), f"{found['step']:.1f}", f"{found['accounts'] / found['fused']:.2f}"]
        row += [f"{found['peak'] / 1e9:.2f}", per_token(before, found, "peak")]
        for kind in ("sliding", "paid"):
            row += [f"{found[f'{kind} step']:.1f}", f"{found[f'{kind} peak'] / 1e9:.2f}"]
            row.append(per_token(before, found, f"{kind} peak"))
        table.add_row(*row)
        before = found
    console.print(table)
    console.print("accounts: self part and sweep of one layer, beside the fused forward and backward pass of one layer")


def per_token(before, found, name):
    """Growth of a peak since the context before, in KB a token."""
    if before is None:
        return ""
    return f"{(found[name] - before[name]) / (found['context'] - before['context']) / 1e3:.0f}"


def two_layers_paid(context):
    model, ids = small(int(context))
    with mode("long", model) as step:
        seconds = timed(step, ids)
    return {"step": seconds, "peak": resident()}


def two_layers_sliding(context):
    model, ids = small(int(context), MistralForCausalLM, MistralConfig, sliding_window=512)
    with mode("weights", model) as step:
        seconds = timed(step, ids)
    return {"step": seconds, "peak": resident()}


def small(context, model=LlamaForCausalLM, config=LlamaConfig, **changes):
    made = config(
        vocab_size=1024, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=context, **changes,
    )  # fmt: skip
    return model(made), torch.randint(1024, (1, context))


def two_layers(context):
    context = int(context)
    model, ids = small(context)
    with mode("weights", model) as step:
        seconds = timed(step, ids)
    used = resident()
    query, key, value = (nn.Parameter(torch.randn(1, 9, context, 64)) for _ in range(3))
    fused, accounts = [], []
    for _ in range(3):
        started = time.perf_counter()
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        grad = torch.randn_like(out)
        out.backward(grad)
        fused.append(time.perf_counter() - started)
        accounts.append(observed(query, key, value, grad, context))
    return {"step": seconds, "accounts": statistics.median(accounts), "fused": statistics.median(fused), "peak": used}


def context():
    table = Table("context", "step: s", "peak GB", "estimate GB", "logits at once would be GB")
    table.title = "SmolLM2-135M, one window, everything with the weights"
    for length in (512, 2048, 8192):
        found = alone("whole_context", length)
        logits = 4 * 4 * 49152 * length / 1e9
        table.add_row(str(length), f"{found['step']:.0f}", f"{found['peak'] / 1e9:.2f}", found["said"], f"{logits:.1f}")
    console.print(table)


def whole_context(length):
    """What `posterity measure` says before it starts, and what comes true."""
    model, ids = window(int(length))
    with frozen(model), account(model) as ledger:
        head = Head(model)
        said = estimate(model, ids[0], 1, 1, True, head, 0)
        ledger.clear()
        seconds = timed(lambda ids: Sending(model, ids, head).backward(), ids)
    return {"step": seconds, "peak": resident(), "said": re.search(r"and ([\d.]+) GB", said)[1]}


def observed(query, key, value, grad, context):
    seen = []
    attention(query, key, value, observe=seen.append).backward(grad)
    started = time.perf_counter()
    tally(seen[0], self_part(seen[0]), Bins.of("octaves", context))
    return time.perf_counter() - started


def precision(length=128):
    """Each precision in a process of its own: what float64 says, and how far the others are from it."""
    table = Table("SmolLM2-135M", *PRECISIONS)
    table.title = f"Two windows of {length} tokens: shares in per cent, with the largest difference from {EXACT}"
    found = {name: alone("in_precision", name, length) for name in PRECISIONS}
    for label, right in found[EXACT]["shares"].items():
        cells = []
        for name in PRECISIONS:
            pooled, by_layer = found[name]["shares"][label]
            off = max(abs(x - y) for x, y in zip(pooled, right[0], strict=True))
            most = max(abs(x - y) for x, y in zip(by_layer, right[1], strict=True))
            shown = " ".join(f"{100 * x:.2f}" for x in pooled[:3])
            cells.append(shown if name == EXACT else f"{shown}\n± {100 * off:.2g}, a layer {100 * most:.2g}")
        table.add_row(label, *cells)
    for label in (
        "loss, nats per token",
        "balance",
        "entries of dq, dk, dv that are 0, %",
        "of all entries, 0 here but not in float32, %",
    ):
        table.add_row(label, *(found[name][label] for name in PRECISIONS))
    console.print(table)


def in_precision(name, length):
    """Shares and what became zero, in one precision."""
    loaded = loading.load_model(None)
    model, length = loaded.model.to(PRECISIONS[name]), int(length)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast")
    documents = [corpus.default_text()]
    with autocast:
        asked = {"context": length, "limit": 2, "losses": True, "horizons": (8,), "progress": False}
        result = measure(model, loaded.tokenizer, documents, **asked)
        zero = zeros(model, corpus.windows(documents, loaded.tokenizer, length, 1)[0].ids[None])
    shares = {
        "self: query, key, value": lambda by: derived.shares(result, by).share.sel(side="self"),
        "credit by lag (bins 0, 1, 2 of queries)": lambda by: derived.profile(result, by).share,
        "weights, self: W_Q, W_K, W_V": lambda by: derived.weights(result, by).share,
        "own loss: key, value": lambda by: derived.who_pays(result, by).share.sel(part="own"),
        "left at h = 8: query, key, value": lambda by: derived.horizon_curve(result, by).share,
    }
    pair = [[one.values.ravel().tolist() for one in (of(()), of(("layer",)))] for of in shares.values()]
    here = zero.float().mean().item()
    new = "" if name in (EXACT, "float32") else f"{100 * (zero & ~exact_zeros(length)).float().mean().item():.3f}"
    return {
        "shares": dict(zip(shares, pair, strict=True)),
        "loss, nats per token": f"{float(result.loss.mean()):.4f}",
        "balance": f"{float(derived.balance(result).max()):.1e}",
        "entries of dq, dk, dv that are 0, %": f"{100 * here:.3f}",
        "of all entries, 0 here but not in float32, %": new,
    }


def exact_zeros(length):
    """Which entries are 0 in float32: the last position has no loss and the first nothing to choose."""
    loaded = loading.load_model(None)
    ids = corpus.windows([corpus.default_text()], loaded.tokenizer, length, 1)[0].ids[None]
    return zeros(loaded.model, ids)


def zeros(model, ids):
    """Which entries of the gradients of queries, keys and values are 0, in all layers."""
    found = []

    def observe(layer, back, project):
        found.extend((x == 0).flatten() for x in (back.grad_query, back.grad_key, back.grad_value))

    with frozen(model), watched(model, observe):
        Sending(model, ids, Head(model)).backward()
    return torch.cat(found)


def sweep():
    table = Table("heads", "key/value heads", "context", "fused forward and backward: s", "by octaves", "every lag")
    table.add_column("five products alone")
    table.title = "Accounts of one layer, float32: ratios to fused attention, forward and backward"
    for heads, groups, dim, context in SWEEPS:
        back = finished(heads, groups, dim, context)
        kinds = {"fused": partial(fused, back), "products": partial(products, back)}
        scratch = Scratch()
        for lags in ("octaves", "all"):
            kinds[lags] = partial(accounts, back, Bins.of(lags, context), scratch)
        seconds = {name: [] for name in kinds}
        for _ in range(SWEEP_ROUNDS + 1):
            for name, run_ in kinds.items():
                started = time.perf_counter()
                run_()
                seconds[name].append(time.perf_counter() - started)
        ratios = [f"{paired(seconds[name], seconds['fused']):.2f}" for name in ("octaves", "all", "products")]
        table.add_row(
            f"{heads} of {dim}", str(groups), f"{context:,}", f"{statistics.median(seconds['fused'][1:]):.3f}", *ratios
        )
    console.print(table)
    console.print(f"{cpu()}; medians of {SWEEP_ROUNDS} rounds in turns, ratios within a round")


def cpu():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor()


def finished(heads, groups, dim, context):
    """A backward pass of one layer, as the ledger gets it."""
    seen, shapes = [], ((1, heads, context, dim), (1, groups, context, dim), (1, groups, context, dim))
    out = attention(*(torch.randn(shape, requires_grad=True) for shape in shapes), observe=seen.append)
    out.backward(torch.randn_like(out))
    return seen[0]


def fused(back):
    key, value = back.repeat(back.key), back.repeat(back.value)
    output, kept = CPU.forward(back.query, key, value, back.scale)
    CPU.backward(back.grad_output, back.query, key, value, output, kept, back.scale)


@torch.no_grad()
def accounts(back, bins, scratch):
    vars(back).pop("wholes", None)  # kept between calls
    tally(back, self_part(back), bins, scratch)


@torch.no_grad()
def products(back):
    """The matrix products of the sweep, nothing else: what no arrangement of it in PyTorch goes below."""
    key, value = back.repeat(back.key)[0], back.repeat(back.value)[0]
    pairs = ((back.query[0], key), (back.grad_output[0], value)) + 3 * ((back.grad_query[0], key),)
    for head in range(0, len(key), torch.get_num_threads()):
        some = slice(head, head + torch.get_num_threads())
        for _, tiles in back.mask.tiles(key.shape[1], key.shape[1], key.device):
            for tile in tiles:
                for left, right in pairs:
                    left[some, tile.rows] @ right[some, tile.columns].mT


class Timed(Monitor):
    """A Monitor that keeps how long each measurement took."""

    def _measure(self, step, model):
        started = time.perf_counter()
        super()._measure(step, model)
        self.took = [*getattr(self, "took", []), time.perf_counter() - started]


def monitor():
    table = Table("training", "step: s", "measurement: s", "share of the time, every 100 steps", title="Monitor")
    small = runs.Settings()
    rows = runs.prepare(small)
    large, ids = window(512)
    kinds = {
        "`posterity train` as it is: llama of 4 layers, 16 rows of 128": (
            runs.make_model(small, rows),
            rows.train[0],
            16,
        ),
        "SmolLM2-135M, one row of 512": (large, ids.repeat(8, 1), 1),
    }
    for label, (model, inputs, batch) in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=8, per_device_train_batch_size=batch, report_to="none", save_strategy="no",
                disable_tqdm=True, learning_rate=1e-5, dataloader_pin_memory=False,
            )  # fmt: skip
            # a default Monitor but for its steps, so that a few of them give several measurements
            watch, clock = Timed(2, inputs[:2, :128]), Clock()
            trainer = Trainer(
                model=model, args=arguments, train_dataset=runs.Rows(inputs, inputs), callbacks=[watch, clock]
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        step, took = statistics.median(clock.took[1:]), statistics.median(watch.took[1:])
        table.add_row(label, f"{step:.2f}", f"{took:.2f}", f"{took / (100 * step + took):.1%}")
    console.print(table)


class Clock(TrainerCallback):
    """Keeps how long each step took, without what happens between steps."""

    def __init__(self):
        self.took = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.took.append(time.perf_counter() - self.started)


ALONE = (  # what runs in a process of its own
    "peak", "profile", "two_layers", "two_layers_paid", "two_layers_sliding", "whole_context", "in_precision",
)  # fmt: skip


def main():
    torch.manual_seed(0)
    wanted = sys.argv[1:]
    if wanted and wanted[0] in ALONE:
        print(json.dumps(globals()[wanted[0]](*wanted[1:])))
        return
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {ROUNDS} rounds in turns")
    tables = (steps, payers, naive, long, sweep, context, precision, monitor)
    tables = {table.__name__: table for table in tables}
    for name in wanted or tables:
        tables[name]()


if __name__ == "__main__":
    main()
