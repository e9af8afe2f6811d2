"""Shares of the default model in bfloat16, float16 and autocast, beside float64 and float32."""

import torch
from rich.table import Table
from timing import console, default_window, run_alone

from posterity.inputs.documents import default_text
from posterity.inputs.model import load_model
from posterity.measurement.measure import measure
from posterity.models.attach import observe_model
from posterity.models.chunked_loss import ChunkedLoss, LMHead
from posterity.models.language_model import freeze_parameters
from posterity.results import stats

EXACT = "float64"  # what the other precisions are compared with
PRECISIONS = {
    EXACT: torch.float64,
    "float32": torch.float32,
    "autocast": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
NUMBERS = (
    "loss, nats per token",
    "balance",
    "entries of dq, dk, dv that are 0, %",
    "of all entries, 0 here but not in float32, %",
)


def precision(length=128):
    """Each precision in a process of its own: what float64 says, and how far the others are from it."""
    table = Table("SmolLM2-135M", *PRECISIONS)
    table.title = f"Two windows of {length} tokens: shares in per cent, with the largest difference from {EXACT}"
    numbers = {name: run_alone(measured_precision, name, length) for name in PRECISIONS}
    for label, (exact, exact_by_layer) in numbers[EXACT]["shares"].items():
        cells = []
        for name in PRECISIONS:
            pooled, by_layer = numbers[name]["shares"][label]
            shares = " ".join(f"{100 * x:.2f}" for x in pooled[:3])
            largest, of_layer = largest_difference(pooled, exact), largest_difference(by_layer, exact_by_layer)
            cells.append(shares if name == EXACT else f"{shares}\n± {100 * largest:.2g}, a layer {100 * of_layer:.2g}")
        table.add_row(label, *cells)
    for label in NUMBERS:
        table.add_row(label, *(numbers[name][label] for name in PRECISIONS))
    console.print(table)


def largest_difference(values, exact):
    return max(abs(x - y) for x, y in zip(values, exact, strict=True))


def measured_precision(name, length):
    """Shares and entries that are zero, in one precision."""
    loaded = load_model(None)
    model, length = loaded.model.to(PRECISIONS[name]), int(length)
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
        options = {"context": length, "limit": 2, "losses": True, "horizons": (8,), "progress": False}
        result = measure(model, loaded.tokenizer, [default_text()], **options)
        zeros = zero_entries(model, default_window(length)[1])
    shares = {
        "self: query, key, value": lambda by: stats.shares(result, by).share.sel(side="self"),
        "credit by lag (bins 0, 1, 2 of queries)": lambda by: stats.profile(result, by).share,
        "weights, self: W_Q, W_K, W_V": lambda by: stats.weight_shares(result, by).share,
        "own loss: key, value": lambda by: stats.loss_shares(result, by).share.sel(part="own"),
        "left at h = 8: query, key, value": lambda by: stats.horizon_curve(result, by).share,
    }
    pairs = [[x.values.ravel().tolist() for x in (share(()), share(("layer",)))] for share in shares.values()]
    lost = ""
    if name not in (EXACT, "float32"):  # the last position has no loss and the first nothing to choose
        lost = f"{100 * (zeros & ~zero_entries(*default_window(length))).float().mean().item():.3f}"
    values = (
        f"{float(result.loss.mean()):.4f}",
        f"{float(stats.balance(result).max()):.1e}",
        f"{100 * zeros.float().mean().item():.3f}",
        lost,
    )
    return {"shares": dict(zip(shares, pairs, strict=True)), **dict(zip(NUMBERS, values, strict=True))}


def zero_entries(model, ids):
    """Which entries of the gradients of queries, keys and values are 0, in all layers."""
    zeros = []

    def observe(layer, back, project):
        zeros.extend((x == 0).flatten() for x in (back.grad_query, back.grad_key, back.grad_value))

    with freeze_parameters(model), observe_model(model, observe):
        ChunkedLoss.run(model, ids, LMHead.probe(model)).backward()
    return torch.cat(zeros)
