"""Built-in tasks, the model of sines, and the names of horizons."""

import math

import pytest
import torch
from support.tiny import tiny

import posterity
from posterity import Discount, EdgeWindow, Full, InputError, Leak, Myopic
from posterity.ops.horizon_rules import parse
from posterity.results import stats
from posterity.training.tasks import Induction, Regressor, Sines

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("task", [Sines(), Sines(3, 2.0, 0.5, 7), Sines(9, 1.0, 0.1, 4)])
def test_targets_of_sines_are_the_formula(task):
    inputs = task.inputs(5, seed=3).double()
    for (x, z), labels in zip(inputs.transpose(1, 2), task.labels(inputs), strict=True):
        for n in range(task.length):
            waves = sum(math.sin(task.frequency * x[n - i]) for i in range(1, task.terms + 1) if n - i >= 0)
            assert float(labels[n]) == pytest.approx(float(z[n] * waves + (1 - z[n]) * x[n]), abs=1e-12)
    many = Sines(chance=0.3, length=50).inputs(4000, seed=1)
    assert abs(many[..., 0].mean()) < 0.01
    assert many[..., 0].std().item() == pytest.approx(1, abs=0.01)
    assert many[..., 1].mean().item() == pytest.approx(0.3, abs=0.01)


def test_induction_repeats_itself_and_rows_follow_the_seed():
    task = Induction(11, 16)
    ids = task.inputs(50, seed=1)
    rows = ids.tolist()
    periods = [next(p for p in range(1, 17) if all(row[n] == row[n - p] for n in range(p, 16))) for row in rows]
    assert set(periods) == {4, 5, 6, 7, 8}  # 50 rows meet all of them, and the second half can always be read off
    assert ids.unique().tolist() == list(range(11))
    assert torch.equal(task.inputs(50, seed=1), ids)
    assert not torch.equal(task.inputs(50, seed=2), ids)


def test_the_model_of_sines_reads_numbers_and_can_be_watched():
    torch.manual_seed(0)
    config = tiny("gpt2").config
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.0
    model = Regressor(config).double()
    assert posterity.check(model).ok
    task = Sines(length=6)
    inputs = task.inputs(3, 0).double()
    output = model(input_ids=inputs, labels=task.labels(inputs))
    right = torch.nn.functional.huber_loss(output.logits[..., 0].float(), task.labels(inputs).float())
    assert float(output.loss) == pytest.approx(float(right))
    with posterity.account(model) as ledger:
        model(input_ids=inputs, labels=task.labels(inputs)).loss.backward()
    assert float(stats.balance(ledger.result()).max()) < 1e-9


def test_horizons_have_names():
    rules = {
        "full": Full(),
        "myopic": Myopic(),
        "discount:0.9": Discount(0.9),
        "window:16": EdgeWindow(16),
        "leak:0.1": Leak(0.1),
    }
    for name, rule in rules.items():
        assert parse(name) == rule
    for name in ("none", "discount", "myopic:1", "window:1.5", "discount:x", ""):
        with pytest.raises(InputError, match="expected a horizon full, myopic"):
            parse(name)
    with pytest.raises(InputError, match="Leak expects a fraction from 0 to 1; got 2"):
        Leak(2)
