# ruff: noqa: E402  (the modules under test need Triton, which may be missing)
"""The Triton kernels against the dense float64 reference: on the CPU by Triton's interpreter, or on a GPU.

Run by `make test-slow` with TRITON_INTERPRET=1 in a process of its own, since the interpreter takes all kernels of a
process. In bfloat16 the interpreter (3.9.0) multiplies bits, so half precision is float16 there.
"""

import dataclasses
import os

import pytest
import torch
from support.attention_cases import DIM, DIM_V, GROUPS, HEADS, MASKS, leaves, mask_case
from support.price_reference import dense_pair_prices, dense_window_prices
from support.reference import by_lag, dense_account, dense_attention

triton = pytest.importorskip("triton", reason="kernels need Triton: make test-slow has it")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("kernels run on CUDA or under TRITON_INTERPRET=1", allow_module_level=True)

from posterity.decomposition import triton_sums
from posterity.decomposition.bins import Bins
from posterity.decomposition.credit import pass_credit, self_edge_gradients
from posterity.decomposition.edge_sums import sweep_path
from posterity.decomposition.first_keys import FirstKeys
from posterity.decomposition.lag_sums import sum_by_lag
from posterity.decomposition.price_sums import PriceSums, octaves
from posterity.decomposition.prices import pass_prices
from posterity.decomposition.sweep import sweep
from posterity.decomposition.triton_sums import KernelOperands
from posterity.errors import InputError
from posterity.ops import block_kernels, triton_attention
from posterity.ops.attention import attention
from posterity.ops.block_kernels import kernel_table
from posterity.ops.block_table import BlockTable
from posterity.ops.horizon_rules import Discount, EdgeWindow, Full
from posterity.ops.mask import Mask

DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
SCALE = 0.7
LENGTHS = (1, 16, 33)  # below, on and off the edge of blocks of 16


@pytest.fixture(autouse=True)
def _kernels_everywhere(monkeypatch):
    """Let the kernels take tensors of this device, float64 too where they are interpreted, in blocks of 16."""
    monkeypatch.setattr(block_kernels, "DEVICE", DEVICE)
    monkeypatch.setattr(block_kernels, "is_ampere", lambda device: True)
    monkeypatch.setattr(block_kernels, "HALF", (*block_kernels.HALF, *((torch.float64,) if INTERPRETED else ())))
    monkeypatch.setattr(triton_attention, "tile_shape", lambda query, value: (16, 16))
    monkeypatch.setattr(triton_sums, "sweep_tile_shape", lambda query, value: (16, 16))
    monkeypatch.setattr("posterity.ops.attention._fused_kernel", lambda *args: None)


def inputs(length, sinks, dtype):
    query, key, value, sinks = leaves(length, sinks=sinks)
    # Laid out by position and then head, as models hand them over.
    views = (x.detach().to(DEVICE, dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    tensors = [x.requires_grad_() for x in views]
    return tensors, None if sinks is None else sinks.detach().to(DEVICE).float()


def run(tensors, grad, **options):
    passes = []
    out = attention(*tensors, SCALE, observe=passes.append, **options)
    grads = torch.autograd.grad(out, tensors, grad)
    return out, grads, passes[0]


def close(actual, expected, dtype, eps=16):
    """Compare in the norm: a few roundings of the type."""
    expected = expected.detach().double()
    error = (actual.detach().cpu().double() - expected).norm()
    assert error <= eps * torch.finfo(dtype).eps * max(expected.norm().item(), 1.0), (error, expected.norm())


DTYPES = ([torch.float64] if INTERPRETED else []) + [torch.float32, HALF]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (1.5, True)])
def test_output_and_gradients_are_those_of_the_dense_reference(dtype, length, name, softcap, sinks):
    tensors, logits = inputs(length, sinks, dtype)
    mask, allowed, _ = mask_case(name, length)
    grad = torch.randn(2, HEADS, length, DIM_V).to(DEVICE, dtype)
    options = {"softcap": softcap, "sinks": logits}
    out, grads, back = run(tensors, grad, mask=on_device(mask), **options)
    wide = [x.detach().cpu().double().requires_grad_() for x in tensors]
    expected, _, _ = dense_attention(*wide, SCALE, allowed, softcap, None if logits is None else logits.cpu().double())
    bound = torch.float32 if softcap and dtype == torch.float64 else dtype  # the series of tanh has ten digits
    close(out, expected, bound)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, wide, grad.cpu().double()), strict=True):
        close(actual, wanted, bound)
    empty = (
        (~allowed.any(-1)).expand(2, HEADS, -1) if logits is None else torch.zeros(2, HEADS, length, dtype=torch.bool)
    )
    assert torch.equal(back.lse.isposinf().cpu(), empty)
    assert sweep_path(back, Bins.of("octaves", length)) == "triton"


