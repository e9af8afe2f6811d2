"""Where the Triton kernels do not apply: the reason is logged once."""

import pytest
import torch
from support.attention_cases import DIM_V, HEADS, leaves, run_backward

from posterity.decomposition.bins import Bins
from posterity.decomposition.edge_sums import sweep_path
from posterity.errors import InputError, warn_once
from posterity.ops import block_kernels
from posterity.ops.mask import Mask


def window(query, key):
    return (key <= query) & (query - key < 3)


def run():
    inputs, grad = leaves(9)[:3], torch.randn(2, HEADS, 9, DIM_V, dtype=torch.double)
    return run_backward(*inputs, grad, mask=Mask(window))


def test_on_the_device_of_the_kernels_the_reason_is_logged_once(monkeypatch, caplog):
    warn_once.cache_clear()
    monkeypatch.setattr(block_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(block_kernels, "triton_attention", None)
    for _ in range(2):
        assert sweep_path(run(), Bins.of("octaves", 9)) == "blocks"
    assert caplog.text.count("block by block in plain PyTorch, which is slower: Triton is not installed") == 1


def test_elsewhere_nothing_is_said(caplog):
    warn_once.cache_clear()
    run()
    assert not caplog.text


def test_a_choice_of_kernels_never_falls_back(monkeypatch):
    monkeypatch.setattr(block_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(block_kernels, "triton_attention", None)
    with block_kernels.choose_kernels("triton"), pytest.raises(InputError, match=r"do not apply: Triton is not"):
        run()
    back = run()
    with block_kernels.choose_kernels("triton"):
        with pytest.raises(InputError, match=r"Triton is not installed: choose auto or blocks \(--kernels\)"):
            sweep_path(back, Bins.of("octaves", 9))
        with block_kernels.choose_kernels("blocks"):
            assert sweep_path(back, Bins.of("octaves", 9)) == "blocks"
        assert sweep_path(back, Bins.of("self", 9)) == "none"
    assert sweep_path(back, Bins.of("octaves", 9)) == "blocks"
    with (
        pytest.raises(InputError, match=r"among auto, triton, blocks; got 'flash'"),
        block_kernels.choose_kernels("flash"),
    ):
        pass


def test_plain_pytorch_is_chosen_without_a_warning(monkeypatch, caplog):
    warn_once.cache_clear()
    monkeypatch.setattr(block_kernels, "DEVICE", "cpu")
    with block_kernels.choose_kernels("blocks"):
        run()
    assert not caplog.text
