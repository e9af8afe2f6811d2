"""The Monitor: it measures the whole gradient, logs it, and changes nothing."""

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import xarray as xr
from support.texts import tokenizer
from support.tiny import tiny, tokens
from support.trainings import equal_tensors, logged_losses, train_tiny, training_arguments, weights
from transformers import Trainer as PlainTrainer
from transformers import TrainerCallback

import posterity
from posterity import Full, InputError, Monitor, Myopic
from posterity.results import stats
from posterity.results.steps import split_steps
from posterity.training.data import Rows
from posterity.training.monitor import scalars

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("rule", [Full(), Myopic()])
def test_a_monitor_changes_nothing_and_measures_the_whole_gradient(tmp_path, rule):
    settings, probe = {"horizon": rule, "cut": "hidden"}, tokens(2, seed=9)
    monitor = Monitor(2, probe, layers=True, output=tmp_path / "run.nc")
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


class Log(TrainerCallback):
    """What a logger is given."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append({"step": state.global_step, **(logs or {})})


@pytest.mark.parametrize("kind", [PlainTrainer, posterity.Trainer])
def test_a_monitor_among_the_callbacks_is_all_that_a_trainer_needs(tmp_path, kind):
    monitor, log = Monitor(3), Log()
    trainer = train_tiny(tmp_path, log, monitor, kind=kind)
    for rows in (log.rows, trainer.state.log_history):
        assert [row["step"] for row in rows if "posterity/key_self_share" in row] == [0, 3, 4]
    assert trainer.callback_handler.callbacks.count(monitor) == 1
    result = monitor.results[4]
    assert list(result.text.values) == ["training row 0", "training row 1"]
    right = posterity.measure(trainer.model, None, tokens(64)[:2], context=12, losses=True, progress=False)
    xr.testing.assert_equal(result.credit, right.credit)


def test_the_model_and_its_extreme_layers_are_logged_and_every_layer_on_request(tmp_path):
    monitor = Monitor(4)
    train_tiny(tmp_path, monitor)
    result = monitor.results[4]
    few, all_layers = scalars(result), scalars(result, layers=True)
    assert not [name for name in few if "layer0" in name]
    assert few.items() <= all_layers.items()
    for name in ("key_self_share", "value_own_share", "query_weight_self_share"):
        layers = [all_layers[f"posterity/layer{layer:02d}/{name}"] for layer in range(3)]
        assert few[f"posterity/{name}_min"] == min(layers) < few[f"posterity/{name}_max"] == max(layers)
        assert min(layers) < few[f"posterity/{name}"] < max(layers)
    gradients = result.hidden_by_document.sum("document")
    own, later, inner = (gradients.sel(loss_term=term).values for term in ("own", "later", "inner"))
    for layer, cosine in enumerate(inner / np.sqrt(own * later)):
        assert all_layers[f"posterity/layer{layer:02d}/hidden_own_later_cosine"] == pytest.approx(cosine)
    assert few["posterity/hidden_own_later_cosine"] < few["posterity/hidden_own_later_cosine_max"]


def trainer_of(folder, train=None, evaluation=None, **options):
    arguments = training_arguments(folder)
    model = tiny("llama", torch.float32)
    return PlainTrainer(model=model, args=arguments, train_dataset=train, eval_dataset=evaluation, **options)


def test_the_probe_is_the_documents_or_rows_to_evaluate_on_or_rows_to_train_on(tmp_path):
    train, evaluation = (Rows(ids, ids) for ids in (tokens(4, seed=1), tokens(4, seed=2)))
    documents = tokens(3, seed=3)
    for trainer, monitor, name, rows in (
        (trainer_of(tmp_path, train), Monitor(), "training row 0", train.inputs),
        (trainer_of(tmp_path, train, evaluation), Monitor(), "evaluation row 0", evaluation.inputs),
        (trainer_of(tmp_path, train, {"a": evaluation, "b": train}), Monitor(), "evaluation row 0", evaluation.inputs),
        (trainer_of(tmp_path, train, evaluation), Monitor(documents=documents), "document 0", documents),
    ):
        (first, probe), (_, second) = monitor.attach(trainer).probe
        assert first == name
        assert torch.equal(torch.stack([probe.ids, second.ids]), rows[:2])
    with pytest.raises(InputError, match=r"this one has none: pass documents=\.\.\."):
        Monitor().attach(trainer_of(tmp_path))
    with pytest.raises(InputError, match="the training rows of the Trainer to hold input_ids or text; got a dict with"):
        Monitor().attach(trainer_of(tmp_path, [{"pixels": [1]}]))


def test_rows_of_a_data_set_of_many_lengths_are_a_probe(tmp_path):
    rows = {"input_ids": [list(range(1, 1 + length)) for length in (5, 30, 24, 30)]}
    rows["attention_mask"] = [[1] * len(ids) for ids in rows["input_ids"]]
    probe = Monitor().attach(trainer_of(tmp_path, datasets.Dataset.from_dict(rows))).probe
    assert [(name, document.ids.tolist()) for name, document in probe] == [
        ("training row 1", list(range(1, 31))), ("training row 3", list(range(1, 31)))
    ]  # fmt: skip


def test_token_ids_shorter_than_a_window_of_text_set_its_length(tmp_path):
    trainer = trainer_of(tmp_path)

    def sizes(documents, **options):
        probe = Monitor(documents=documents, **options).attach(trainer).probe
        return [len(document.ids) for _, document in probe]

    row = torch.arange(1, 61)
    assert sizes(row) == [60]
    assert sizes(row[:12].tolist()) == [12]
    assert sizes([row[:50], row, row.repeat(2)[:80]]) == [60, 60]  # more tokens than in one window of 80
    assert sizes([row[:3], row]) == [60]
    assert sizes(row.repeat(5)) == [128, 128]
    assert sizes(row, context=16, limit=3) == [16] * 3
    assert sizes([{"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]}]) == [3]
    text = " ".join(f"w{number % 60 + 1}" for number in range(300))
    assert sizes(text, tokenizer=tokenizer()) == [128, 128]


def test_labels_without_a_loss_have_none_in_the_probe_either(tmp_path):
    ids, labels = tokens(4), tokens(4)
    labels[:, :7] = -100
    monitor = Monitor(4)
    trainer_of(tmp_path, Rows(ids, labels), callbacks=[monitor]).train()
    before = monitor.results[0]
    assert before.tokens.values.tolist() == [5, 5]
    model = tiny("llama", torch.float32)
    with torch.no_grad():
        losses = [float(model(input_ids=ids[[row]], labels=labels[[row]]).loss) for row in (0, 1)]
    np.testing.assert_allclose(before.loss, losses, rtol=1e-5)


def test_what_no_trainer_of_transformers_runs_is_told_what_to_do():
    with pytest.raises(InputError, match=r"another one runs it: call monitor.attach\(trainer\)"):
        Monitor(3).on_train_begin(None, None, None)
    with pytest.raises(InputError, match="every 1 steps or more; got 0"):
        Monitor(0, tokens(1))


DOCUMENT = Path(__file__).parents[2] / "docs" / "training.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_of_the_document_run_as_printed(tmp_path, monkeypatch, number):
    assert len(EXAMPLES) == 2
    monkeypatch.chdir(tmp_path)
    ids = tokens(8)
    arguments = training_arguments(tmp_path / "run", max_steps=1)
    names = {"model": tiny("llama", torch.float32), "ids": ids, "rows": Rows(ids, ids), "arguments": arguments}
    exec("import posterity, transformers\n" + EXAMPLES[number], names)
    history = names["trainer"].state.log_history
    assert [row["step"] for row in history if "posterity/key_self_share" in row] == [0, 1]