def on_device(mask):
    if mask.padding is not None:
        return Mask(padding=mask.padding.to(DEVICE))
    rule = mask.allowed
    return mask if rule is None else Mask(lambda q, k: rule(q.cpu(), k.cpu()).to(q.device))


@pytest.mark.parametrize("rules", [(Discount(0.8), Full()), (Full(), EdgeWindow(3)), (Discount(0.8), EdgeWindow(3))])
@pytest.mark.parametrize("name", ["plain", "window"])
def test_a_horizon_has_the_gradients_of_the_blocks(rules, name, monkeypatch):
    tensors, _ = inputs(40, False, torch.float32)
    grad = torch.randn(2, HEADS, 40, DIM_V).to(DEVICE)
    results, bins = [], Bins.of("octaves", 40)
    for device in (DEVICE, "none"):
        monkeypatch.setattr(block_kernels, "DEVICE", device)
        _, grads, back = run(tensors, grad, mask=on_device(mask_case(name, 40)[0]), horizon=lambda: rules)
        assert sweep_path(back, bins) == ("blocks" if results else "triton")
        entry = pass_credit(back, self_edge_gradients(back), bins)
        results.append((*grads, entry.credit, entry.mass, entry.attention))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected.cpu(), torch.float32, 64)


EXACT = torch.float64 if INTERPRETED else torch.float32


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (1.5, True)])
def test_sums_over_edges_are_those_of_the_dense_reference(length, name, softcap, sinks):
    tensors, logits = inputs(length, sinks, torch.float32)
    wide = [x.detach().cpu().double().requires_grad_() for x in tensors]
    mask, allowed, readers = mask_case(name, length)
    grad = torch.randn(2, HEADS, length, DIM_V, dtype=torch.double)
    if readers is not None:
        grad = grad * readers[:, None, :, None]
    options = {"softcap": softcap, "sinks": None if logits is None else logits.cpu().double()}
    passes = []
    attention(*wide, SCALE, observe=passes.append, mask=mask, **options).backward(grad)
    back = converted(passes[0], EXACT, on_device(mask))
    credit, mass, weight, _, _, _ = dense_account(*wide, grad, SCALE, allowed, readers=readers, **options)
    starts = [0, 0] if readers is None else readers.int().argmax(1).tolist()
    first = torch.zeros(2, 1, 1, length, dtype=torch.bool)
    for row, start in zip(first, starts, strict=True):
        row[..., start : start + 3] = True
    bins, keys = Bins.of("octaves", length), FirstKeys.of(back, 3)
    table = kernel_table(back.query, back.key, back.value, back)
    ours = triton_sums.sum_bins(KernelOperands.of(back, table, keys.columns()), bins.first)
    bound = torch.float32 if softcap else EXACT  # the series of tanh has ten digits
    for actual, edges in zip(ours, torch.cat([credit, mass, weight[None]]) * ~first, strict=True):
        error = (actual.cpu() - bins.sum(by_lag(edges))).norm()
        assert error <= 16 * torch.finfo(bound).eps * max(bins.sum(by_lag(edges.abs())).norm().item(), 1.0)
    if softcap is None and INTERPRETED:  # in float64; quotients by 1 - a_ij lose digits, as those of the reference do
        ends = (length,) if length < 3 else (length // 3, length // 3 + 1, length)
        prices = pass_prices(back, keys, ends)
        pairs = dense_pair_prices(wide, grad, SCALE, allowed, ends, **options)
        torch.testing.assert_close(prices.pairs, pairs, rtol=1e-9, atol=1e-11)
        if length > 1:
            by_head, by_layer = dense_window_prices(wide, grad, SCALE, allowed, first, **options)
            torch.testing.assert_close(prices.windows, by_head, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(prices.layer_windows, by_layer, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("name", "softcap"), [("plain", None), ("window", 1.5), ("left padding", None)])
def test_sums_in_lower_precision_are_those_of_the_blocks_in_float64_of_the_same_tensors(dtype, name, softcap):
    """Products of half precision are exact in float32: only the sums round."""
    tensors, _ = inputs(33, False, torch.float32)
    mask = on_device(mask_case(name, 33)[0])
    _, _, back = run(tensors, torch.randn(2, HEADS, 33, DIM_V).to(DEVICE), mask=mask, softcap=softcap)
    back = converted(back, dtype, mask)
    wide = converted(back, torch.float64, mask)
    object.__setattr__(wide, "_total", tuple(x.double() for x in back.total_gradients()))
    bins, keys = Bins.of("octaves", 33), FirstKeys.of(wide, 3)
    table = kernel_table(back.query, back.key, back.value, back)
    operands = KernelOperands.of(back, table, keys.columns())
    ours = triton_sums.sum_bins(operands, bins.first)
    assert torch.equal(ours, triton_sums.sum_bins(operands, bins.first))  # the same bits again
    sums = sum_by_lag(wide, None, keys.columns())
    for actual, by_lags in zip(ours, [*sums.credit, *sums.mass, sums.attention], strict=True):
        close(actual, bins.sum(by_lags).cpu(), torch.float32, 64)
    exact, blocks = PriceSums.of(wide, (20, 33)), PriceSums.of(back, (20, 33))
    sweep(wide, (exact,), None, keys.columns())
    sweep(back, (blocks,), None, keys.columns())  # in float32: how much a quotient by 1 - a_ij loses there
    kernels = triton_sums.square_changes(operands, (20, 33))
    assert (kernels - exact.squares).norm() <= 4 * (blocks.squares - exact.squares).norm() + 1e-6 * exact.squares.norm()
    close(triton_sums.sum_octaves(operands, octaves(33)), exact.beyond.cpu(), torch.float32, 64)


def converted(back, dtype, mask):
    """The same pass with all its tensors in a type, on the device."""
    fields = ["query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value"]
    tensors = {name: getattr(back, name).to(DEVICE, dtype) for name in fields}
    lse = back.lse.to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32)
    return dataclasses.replace(back, **tensors, lse=lse, mask=mask)


def test_heads_with_masks_of_their_own_have_the_numbers_of_the_blocks(monkeypatch):
    tensors, _ = inputs(33, False, torch.float32)
    grad, bins = torch.randn(2, HEADS, 33, DIM_V).to(DEVICE), Bins.of("octaves", 33)
    results = []
    for device in (DEVICE, "none"):
        monkeypatch.setattr(block_kernels, "DEVICE", device)
        mask = on_device(mask_case("left padding", 33)[0]).restrict_to_self([1, 2], HEADS)
        out, grads, back = run(tensors, grad, mask=mask)
        entry = pass_credit(back, self_edge_gradients(back), bins, prices=True)
        results.append((out, *grads, entry.credit, entry.mass, entry.attention, entry.prices.pairs))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected.cpu(), torch.float32, 64)


