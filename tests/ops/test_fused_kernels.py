"""The operator on CUDA: what kernels are given, checked without a GPU; and on one, numbers against float64 on a CPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posterity.decomposition.bins import Bins
from posterity.decomposition.credit import pass_credit, self_edge_gradients
from posterity.ops import fused_kernels as fused
from posterity.ops.attention import _Attention, _Options, attention
from posterity.ops.horizon_rules import Discount, EdgeWindow, Full, Myopic
from posterity.ops.mask import Mask

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
HALF = torch.bfloat16


class CalledKernels(TorchDispatchMode):
    """The names of the fused kernels that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_scaled_dot_product" in str(func):
            self.names.append(str(func).removeprefix("aten._scaled_dot_product_").removesuffix(".default"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake(monkeypatch):
    """ "meta" stands for "cuda": shapes and no numbers; whoever asks for a number, and so would wait, raises."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(fused, "_GPU", "meta")


def random_inputs(shape_q=(2, 6, 40, 16), groups=2, dim_v=None, dtype=torch.float32, device="meta"):
    batch, _, length, dim = shape_q
    shapes = (shape_q, (batch, groups, length, dim), (batch, groups, length, dim_v or dim))
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


class Context:
    """What torch hands to a Function; its two passes are called by hand."""

    needs_input_grad = (True, True, True, True, False)

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


def run_pass(leaves, softcap=None, sinks=None, rule=Full()):  # noqa: B008
    """Return (kernels called, output, gradients, the `Backward`)."""
    passes, context = [], Context()
    options = _Options(
        scale=leaves[0].shape[-1] ** -0.5,
        softcap=softcap,
        mask=Mask(),
        horizon=lambda: (rule, rule),
        observe=passes.append,
    )
    with CalledKernels() as called:
        out = _Attention.forward(context, *leaves, sinks, None, None, None, options)
        grads = _Attention._backward(context, torch.ones_like(out))[:3]
    return called.names, out, grads, passes[0]


@pytest.mark.parametrize(
    ("dtype", "dim", "dim_v", "kernel"),
    [
        (HALF, 16, 16, "flash_attention"),
        (torch.float16, 64, 64, "flash_attention"),
        (HALF, 16, 24, "efficient_attention"),
        (HALF, 256, 256, "efficient_attention"),
        (torch.float32, 16, 16, "efficient_attention"),
        (torch.float32, 12, 20, "efficient_attention"),
        (torch.float32, 15, 15, None),
        (HALF, 12, 12, None),
        (torch.float64, 16, 16, None),
    ],
)
@pytest.mark.usefixtures("fake")
def test_the_kernel_is_chosen_by_type_and_width_and_accepts_what_it_gets(dtype, dim, dim_v, kernel):
    leaves = random_inputs((2, 6, 40, dim), dim_v=dim_v, dtype=dtype)
    names, out, grads, back = run_pass(leaves)
    assert names == ([] if kernel is None else [kernel, f"{kernel}_backward"])
    assert (out.shape, out.dtype, out.device.type) == ((2, 6, 40, dim_v), dtype, "meta")
    for grad, leaf in zip(grads, leaves, strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, dtype)
    assert back.lse.shape == (2, 6, 40)  # the kernel's may be longer: 64
    assert back.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert back.grad_key.shape == (2, 6, 40, dim)


@pytest.mark.usefixtures("fake")
def test_an_old_gpu_goes_block_by_block(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert run_pass(random_inputs())[0] == []


@pytest.mark.usefixtures("fake")
def test_a_mask_a_cap_or_sinks_go_block_by_block():
    assert run_pass(random_inputs(), softcap=2.0)[0] == []
    assert run_pass(random_inputs(), sinks=torch.zeros(1, 6, 1, device="meta"))[0] == []


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("lags", ["octaves", "all", "self"])
@pytest.mark.usefixtures("fake")
def test_a_pass_and_its_account_never_wait_for_the_gpu(dtype, lags):
    back = run_pass(random_inputs((1, 6, 700, 16), dtype=dtype))[3]
    entry = pass_credit(back, self_edge_gradients(back), Bins.of(lags, 700))
    assert entry.credit.device.type == "meta"
    with pytest.raises(RuntimeError, match="item"):  # the test would see it
        entry.credit.sum().item()


def test_a_masks_blocks_are_asked_for_once(monkeypatch):
    waits = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: waits.append(x) or tolist(x))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: pytest.fail("one wait for each block"))
    window = Mask(lambda query, key: (key <= query) & (query - key < 300))
    for _ in range(2):
        assert len(window.tiles(700, 700, torch.device("cpu"))) == 6
    assert len(waits) == 2  # for the bounds of all blocks, and for the blocks within them


def dense(leaves, grad, **options):
    """Repeat the pass in float64 on a CPU, which other tests compare with the dense reference."""
    wide = [x.detach().cpu().double().requires_grad_() for x in leaves]
    passes = []
    out = attention(*wide, observe=passes.append, **options)
    grads = torch.autograd.grad(out, wide, grad.cpu().double())
    return passes[0], out, grads


CASES = [(torch.float32, 64, 64, 6), (torch.float32, 64, 32, 2), (torch.float32, 15, 15, 2), (HALF, 64, 64, 2)]
CASES += [(HALF, 64, 32, 2), (HALF, 256, 256, 6), (torch.float16, 128, 128, 2)]


@pytest.mark.parametrize(("dtype", "dim", "dim_v", "groups"), CASES)
@pytest.mark.parametrize("length", [1, 31, 32, 700])
@pytest.mark.parametrize("rule", [Full(), Myopic(), Discount(0.9), EdgeWindow(8)])
@pytest.mark.parametrize("masked", [False, True])
class TestOnAGpu:
    """Errors in the norm of each tensor, relative to its own: a few roundings of the type the kernel works in."""

    pytestmark = gpu

    def test_output_gradients_and_ledger_equal_float64_on_a_cpu(self, dtype, dim, dim_v, groups, length, rule, masked):
        leaves = [x.requires_grad_() for x in random_inputs((2, 6, length, dim), groups, dim_v, dtype, "cuda")]
        options = {"horizon": lambda: (rule, rule)}
        ours, theirs = dict(options), dict(options)
        if masked:
            ours["mask"], theirs["mask"] = (Mask(lambda q, k: (k <= q) & (q - k < 300)) for _ in range(2))
        passes = []
        out = attention(*leaves, observe=passes.append, **ours)
        grad = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, grad)
        back, expected_out, expected_grads = dense(leaves, grad, **theirs)
        bound = 32 * torch.finfo(dtype).eps

        def same(actual, expected):
            assert (actual.cpu().double() - expected).norm() <= bound * expected.norm()

        same(out, expected_out)
        same(passes[0].lse, back.lse)
        for actual, expected in zip(grads, expected_grads, strict=True):
            same(actual, expected)
        bins = Bins.of("octaves", length)
        actual, expected = (pass_credit(x, self_edge_gradients(x), bins) for x in (passes[0], back))
        for name in ("credit", "mass", "attention"):
            same(getattr(actual, name), getattr(expected, name))
        assert torch.equal(actual.edges.cpu(), expected.edges)
