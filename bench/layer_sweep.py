"""The accounts of one layer beside torch's fused attention of the same layer."""

import statistics
from functools import partial

import torch
from rich.table import Table
from timing import console, median_ratio, processor, seconds

from posterity import attention
from posterity.decomposition.bins import Bins
from posterity.decomposition.credit import pass_credit, self_edge_gradients
from posterity.decomposition.sweep import Scratch
from posterity.ops.fused_kernels import CPU

SHAPES = tuple(
    (heads, groups, dim, context)
    for context in (1024, 4096)
    for heads, groups, dim in ((9, 3, 64), (9, 9, 64), (32, 32, 128))
)
ROUNDS = 5


def sweep():
    table = Table("heads", "key/value heads", "context", "fused forward and backward: s", "by octaves", "every lag")
    table.add_column("five products alone")
    table.title = "Accounts of one layer, float32: ratios to fused attention, forward and backward"
    for heads, groups, dim, context in SHAPES:
        back = backward_pass(heads, groups, dim, context)
        kinds = {"fused": partial(fused, back), "products": partial(products, back)}
        scratch = Scratch()
        for lags in ("octaves", "all"):
            kinds[lags] = partial(accounts, back, Bins.of(lags, context), scratch)
        times = {name: [] for name in kinds}
        for _ in range(ROUNDS + 1):
            for name, kind in kinds.items():
                times[name].append(seconds(kind))
        ratios = [f"{median_ratio(times[name], times['fused']):.2f}" for name in ("octaves", "all", "products")]
        fused_seconds = f"{statistics.median(times['fused'][1:]):.3f}"
        table.add_row(f"{heads} of {dim}", str(groups), f"{context:,}", fused_seconds, *ratios)
    console.print(table)
    console.print(f"{processor()}; medians of {ROUNDS} rounds in turns, ratios within a round")


def backward_pass(heads, groups, dim, context):
    """A backward pass of one layer, as the ledger gets it."""
    passes, shapes = [], ((1, heads, context, dim), (1, groups, context, dim), (1, groups, context, dim))
    out = attention(*(torch.randn(shape, requires_grad=True) for shape in shapes), observe=passes.append)
    out.backward(torch.randn_like(out))
    return passes[0]


def fused(back):
    key, value = back.repeat(back.key), back.repeat(back.value)
    output, saved = CPU.forward(back.query, key, value, back.scale)
    CPU.backward(back.grad_output, back.query, key, value, output, saved, back.scale)


@torch.no_grad()
def accounts(back, bins, scratch):
    object.__setattr__(back, "_total", None)  # cached between calls, on a frozen dataclass
    pass_credit(back, self_edge_gradients(back), bins, scratch)


@torch.no_grad()
def products(back):
    """The matrix products of the sweep alone: the floor of any arrangement of it in PyTorch."""
    key, value = back.repeat(back.key)[0], back.repeat(back.value)[0]
    pairs = ((back.query[0], key), (back.grad_output[0], value)) + 3 * ((back.grad_query[0], key),)
    for head in range(0, len(key), torch.get_num_threads()):
        heads = slice(head, head + torch.get_num_threads())
        for _, tiles in back.mask.tiles(key.shape[1], key.shape[1], key.device):
            for tile in tiles:
                for left, right in pairs:
                    left[heads, tile.rows] @ right[heads, tile.columns].mT
