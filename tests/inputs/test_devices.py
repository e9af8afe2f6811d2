"""Models that lie on several devices, and processes that have one each."""

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook
from support.tiny import tiny, tokens

import posterity
from posterity import InputError
from posterity.inputs import pretrained
from posterity.inputs.model import load_model, select_device


def measure_all(model):
    return posterity.measure(
        model, None, tokens(3, 12), context=12, losses=True, horizons=(1, 2), parameters=True, progress=False
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_model_whose_modules_move_their_inputs_between_devices_gives_the_same_bits(name):
    plain, spread = tiny(name), tiny(name)
    leaves = {name: "cpu" for name, module in spread.named_modules() if name and not list(module.children())}
    spread = dispatch_model(spread, leaves, main_device="cpu", force_hooks=True)
    hooked = [module for module in spread.modules() if isinstance(getattr(module, "_hf_hook", None), AlignDevicesHook)]
    assert len(hooked) > 10
    expected, result = measure_all(plain), measure_all(spread)
    for variable in expected.data_vars:
        assert np.array_equal(expected[variable].values, result[variable].values, equal_nan=True), variable


def test_auto_loads_the_same_model(folder):
    expected, model = load_model(str(folder)).model.state_dict(), load_model(str(folder), device="auto").model
    assert not model.training
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())


def test_auto_and_several_processes_on_one_machine_are_refused(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start one process a machine, or leave --device out"):
        load_model(str(folder), device="auto")


def test_a_model_that_does_not_fit_is_refused(folder, monkeypatch):
    load_weights = pretrained.load_weights

    def load_partly(path, **options):
        model = load_weights(path, **options)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"))
        return model

    monkeypatch.setattr(pretrained, "load_weights", load_partly)
    with pytest.raises(InputError, match=r"1 of its weights, such as lm_head.weight, do not"):
        load_model(str(folder), device="auto")


@pytest.mark.parametrize(("rank", "device"), [(None, 0), ("0", 0), ("3", 3), ("9", 1)])
def test_each_process_takes_the_device_of_its_own_number(rank, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert select_device(None) == torch.device("cuda", device)
