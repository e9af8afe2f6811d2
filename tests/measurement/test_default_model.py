"""The real default model on real text, end to end as a user runs it: balances and laws, no golden numbers."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from support.reference import by_lag
from support.spy import spy_on

import posterity
from posterity.inputs import model as loading
from posterity.inputs.documents import default_text
from posterity.inputs.windows import cut_windows
from posterity.models.chunked_loss import window_losses
from posterity.models.language_model import freeze_parameters
from posterity.results import stats

pytestmark = pytest.mark.slow
POSTERITY = [sys.executable, "-m", "posterity"]


def test_the_command_measures_saves_and_reports(tmp_path):
    run, page = tmp_path / "run.nc", tmp_path / "report.html"
    command = [*POSTERITY, "measure", "--context", "160", "--documents", "2", "-o", str(run), "-r", str(page)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "2 windows of 160 tokens: about" in process.stderr
    assert "self share" in process.stdout
    result = posterity.load(run)
    assert result.sizes["layer"] == 30
    assert float(stats.balance(result).max()) < 1e-5
    sides = stats.shares(result).share
    np.testing.assert_allclose(sides.sum("side"), 1, rtol=1e-12)
    # an English model writes mostly for later readers, and reads real text better than chance
    assert (result.loss < np.log(49152) / 2).all()
    assert result.attrs["model"] == "SmolLM2-135M-Instruct"
    assert "<html" in page.read_text()[:200].lower()


def test_float32_accounts_equal_the_dense_ones_of_the_float64_reference():
    loaded = loading.load_model(None)
    ids = cut_windows([default_text()], loaded.tokenizer, 96, 1)[0].ids
    result = posterity.measure(loaded.model, None, ids, context=96, lags="all", weights=False, progress=False)
    model = loaded.model.double()
    with spy_on(model) as spy, freeze_parameters(model):
        window_losses(model, ids[None]).sum().backward()
    for layer, dense in enumerate(spy.accounts()):
        expected = by_lag(dense[0]).sum(1).movedim(0, 1).numpy()
        actual = result.credit.sum("reader_of").sel(layer=layer).values
        largest = np.abs(expected).max()
        # float32 gradients of a 30-layer model, against float64 ones
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-3 * largest)
    assert torch.get_default_dtype() == torch.float32


def test_check_says_whether_and_what_a_measurement_takes():
    command = [*POSTERITY, "check", "--context", "128", "--limit", "2"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    verdict, kernels, size, cost = process.stdout.splitlines()
    assert verdict == "can be measured: 30 attention layers"
    assert kernels.startswith("sums over edges: ")
    assert size == "134,515,008 parameters, 0.54 GB in float32"
    assert cost.startswith("2 windows of 128 tokens: about ")
