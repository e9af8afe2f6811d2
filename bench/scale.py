"""`python bench/scale.py`: what a run takes on larger machines, computed from what is measured on this one.

Measured here: the bytes that autograd keeps for a token (counted on small models of the same architecture, exact), and
the part of the processor's speed that a measured window reaches (SmolLM2-135M). The rest is arithmetic; nothing of it
was run on a GPU. `--write` puts the tables into docs/clusters.md.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from step_kinds import step_kind
from timing import default_window, seconds
from transformers import LlamaConfig, LlamaForCausalLM

from posterity.measurement.account import account
from posterity.models.chunked_loss import CHUNK, ChunkedLoss, LMHead
from posterity.models.language_model import freeze_parameters

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


def activation_bytes(hidden, inner, heads, groups, dim, layers, dtype):
    """Bytes of activations that autograd keeps for one token, with frozen weights and without the head."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, head_dim=dim,
        num_attention_heads=heads, num_key_value_heads=groups,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
    saved = {}

    def record(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with freeze_parameters(model), account(model, weights=False):
        head = LMHead.probe(model)
        with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
            loss = ChunkedLoss.run(model, torch.randint(64, (1, TOKENS)), head)
        loss.backward()
    return sum(size for pointer, size in saved.items() if pointer not in weights) / TOKENS


def activation_formula(dtype):
    """Coefficients of hidden, inner, query width, key width, heads and 1 in the bytes of a token and layer."""
    rows, layer_bytes = [], []
    for hidden, inner, (heads, groups), dim in itertools.product((32, 64), (48, 128), ((4, 4), (4, 2)), (8, 16)):
        three, two = (activation_bytes(hidden, inner, heads, groups, dim, layers, dtype) for layers in (3, 2))
        rows.append((hidden, inner, heads * dim, groups * dim, heads, 1))
        layer_bytes.append(three - two)
    formula, *_ = np.linalg.lstsq(np.array(rows, float), np.array(layer_bytes), rcond=None)
    assert np.abs(np.array(rows) @ formula - layer_bytes).max() < 1, "the formula does not fit"
    return formula


def activations(shape, formula):
    widths = (shape["hidden"], shape["inner"], shape["heads"] * shape["dim"], shape["groups"] * shape["dim"])
    return shape["layers"] * float(np.dot((*widths, shape["heads"], 1), formula))


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


def peak_speed():
    """Float32 products per second of this processor, at the shape of the default model's own."""
    x, y = torch.randn(2048, 576), torch.randn(576, 1536)
    rounds = []
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(10):
            x @ y
        rounds.append((time.perf_counter() - started) / 10)
    return 2 * 2048 * 576 * 1536 / statistics.median(rounds)


def measured_speeds(context=512):
    """Speed of matrix products, seconds of a window without and with accounts, and the parts of that speed they reach.

    The two kinds of steps are taken in turns; their difference is the sweep.
    """
    model, ids = default_window(context)
    times = {"frozen": [], "lags": []}
    for _ in range(6):
        for name, rounds in times.items():
            with step_kind(name, model) as step:
                rounds.append(seconds(step, ids))
    plain, accounted = (statistics.median(rounds[1:]) for rounds in times.values())
    projections, fused, sweep = (x * context for x in flops(SHAPES["SmolLM2-135M"], context))
    speed = peak_speed()
    return speed, plain, accounted, (projections + fused) / plain / speed, sweep / (accounted - plain) / speed


def gigabytes(size):
    return f"{size / 1e9:,.0f} GB" if size >= 10e9 else f"{size / 1e9:.1f} GB"


def tables():
    halves, singles = activation_formula(torch.bfloat16), activation_formula(torch.float32)
    speed, plain, accounted, model_share, sweep_share = measured_speeds()
    lines = [
        "Measured on this machine (SmolLM2-135M, float32, one window of 512 tokens):",
        "",
        "| | |",
        "|---|---|",
        f"| products of matrices alone | {speed / 1e9:.0f} GFLOP/s |",
        f"| forward and backward, frozen | {plain / 0.512:.2f} ms a token: {100 * model_share:.0f} % of that speed |",
        f"| the accounts beside it | {(accounted - plain) / 0.512:.2f} ms a token: {100 * sweep_share:.0f} % of it |",
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
        saved = CONTEXT * activations(shape, halves)
        logits = 4 * CHUNK * 4
        split = 2 * 4 * shape["layers"] * shape["hidden"] * (shape["heads"] + 2 * shape["groups"]) * shape["dim"]
        sums = 8 * shape["layers"] * shape["heads"] * 6 * CONTEXT
        projections, fused, sweep = flops(shape, CONTEXT)
        token_seconds = (projections + fused) / (model_share * H100["bfloat16"])
        token_seconds += sweep / (sweep_share * H100["float32"])
        cells.append(
            (gigabytes(weights), gigabytes(saved), gigabytes(logits), gigabytes(sums), gigabytes(split),
             gigabytes(weights + saved + logits + sums),
             " + ".join(f"{x / 1e9:,.0f}" for x in (projections, fused, sweep)) + " GFLOP",
             f"{1 / token_seconds:,.0f}", f"{1e6 * token_seconds / 3600:.1f} h")
        )  # fmt: skip
    labels = (
        "weights", "activations of a window", "a chunk of logits", "sums by position",
        "sums of weight gradients (left out by --no-weights)", "together, without the weight gradients",
        "a token: model + fused attention + sweep", "tokens a second", "a million tokens",
    )  # fmt: skip
    lines += [f"| {label} | {small} | {large} |" for label, small, large in zip(labels, *cells, strict=True)]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/clusters.md")
    markdown = tables()
    Console(width=150).print(markdown, markup=False)
    if parser.parse_args().write:
        start, end = (f"<!-- {name} -->\n" for name in ("scale", "/scale"))
        before, _, rest = PAGE.read_text().partition(start)
        PAGE.write_text(before + start + markdown + "\n" + rest[rest.index(end) :])


if __name__ == "__main__":
    main()
