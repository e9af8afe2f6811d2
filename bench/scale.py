"""`python bench/scale.py`: what a run takes on larger machines, computed from what is measured on this one.

Measured here: the bytes that autograd keeps for a token (counted on small models of the same architecture, exact), and
the part of the processor's speed that a measured window reaches (SmolLM2-135M). The rest is arithmetic; nothing of it
was run on a GPU. `--write` puts the tables into docs/clusters.md.
"""

import argparse
import itertools
import re
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from bench import mode, window
from posterity.measurement.account import account
from posterity.models.chunked_loss import CHUNK, Head, Sending
from posterity.models.language_model import frozen

PAGE = Path(__file__).parents[1] / "docs" / "clusters.md"
TOKENS = 64
# Shapes as published by their makers (config.json of SmolLM2-135M, Llama-3.1-8B, Llama-3.1-70B).
SHAPES = {
    "SmolLM2-135M": {"layers": 30, "hidden": 576, "inner": 1536, "heads": 9, "groups": 3, "dim": 64, "words": 49152},
    "Llama-3.1-8B": {
        "layers": 32,
        "hidden": 4096,
        "inner": 14336,
        "heads": 32,
        "groups": 8,
        "dim": 128,
        "words": 128256,
    },
    "Llama-3.1-70B": {
        "layers": 80,
        "hidden": 8192,
        "inner": 28672,
        "heads": 64,
        "groups": 8,
        "dim": 128,
        "words": 128256,
    },
}
# One H100 SXM by its data sheet: dense bfloat16 in tensor cores, float32 outside them, memory.
H100 = {"bfloat16": 989e12, "float32": 67e12, "bytes": 80e9}
CONTEXT = 4096


def kept_by_autograd(hidden, inner, heads, groups, dim, layers, dtype):
    """Bytes of activations that one token keeps for the backward pass, weights frozen, the head left out."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, head_dim=dim,
        num_attention_heads=heads, num_key_value_heads=groups,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
    saved = {}

    def note(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with frozen(model), account(model, weights=False):
        head = Head(model)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            sending = Sending(model, torch.randint(64, (1, TOKENS)), head)
        sending.backward()
    return sum(size for place, size in saved.items() if place not in weights) / TOKENS


def formula(dtype):
    """Bytes a token and layer as multiples of hidden, inner, query width and key width; by solving small models."""
    rows, bytes_ = [], []
    for hidden, inner, (heads, groups), dim in itertools.product((32, 64), (48, 128), ((4, 4), (4, 2)), (8, 16)):
        two, one = (kept_by_autograd(hidden, inner, heads, groups, dim, layers, dtype) for layers in (3, 2))
        rows.append((hidden, inner, heads * dim, groups * dim, heads, 1))
        bytes_.append(two - one)
    found, *_ = np.linalg.lstsq(np.array(rows, float), np.array(bytes_), rcond=None)
    assert np.abs(np.array(rows) @ found - bytes_).max() < 1, "the formula does not fit"
    return found


def activations(shape, found):
    width = (shape["hidden"], shape["inner"], shape["heads"] * shape["dim"], shape["groups"] * shape["dim"])
    return shape["layers"] * float(np.dot((*width, shape["heads"], 1), found))


def parameters(shape, tied):
    attention = 2 * shape["hidden"] * (shape["heads"] + shape["groups"]) * shape["dim"]
    return (
        shape["layers"] * (attention + 3 * shape["hidden"] * shape["inner"])
        + (2 - tied) * shape["words"] * shape["hidden"]
    )


def flops(shape, context):
    """Of a token: products with weights (forward, backward to the inputs), fused attention, the sweep over edges."""
    layers, edges = shape["layers"], context / 2
    projections = 4 * parameters(shape, tied=True)
    product = 2 * edges * shape["heads"] * shape["dim"] * layers
    return projections, 7 * product, 5 * product


def peak():
    """Float32 products per second of this processor, at the shape of the default model's own."""
    x, y = torch.randn(2048, 576), torch.randn(576, 1536)
    rounds = []
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(10):
            x @ y
        rounds.append((time.perf_counter() - started) / 10)
    return 2 * 2048 * 576 * 1536 / statistics.median(rounds)


