"""A hostile world for every test: shapes checked, fresh memory NaN, fixed seeds, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes: one thread each, or they wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import support.shape_checks  # noqa: F401  (the hook below calls it by name)
from jaxtyping import install_import_hook

import posterity.ops.horizon_rules  # before the hook: rules check their arguments themselves, wrong types too

with install_import_hook(["posterity.ops", "posterity.decomposition"], "support.shape_checks.check_calls"):
    import posterity.decomposition.participation
    import posterity.decomposition.weight_gradients
    import posterity.ops.mask

import pytest
import torch


@pytest.fixture(autouse=True)
def _hostile():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # also fills fresh memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 x 8, so that short sequences meet every kind of block edge."""
    monkeypatch.setitem(posterity.ops.mask.BLOCK, "cpu", (4, 8))
