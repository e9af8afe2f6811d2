"""check() says which layers go block by block, and why."""

from support.tiny import tiny

import posterity
from posterity.models import recorder


def test_every_layer_off_a_gpu_goes_block_by_block():
    result = posterity.check(tiny("llama"))
    ((reason, layers),) = result.without_kernels.items()
    assert layers == result.layers
    assert result.describe_kernels() == f"sums over edges: block by block in plain PyTorch ({reason})"


def test_layers_with_kernels_are_told_from_others(monkeypatch):
    calls = iter(["one reason", None, "another reason"] * 9)
    monkeypatch.setattr(recorder, "refusal", lambda *_: next(calls))
    result = posterity.check(tiny("llama"))
    assert [[layer.name[-11] for layer in layers] for layers in result.without_kernels.values()] == [["0"], ["2"]]
    assert result.describe_kernels() == (
        "sums over edges: Triton kernels in 1 of 3 layers; "
        "block by block in plain PyTorch in 1 of 3 layers (one reason); "
        "block by block in plain PyTorch in 1 of 3 layers (another reason)"
    )
    monkeypatch.setattr(recorder, "refusal", lambda *_: None)
    assert posterity.check(tiny("llama")).describe_kernels() == "sums over edges: Triton kernels"
