"""Long contexts: a two-layer model up to 32,768 tokens, and the default model beside its estimate."""

import contextlib
import itertools
import re
import statistics
import time

import torch
from rich.table import Table
from step_kinds import step_kind
from timing import console, default_window, peak_memory, run_alone, seconds
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from posterity import attention
from posterity.decomposition.bins import Bins
from posterity.decomposition.credit import pass_credit, self_edge_gradients
from posterity.measurement.account import account
from posterity.measurement.estimate import estimate
from posterity.models.checkpointing import checkpoint_layers
from posterity.models.chunked_loss import ChunkedLoss, LMHead
from posterity.models.language_model import freeze_parameters

CONTEXTS = (2048, 4096, 8192, 16384, 32768)
VOCABULARY = 49152  # of the default model


def long():
    table = Table("context", "step: s", "accounts / fused", "peak GB", "KB a token")
    variants = {"window of 512": two_layers_sliding, "who pays": two_layers_losses}
    for label in variants:
        for column in (f"{label}: s", "peak GB", "KB a token"):
            table.add_column(column)
    table.title = (
        "Two layers of 9 heads of 64, everything by lag and the weights; the same with a sliding window; "
        "with own and later losses and two horizons"
    )
    shorter = {}
    for context in CONTEXTS:
        plain = run_alone(two_layers, context)
        row = [str(context), f"{plain['step']:.1f}", f"{plain['accounts'] / plain['fused']:.2f}"]
        row += [f"{plain['peak'] / 1e9:.2f}", kilobytes_per_token(shorter.get("plain"), plain)]
        shorter["plain"] = plain
        for label, measurement in variants.items():
            numbers = run_alone(measurement, context)
            row += [f"{numbers['step']:.1f}", f"{numbers['peak'] / 1e9:.2f}"]
            row.append(kilobytes_per_token(shorter.get(label), numbers))
            shorter[label] = numbers
        table.add_row(*row)
    console.print(table)
    console.print("accounts: self part and sweep of one layer, beside the fused forward and backward pass of one layer")


def kilobytes_per_token(shorter, longer):
    """Growth of the peak from one context to the next; empty for the first."""
    if shorter is None:
        return ""
    return f"{(longer['peak'] - shorter['peak']) / (longer['context'] - shorter['context']) / 1e3:.0f}"


def two_layers(context):
    context = int(context)
    model, ids = two_layer_model(context)
    with step_kind("weights", model) as step:
        step_seconds = seconds(step, ids)
    peak = peak_memory()
    query, key, value = (nn.Parameter(torch.randn(1, 9, context, 64)) for _ in range(3))
    fused, accounts = [], []
    for _ in range(3):
        started = time.perf_counter()
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        grad = torch.randn_like(out)
        out.backward(grad)
        fused.append(time.perf_counter() - started)
        accounts.append(account_seconds(query, key, value, grad, context))
    return {
        "context": context, "step": step_seconds, "peak": peak,
        "accounts": statistics.median(accounts), "fused": statistics.median(fused),
    }  # fmt: skip


def two_layers_losses(context):
    return step_numbers("long", *two_layer_model(int(context)))


def two_layers_sliding(context):
    return step_numbers(
        "weights", *two_layer_model(int(context), MistralForCausalLM, MistralConfig, sliding_window=512)
    )


def step_numbers(name, model, ids):
    """Seconds and peak memory of the first step of a kind."""
    with step_kind(name, model) as step:
        step_seconds = seconds(step, ids)
    return {"context": ids.shape[1], "step": step_seconds, "peak": peak_memory()}


def two_layer_model(context, model=LlamaForCausalLM, config=LlamaConfig, **changes):
    sizes = config(
        vocab_size=1024, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=context, **changes,
    )  # fmt: skip
    return model(sizes), torch.randint(1024, (1, context))


def account_seconds(query, key, value, grad, context):
    """Seconds of the account of one backward pass, without that pass."""
    passes = []
    attention(query, key, value, observe=passes.append).backward(grad)
    started = time.perf_counter()
    pass_credit(passes[0], self_edge_gradients(passes[0]), Bins.of("octaves", context))
    return time.perf_counter() - started


def context():
    table = Table("context", "", "step: s", "peak GB", "estimate GB", "logits at once would be GB")
    table.title = "SmolLM2-135M, one window, everything with the weights; with --checkpoint layers run again"
    for length, checkpoint in itertools.product((512, 2048, 8192), ("", "--checkpoint")):
        numbers = run_alone(default_model_context, length, *[checkpoint] * bool(checkpoint))
        logits = 4 * 4 * VOCABULARY * length / 1e9
        peak, step = f"{numbers['peak'] / 1e9:.2f}", f"{numbers['step']:.0f}"
        table.add_row(str(length), checkpoint, step, peak, numbers["estimate"], f"{logits:.1f}")
    console.print(table)


def default_model_context(length, checkpoint=""):
    """Seconds and peak memory of a window, and the memory that `posterity measure` estimates before it starts."""
    model, ids = default_window(int(length))
    with (
        freeze_parameters(model),
        account(model) as ledger,
        checkpoint_layers(ledger.watch) if checkpoint else contextlib.nullcontext(),
    ):
        head = LMHead.probe(model)
        line = estimate(model, ids[0], 1, 1, head, ledger, bool(checkpoint))
        step_seconds = seconds(lambda ids: ChunkedLoss.run(model, ids, head).backward(), ids)
    return {"step": step_seconds, "peak": peak_memory(), "estimate": re.search(r"and ([\d.]+) GB", line)[1]}
