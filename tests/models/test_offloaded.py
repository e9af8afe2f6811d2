"""Models whose weights accelerate brings when they are needed are measured as those that lie in memory."""

import accelerate
import pytest
import torch
from support.adapted import PEFT_WARNING, adapt, configs
from support.tiny import tiny, tokens

import posterity
from posterity.errors import InputError
from posterity.measurement.run_state import fingerprint


def measure(model, **options):
    return posterity.measure(model, None, tokens(2), context=12, progress=False, **options)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_model_is_measured_as_the_whole_one(name, place, tmp_path):
    expected = measure(tiny(name), losses=True)
    whole = fingerprint(tiny(name))
    if place == "cpu":
        model = accelerate.cpu_offload(tiny(name), torch.device("cpu"))
    else:
        model = accelerate.disk_offload(tiny(name), tmp_path, torch.device("cpu"))
    assert posterity.check(model).ok
    result = measure(model, losses=True)
    assert all(x.is_meta for x in model.model.layers.parameters()) if name == "llama" else True
    for variable in expected.data_vars:
        torch.testing.assert_close(
            torch.tensor(result[variable].values), torch.tensor(expected[variable].values), rtol=1e-10, atol=1e-12,
            equal_nan=True,
        )  # fmt: skip
    if place == "cpu":
        assert fingerprint(model) == whole
    with pytest.raises(InputError, match="parameters=True needs all weights in memory"):
        measure(model, parameters=True)


def test_a_model_without_numbers_is_refused():
    with torch.device("meta"):
        model = tiny("llama")
    assert "meta device" in posterity.check(model).reason


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_offloaded_adapters_are_measured_without_their_split():
    model = adapt("llama", configs("llama")["lora"])
    expected = measure(model, weights=False)
    model = accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(InputError, match="these are offloaded"):
        measure(model)
    assert measure(model, weights=False).credit.equals(expected.credit)
