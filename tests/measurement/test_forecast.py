"""What a measurement takes is said without texts, within what the model reads."""

import re

import pytest
import torch
from support.tiny import tiny

from posterity import InputError
from posterity.measurement.forecast import forecast

LINES = r"([\d,]+) parameters, 0\.00 GB in (\w+)\n(\d+) windows? of (\d+) tokens: about .+ s and \d+\.\d\d GB .*"


@pytest.mark.parametrize(
    ("options", "windows", "tokens"),
    [({}, "16", "64"), ({"context": 8, "limit": 1}, "1", "8")],
)
def test_a_forecast_says_size_and_time_and_memory_within_the_model_s_context(options, windows, tokens):
    model = tiny("gpt2", torch.float32)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    match = re.fullmatch(LINES, forecast(model, **options))
    assert match is not None
    assert match.groups() == (f"{model.num_parameters():,}", "float32", windows, tokens)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert all(x.requires_grad and x.grad is None for x in model.parameters())


def test_a_context_beyond_the_model_is_refused():
    with pytest.raises(InputError, match="the model reads at most 64 tokens; got a context of 65"):
        forecast(tiny("gpt2"), context=65)
