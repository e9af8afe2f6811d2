"""The Monitor: it measures the whole gradient, logs it, and changes nothing."""

import numpy as np
import pytest
import torch
from support.tiny import tiny, tokens
from support.trainings import equal_tensors, logged_losses, train_tiny, training_arguments, weights
from transformers import Trainer as PlainTrainer

import posterity
from posterity import Full, InputError, Monitor, Myopic
from posterity.results import stats
from posterity.results.steps import split_steps
from posterity.training.data import Rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("rule", [Full(), Myopic()])
def test_a_monitor_changes_nothing_and_measures_the_whole_gradient(tmp_path, rule):
    settings, probe = {"horizon": rule, "cut": "hidden"}, tokens(2, seed=9)
    monitor = Monitor(2, probe, output=tmp_path / "run.nc")
    monitored = train_tiny(tmp_path, monitor, settings=settings)
    assert equal_tensors(weights(monitored), weights(train_tiny(tmp_path, settings=settings)))
    assert logged_losses(monitored) == logged_losses(train_tiny(tmp_path, settings=settings))
    result = posterity.load(tmp_path / "run.nc")
    assert list(result.step.values) == [0, 2, 4]
    assert (tmp_path / "run.html").exists()
    for step, model in ((0, tiny("llama", torch.float32)), (4, monitored.model)):
        right = posterity.measure(model, None, probe, context=12, losses=True, horizons=(1, 4), progress=False)
        for name in right.data_vars:
            np.testing.assert_array_equal(split_steps(result)[step][name], right[name])
    logged = [row for row in monitored.state.log_history if "posterity/key_self_share" in row]
    assert [row["step"] for row in logged] == [0, 2, 4]
    assert {
        "posterity/layer02/value_own_share",
        "posterity/key_later_share",
        "posterity/layer00/key_weight_self_share",
    } <= set(logged[0])
    share = stats.shares(split_steps(result)[4], ("layer",)).share
    assert logged[-1]["posterity/layer01/key_self_share"] == pytest.approx(
        float(share.sel(layer=1, stream="key", side="self"))
    )


def test_a_monitor_works_with_any_trainer_and_says_so_when_it_is_not_attached(tmp_path):
    monitor = Monitor(3, tokens(1))
    with pytest.raises(InputError, match=r"call monitor.attach\(trainer\)"):
        train_tiny(tmp_path, monitor, kind=PlainTrainer)
    model, ids = tiny("llama", torch.float32), tokens(64)
    trainer = PlainTrainer(model=model, args=training_arguments(tmp_path), train_dataset=Rows(ids, ids))
    Monitor(3, tokens(1)).attach(trainer)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "posterity/key_self_share" in row] == [0, 3, 4]
    with pytest.raises(InputError, match="every 1 steps or more; got 0"):
        Monitor(0, tokens(1))
