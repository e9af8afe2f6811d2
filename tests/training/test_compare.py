"""Held-out losses of compared runs, and the myopia gap."""

import math

import numpy as np
import pytest
import torch
from support.tiny import tiny
from support.trainings import INDUCTION
from transformers import AutoModelForCausalLM

from posterity import InputError, compare
from posterity.results.comparison_schema import myopia_gaps
from posterity.training.compare import position_losses
from posterity.training.data import prepare_data
from posterity.training.run import train
from posterity.training.settings import Settings
from posterity.training.tasks import Regressor, Sines

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_the_myopia_gap_is_the_difference_of_held_out_losses(tmp_path):
    folders = []
    for horizon in ("full", "myopic"):
        for seed in (0, 1):
            settings = Settings(**INDUCTION | {"steps": 30, "rate": 0.05}, horizon=horizon, seed=seed)
            folders.append(train(tmp_path / f"{horizon}{seed}", settings, progress=False))
    comparison = compare(folders, progress=False)
    ids = prepare_data(Settings(**INDUCTION)).held_out[0]
    right = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            loss = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in ids])
        right.append(loss.numpy())
    np.testing.assert_allclose(comparison.loss.mean("position"), right, rtol=1e-4)
    gaps = myopia_gaps(comparison)
    assert list(gaps.arm.values) == ["vanilla", "myopic, cut at k and v"]
    gap = np.stack(right)[2:] - np.stack(right)[:2]  # seed, row
    assert float(gaps.gap[1]) == pytest.approx(gap.mean(), rel=1e-3)
    error = math.sqrt(gap.mean(0).var(ddof=1) / gap.shape[1] + gap.mean(1).var(ddof=1) / 2)
    assert float(gaps.gap_error[1]) == pytest.approx(error, rel=1e-3)
    np.testing.assert_allclose(gaps.gap_by_position.mean("position"), gaps.gap, rtol=1e-9, atol=1e-12)
    assert float(gaps.gap[0]) == 0
    for message, refused in {
        "at least two runs; got 1": folders[:1],
        "expected each run once; vanilla with seed 0 came twice": [folders[0], folders[0]],
        "expected a run with horizon full and seed 1 beside": [folders[0], folders[3]],
        "its run.json cannot be read": [folders[0], tmp_path],
    }.items():
        with pytest.raises(InputError, match=message):
            compare(refused, progress=False)
    longer = train(tmp_path / "longer", Settings(**INDUCTION | {"steps": 4}, seed=5), progress=False)
    with pytest.raises(
        InputError, match="differ in horizon, cut, streams, layers and seed only; here steps is 30 and 4"
    ):
        compare([folders[0], longer], progress=False)


def test_losses_by_position_of_sines_are_huber_s():
    torch.manual_seed(0)
    model = Regressor(tiny("gpt2").config).eval()
    task = Sines(length=6)
    inputs = task.inputs(3, 0)
    with torch.no_grad():
        losses = position_losses(model, inputs, task.labels(inputs))
        off = model(input_ids=inputs).logits[..., 0] - task.labels(inputs)
    right = torch.where(off.abs() < 1, off**2 / 2, off.abs() - 0.5)
    np.testing.assert_allclose(losses, right, rtol=1e-5, atol=1e-7)
