"""Speed, memory and agreement on one CUDA device, with random weights and no network (8 minutes).

python bench/gpu.py              all of it
python bench/gpu.py agreement    the ledger of small models against float64 on the CPU
python bench/gpu.py layer        the sums of one layer beside flash attention's forward and backward pass
python bench/gpu.py steps        a training step of whole models beside what Posterity does

Model shapes are those of published configs; of large models some layers run, and none has its vocabulary. The same bits
are not to be expected where torch's own flash attention runs backward: it adds dq up by atomics.
"""

import gc
import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

from posterity.decomposition.bins import Bins
from posterity.decomposition.edge_sums import sum_edges
from posterity.decomposition.first_keys import FirstKeys
from posterity.measurement.account import account
from posterity.models.chunked_loss import window_losses
from posterity.models.language_model import freeze_parameters
from posterity.ops.attention import attention
from posterity.ops.mask import Mask

console = Console(width=140)
ROUNDS = 3
SMALL = {"vocab_size": 512, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {  # of config.json of the published models; the number of layers that is run
    "SmolLM2-135M": (
        LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            max_position_embeddings=131072, **SMALL,
        ),
        30,
    ),
    "Llama-3.2-1B": (
        LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, **SMALL,
        ),
        16,
    ),
    "Llama-3.1-8B": (
        LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=8, num_attention_heads=32,
            num_key_value_heads=8, max_position_embeddings=131072, **SMALL,
        ),
        32,
    ),
    "Gemma-3-4B": (
        Gemma3TextConfig(
            hidden_size=2560, intermediate_size=10240, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256, sliding_window=1024, max_position_embeddings=131072, **SMALL,
        ),
        34,
    ),
    "Qwen3-8B": (
        Qwen3Config(
            hidden_size=4096, intermediate_size=12288, num_hidden_layers=8, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, **SMALL,
        ),
        36,
    ),
}  # fmt: skip


def build(name, dtype, layers=None, device="cpu"):
    config = CONFIGS[name][0]
    if layers is not None:
        config = type(config)(**{**config.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def agreement():
    """Small models of each family: credit by lag in float32 and bfloat16 on the GPU against float64 on the CPU."""
    table = Table("model, 2 layers, 700 tokens", "type", "summed by", "credit", "mass", "attention", "same bits")
    table.title = "Largest difference from float64 on the CPU, as a share of the largest entry"
    ids = torch.randint(3, 500, (1, 700))
    for name in ("SmolLM2-135M", "Gemma-3-4B"):
        reference = ledger(build(name, torch.float64, 2), ids)
        for dtype in (torch.float32, torch.bfloat16):
            model = build(name, torch.float64, 2).to("cuda", dtype)
            runs = [ledger(model, ids.cuda()) for _ in range(2)]
            row = [
                f"{abs(runs[0][field] - reference[field]).max().item() / abs(reference[field]).max().item():.1e}"
                for field in ("credit", "mass", "attention")
            ]
            same = all((runs[0][field].values == runs[1][field].values).all() for field in ("credit", "mass"))
            table.add_row(name, str(dtype).removeprefix("torch."), runs[0].sweep, *row, "yes" if same else "NO")
    console.print(table)


def ledger(model, ids, **options):
    with freeze_parameters(model), account(model, weights=False, **options) as sums:
        window_losses(model, ids).sum().backward()
    return sums.result()


def layer():
    """One layer of Llama-3.1-8B's shape: all sums by lag and the prices, beside flash attention."""
    table = Table("context", "window", "flash f + b", "our f + b", "by lag", "TFLOP/s", "prices", "by lag / flash")
    table.title = f"Milliseconds of one layer, 32 query heads, 8 key/value heads of 128, bfloat16; {device_name()}"
    for context, window in ((2048, None), (8192, None), (32768, None), (32768, 1024), (131072, None), (131072, 1024)):
        query, key, value, grad = (
            torch.randn(1, heads, context, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for heads in (32, 8, 8, 32)
        )
        mask = Mask() if window is None else Mask(lambda q, k, window=window: (k <= q) & (q - k < window))
        passes, bins = [], Bins.of("octaves", context)

        def ours(query=query, key=key, value=value, grad=grad, mask=mask, passes=passes):
            out = attention(query, key, value, mask=mask, observe=passes.append)
            torch.autograd.grad(out, (query, key, value), grad)

        def flash(query=query, key=key, value=value, grad=grad):
            out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            torch.autograd.grad(out, (query, key, value), grad)

        ours_ms, flash_ms = milliseconds(ours), milliseconds(flash)
        back = passes[-1]
        passes.clear()
        columns = FirstKeys.of(back, 4).columns()
        lag_ms = milliseconds(lambda: sum_edges(back, bins, None, columns))  # noqa: B023
        price_ms = milliseconds(lambda: sum_edges(back, None, (context,), columns))  # noqa: B023
        edges = context * (context + 1) / 2 if window is None else window * (context - window / 2)
        rate = 5 * 2 * 32 * 128 * edges / lag_ms / 1e9
        table.add_row(
            f"{context:,}", "" if window is None else f"{window:,}", f"{flash_ms:.2f}", f"{ours_ms:.2f}",
            f"{lag_ms:.2f}", f"{rate:.0f}", f"{price_ms:.2f}", f"{lag_ms / flash_ms:.1f}",
        )  # fmt: skip
        del query, key, value, grad, back
        free()
    console.print(table)


def steps():
    """Whole models: tokens a second and peak memory."""
    kinds = ("training step", "frozen step", "by lag", "with prices", "with weights")
    table = Table("model", "layers", "context", *(f"{kind}: tokens/s, GB" for kind in kinds))
    table.title = f"One window, bfloat16, random weights, vocabulary of 512; {device_name()}"
    for name in CONFIGS:
        model = build(name, torch.bfloat16, device="cuda")
        for context in (2048, 8192, 32768):
            ids = torch.randint(3, 500, (1, context), device="cuda")
            row = []
            for kind in kinds:
                free()
                try:
                    row.append(measured(model, ids, kind))
                except torch.cuda.OutOfMemoryError:
                    row.append("out of memory")
            table.add_row(name, f"{model.config.num_hidden_layers} of {CONFIGS[name][1]}", f"{context:,}", *row)
        del model
        free()
    console.print(table)


def measured(model, ids, kind):
    torch.cuda.reset_peak_memory_stats()
    seconds = [timed(lambda: run(model, ids, kind)) for _ in range(ROUNDS + 1)][1:]
    model.zero_grad(set_to_none=True)
    return f"{ids.numel() / statistics.median(seconds):,.0f}, {torch.cuda.max_memory_allocated() / 1e9:.1f}"


def run(model, ids, kind):
    if kind == "training step":
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    elif kind == "frozen step":
        with freeze_parameters(model):
            inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=inputs, labels=ids, use_cache=False).loss.backward()
    else:
        with freeze_parameters(model), account(model, weights=kind == "with weights", prices=kind == "with prices"):
            window_losses(model, ids).sum().backward()


def timed(function):
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def milliseconds(function):
    """Median of a few calls; the first two warm up."""
    return 1000 * statistics.median([timed(function) for _ in range(ROUNDS + 2)][2:])


def free():
    gc.collect()
    torch.cuda.empty_cache()


def device_name():
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


PARTS = {part.__name__: part for part in (agreement, layer, steps)}


def main():
    if not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device; this torch sees none")
    unknown = set(sys.argv[1:]) - set(PARTS)
    if unknown:
        raise SystemExit(f"expected any of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    started = time.perf_counter()
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
    console.print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
