"""The same lag profile with eager attention, its patterns and their gradients kept: what one would write today."""

import time

import torch
from rich.table import Table
from timing import console, default_window, peak_memory, run_alone
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from posterity.measurement.account import account
from posterity.models.chunked_loss import window_losses
from posterity.models.language_model import freeze_parameters

NAME = "eager_profile"


def naive():
    table = Table(
        "context", "Posterity: s", "GB", "eager with hooks: s", "GB", "time", "memory", "largest disagreement"
    )
    table.title = "The lag profile of all three streams, SmolLM2-135M"
    for context in (256, 512, 1024, 2048):
        ours, eager = run_alone(lag_profile, "ours", context), run_alone(lag_profile, "eager", context)
        row = [str(context), f"{ours['seconds']:.1f}", f"{ours['peak'] / 1e9:.1f}"]
        if eager is None:
            row += ["out of memory", "", "", "", ""]
        else:
            difference = torch.tensor(ours["credit"]) - torch.tensor(eager["credit"])
            disagreement = difference.abs().max() / torch.tensor(eager["credit"]).abs().max()
            row += [f"{eager['seconds']:.1f}", f"{eager['peak'] / 1e9:.1f}"]
            row += [
                f"{eager['seconds'] / ours['seconds']:.1f} x",
                f"{eager['peak'] / ours['peak']:.1f} x",
                f"{disagreement:.0e}",
            ]
        table.add_row(*row)
    console.print(table)


def lag_profile(name, context):
    """Credit by lag of all layers and heads, in two ways: seconds of the second pass, peak memory, sums over heads."""
    model, ids = default_window(int(context))
    for _ in range(2):
        if name == "ours":
            with freeze_parameters(model), account(model, "all", weights=False) as ledger:
                started = time.perf_counter()
                window_losses(model, ids).sum().backward()
                seconds = time.perf_counter() - started
            credit = torch.from_numpy(ledger.result().credit.sum(["head", "reader_of"]).values)
        else:
            started = time.perf_counter()
            credit = eager_credit(model, ids)
            seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": peak_memory(), "credit": credit.tolist()}


def eager_credit(model, ids):
    """Credit (layer, stream, lag) by N x N products of the retained tensors and their gradients."""
    calls = []

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        repeats = query.shape[1] // key.shape[1]
        head_key, head_value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        pattern = torch.softmax(query @ head_key.mT * scaling + attention_mask, -1)
        output = pattern @ head_value
        for x in (query, key, value, pattern, output):
            x.retain_grad()
        calls.append((query, key, value, pattern, output, scaling, repeats))
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.set_attn_implementation(NAME)
    with freeze_parameters(model):
        window_losses(model, ids).sum().backward()
    model.set_attn_implementation("sdpa")
    profiles = []
    for query, key, value, pattern, output, scaling, repeats in calls:
        weight = pattern.detach()
        score_grad = scaling * weight * (pattern.grad - (pattern.grad * weight).sum(-1, keepdim=True))
        key_grad, value_grad = key.grad.repeat_interleave(repeats, 1), value.grad.repeat_interleave(repeats, 1)
        credits = (
            score_grad * (query.grad @ key.detach().repeat_interleave(repeats, 1).mT),
            score_grad * (query.detach() @ key_grad.mT),
            weight * (output.grad @ value_grad.mT),
        )
        by_lag = [torch.stack([x.diagonal(-lag, -2, -1).sum() for lag in range(x.shape[-1])]) for x in credits]
        profiles.append(torch.stack(by_lag))
    return torch.stack(profiles)
