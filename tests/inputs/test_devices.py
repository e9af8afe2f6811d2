"""Models that lie on several devices, and processes that have one each. What needs a GPU is in test_gpu.py."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook
from support.tiny import tiny, tokens

import posterity
from posterity import InputError
from posterity.inputs.model import _device, load_model


def everything(model):
    return posterity.measure(
        model, None, tokens(3, 12), context=12, losses=True, horizons=(1, 2), parameters=True, progress=False
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_model_whose_modules_move_their_inputs_between_devices_gives_the_same_bits(name):
    plain, spread = tiny(name), tiny(name)
    parts = {part: "cpu" for part, one in spread.named_modules() if part and not any(True for _ in one.children())}
    spread = dispatch_model(spread, parts, main_device="cpu", force_hooks=True)
    hooked = [module for module in spread.modules() if isinstance(getattr(module, "_hf_hook", None), AlignDevicesHook)]
    assert len(hooked) > 10
    one, two = everything(plain), everything(spread)
    for variable in one.data_vars:
        assert np.array_equal(one[variable].values, two[variable].values, equal_nan=True), variable


def test_auto_loads_the_same_model(folder):
    one, two = load_model(str(folder)).model, load_model(str(folder), device="auto").model
    assert not two.training
    for (name, x), (other, y) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(x, y)


def test_auto_and_several_processes_on_one_machine_are_refused(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start one process a machine, or leave --device out"):
        load_model(str(folder), device="auto")


def test_a_model_that_does_not_fit_is_refused(folder, monkeypatch):
    import posterity.inputs.model as loading

    original = loading._model

    def away(path, **options):
        model = original(path, **options)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"))
        return model

    monkeypatch.setattr(loading, "_model", away)
    with pytest.raises(InputError, match=r"1 of its weights, such as lm_head.weight, do not"):
        load_model(str(folder), device="auto")


@pytest.mark.parametrize(("rank", "device"), [(None, 0), ("0", 0), ("3", 3), ("9", 1)])
def test_each_process_takes_the_device_of_its_own_number(rank, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert _device(None) == torch.device("cuda", device)


def test_a_run_that_is_told_to_stop_says_so(tmp_path):
    code = (
        "import os, signal, sys; from posterity import cli, sources\n"
        "sources.documents = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.argv = ['posterity', 'measure']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert re.fullmatch("posterity: told to stop from outside, .*\n", done.stderr)