@pytest.mark.parametrize("window", [None, 200])
def test_blocks_of_few_bins_and_of_many_give_the_sums_by_lag(window, monkeypatch):
    """Long enough for blocks far from the diagonal, which a loop of their own takes."""
    length = 290
    tensors = [torch.randn(1, heads, length, DIM, device=DEVICE).requires_grad_() for heads in (1, 1, 1)]
    mask = Mask() if window is None else Mask(lambda q, k: (k <= q) & (q - k < window))
    _, _, back = run(tensors, torch.randn(1, 1, length, DIM, device=DEVICE), mask=mask)
    bins = Bins.of("octaves", length)
    ours = pass_credit(back, self_edge_gradients(back), bins)
    far = triton_sums._far_lag(bins.first, 32)
    assert 0 < far < length - 32
    monkeypatch.setattr(block_kernels, "DEVICE", "none")
    blocks = pass_credit(back, self_edge_gradients(back), bins)
    for field in ("credit", "mass", "attention"):
        close(getattr(ours, field), getattr(blocks, field).cpu(), torch.float32)


@pytest.mark.parametrize("shape", [(16, 16), (32, 16), (16, 32)])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("length", [1, 31, 32, 50])
def test_a_table_of_blocks_holds_every_edge_once(shape, name, length):
    mask, allowed, _ = mask_case(name, length)
    table = BlockTable.of(mask, length, shape, torch.device("cpu"))
    for by_column, blocks in enumerate((table.by_row, table.by_column)):
        for document in range(table.documents):
            pairs = torch.zeros(table.count[0] * shape[0], table.count[1] * shape[1], dtype=torch.int)
            for line in range(table.count[by_column]):
                first = document * table.strides[0] * table.count[by_column] + line
                for entry in range(int(blocks.start[first]), int(blocks.start[first + 1])):
                    other, number = int(blocks.other[entry]), int(blocks.partial[entry])
                    row, column = (other, line) if by_column else (line, other)
                    block = torch.ones(shape, dtype=torch.int) if number < 0 else table.edges[number].int()
                    pairs[row * shape[0] :][: shape[0], column * shape[1] :][:, : shape[1]] += block
            beyond = pairs[:, length:]
            assert not beyond.any()
            assert torch.equal(pairs[:length, :length], allowed[document if len(allowed) > 1 else 0, 0].int())