def reached(context=512):
    """Seconds of a window by steps that are each part of the next, and the speeds that are reached, of the peak."""
    model, ids = window(context)
    seconds = {"frozen": [], "lags": []}
    for _ in range(6):
        for name, found in seconds.items():
            with mode(name, model) as step:
                started = time.perf_counter()
                step(ids)
                found.append(time.perf_counter() - started)
    plain, whole = (statistics.median(seconds[name][1:]) for name in ("frozen", "lags"))
    projections, fused, sweep = (x * context for x in flops(SHAPES["SmolLM2-135M"], context))
    best = peak()
    return best, plain, whole, (projections + fused) / plain / best, sweep / (whole - plain) / best


def gigabytes(size):
    return f"{size / 1e9:,.0f} GB" if size >= 10e9 else f"{size / 1e9:.1f} GB"


def tables():
    halves, singles = formula(torch.bfloat16), formula(torch.float32)
    best, plain, whole, model_share, sweep_share = reached()
    lines = [
        "Measured on this machine (SmolLM2-135M, float32, one window of 512 tokens):",
        "",
        "| | |",
        "|---|---|",
        f"| products of matrices alone | {best / 1e9:.0f} GFLOP/s |",
        f"| forward and backward, frozen | {plain / 0.512:.2f} ms a token: {100 * model_share:.0f} % of that speed |",
        f"| the accounts beside it | {(whole - plain) / 0.512:.2f} ms a token: {100 * sweep_share:.0f} % of it |",
        f"| activations kept, float32 | {activations(SHAPES['SmolLM2-135M'], singles) / 1e6:.2f} MB a token |",
        "",
        f"Computed for bfloat16 and windows of {CONTEXT:,} tokens, one at a time:",
        "",
        "| | Llama-3.1-8B, one 80 GB GPU a process | Llama-3.1-70B, one process over eight |",
        "|---|---|---|",
    ]
    cells = []
    for name, tied in (("Llama-3.1-8B", False), ("Llama-3.1-70B", False)):
        shape = SHAPES[name]
        weights = 2 * parameters(shape, tied)
        kept = CONTEXT * activations(shape, halves)
        logits = 4 * CHUNK * 4
        split = 2 * 4 * shape["layers"] * shape["hidden"] * (shape["heads"] + 2 * shape["groups"]) * shape["dim"]
        sums = 8 * shape["layers"] * shape["heads"] * 6 * CONTEXT
        projections, fused, sweep = flops(shape, CONTEXT)
        slow = (projections + fused) / (model_share * H100["bfloat16"]) + sweep / (sweep_share * H100["float32"])
        cells.append(
            (gigabytes(weights), gigabytes(kept), gigabytes(logits), gigabytes(sums), gigabytes(split),
             gigabytes(weights + kept + logits + sums),
             " + ".join(f"{x / 1e9:,.0f}" for x in (projections, fused, sweep)) + " GFLOP",
             f"{1 / slow:,.0f}", f"{1e6 * slow / 3600:.1f} h")
        )  # fmt: skip
    labels = (
        "weights", "activations of a window", "a chunk of logits", "sums by position",
        "sums of weight gradients (left out by --no-weights)", "together, without the weight gradients",
        "a token: model + fused attention + sweep", "tokens a second", "a million tokens",
    )  # fmt: skip
    lines += [f"| {label} | {one} | {two} |" for label, one, two in zip(labels, *cells, strict=True)]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/clusters.md")
    found = tables()
    Console(width=150).print(found, markup=False)
    if parser.parse_args().write:
        text = PAGE.read_text()
        page = re.sub(
            r"(<!-- scale -->\n).*?(<!-- /scale -->)", lambda m: m[1] + found + "\n" + m[2], text, flags=re.DOTALL
        )
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