def test_a_mask_that_looks_ahead_is_refused():
    with pytest.raises(InputError, match="later keys"):
        BlockTable.of(Mask(lambda q, k: k <= q + 1), 20, (16, 16), torch.device("cpu"))


def test_what_no_kernel_takes_says_why(monkeypatch):
    tensors, _ = inputs(16, False, torch.float32)
    scoring = run(tensors, torch.randn(2, HEADS, 16, DIM_V, device=DEVICE))[2]
    query, key, value = (x.detach() for x in tensors)
    assert block_kernels.refusal(query, key, value, scoring) is None
    wide = torch.randn(2, HEADS, 16, 257, device=DEVICE)
    assert "wider than 256" in block_kernels.refusal(wide, wide, wide, scoring)
    biased = dataclasses.replace(scoring, bias=torch.zeros(1, 1, 1, 1))
    assert "bias" in block_kernels.refusal(query, key, value, biased)
    assert "more keys" in block_kernels.refusal(query[:, :, 1:], key, value, scoring)
    monkeypatch.setattr(block_kernels, "triton_attention", None)
    assert "not installed" in block_kernels.refusal(query, key, value, scoring)
    assert key.shape[1] == GROUPS


def test_chosen_kernels_say_what_they_do_not_take():
    tensors, _ = inputs(16, False, torch.float32)
    grad = torch.randn(2, HEADS, 16, DIM_V, device=DEVICE)
    with block_kernels.choose_kernels("triton"):
        back = run(tensors, grad)[2]
        assert sweep_path(back, Bins.of("octaves", 16)) == "triton"
        with pytest.raises(InputError, match="at most 256 bins of lags, not 300"):
            sweep_path(back, Bins.of("all", 300))
    with block_kernels.choose_kernels("blocks"):
        assert sweep_path(back, Bins.of("octaves", 16)) == "blocks"
