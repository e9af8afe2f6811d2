"""Runs as folders: interrupted, resumed, refused; their data."""

import json
from pathlib import Path

import pytest
import torch
from support.texts import tokenizer
from support.tiny import tiny
from support.trainings import INDUCTION, equal_tensors, saved_losses, saved_weights
from transformers import AutoModelForCausalLM, TrainerCallback

import posterity
from posterity import InputError, Monitor, Myopic
from posterity.training.compare import read_run
from posterity.training.data import prepare_data
from posterity.training.run import last_checkpoint, train
from posterity.training.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Stop(TrainerCallback):
    """An interruption in the middle."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [3, 5])
def test_an_interrupted_run_goes_on_to_the_same_losses_and_weights(tmp_path, step):
    settings = Settings(**INDUCTION, horizon="discount:0.5", cut="hidden")
    right = train(tmp_path / "whole", settings, progress=False, save_every=2, monitor=2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", settings, callbacks=[Stop(step)], progress=False, save_every=2, monitor=2)
    assert not (tmp_path / "cut" / "metrics.json").exists()
    broken = tmp_path / "cut" / "checkpoint-5"  # one that was being written
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_step": ')
    assert last_checkpoint(tmp_path / "cut") == str(tmp_path / "cut" / f"checkpoint-{step - step % 2}")
    mine = train(tmp_path / "cut", settings, progress=False, save_every=2, monitor=2)
    assert saved_losses(mine) == saved_losses(right)
    assert equal_tensors(saved_weights(mine), saved_weights(right))
    results = [posterity.load(folder / "monitor.nc").drop_attrs().drop_vars("loss") for folder in (mine, right)]
    assert results[0].identical(results[1])
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("*")}
    assert train(mine, settings, progress=False) == mine  # finished: nothing to do
    assert {path: path.stat().st_mtime_ns for path in mine.rglob("*")} == before


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on(tmp_path, monkeypatch):
    settings, save = Settings(**INDUCTION), torch.save

    def full(state, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(state, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"no space left in .*the same command goes on"):
        train(tmp_path / "run", settings, progress=False, save_every=2)
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")
    monkeypatch.undo()
    mine = train(tmp_path / "run", settings, progress=False, save_every=2)
    assert equal_tensors(saved_weights(mine), saved_weights(train(tmp_path / "whole", settings, progress=False)))


def test_folders_of_other_runs_and_wrong_settings_are_refused_in_one_line(tmp_path):
    train(tmp_path / "run", Settings(**INDUCTION), progress=False)
    with pytest.raises(InputError, match=r"holds another run \(seed was 0, now 1; data_digest was"):
        train(tmp_path / "run", Settings(**INDUCTION, seed=1), progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="it holds something else"):
        train(tmp_path / "other", Settings(**INDUCTION), progress=False)
    for message, changes in {
        "expected a horizon full": {"horizon": "some"},
        'cut expects "kv" or "hidden"': {"cut": "head"},
        'streams expects "key"': {"streams": ("query",)},
        "expected steps of at least 1": {"steps": 0},
        "a width that 3 heads divide; got 16": {"heads": 3},
        "a learning rate above 0": {"rate": 0.0},
        "only sines and induction take numbers": {"data": ("text",)},
        "a seed from 0": {"seed": -1},
    }.items():
        with pytest.raises(InputError, match=message):
            Settings(**INDUCTION | changes)
    with pytest.raises(InputError, match="induction takes vocabulary, length; got zorg"):
        train(tmp_path / "new", Settings(**INDUCTION | {"task": {"zorg": 1}}), progress=False)
    with pytest.raises(InputError, match="expected a type of transformers that can be made"):
        train(tmp_path / "new2", Settings(**INDUCTION | {"model": "zorg"}), progress=False)
    with pytest.raises(InputError, match="a monitor measures models that read tokens"):
        train(tmp_path / "new3", Settings(data=("sines",), steps=1), monitor=1, progress=False)


def test_a_run_that_is_refused_leaves_its_folder_free(tmp_path):
    with pytest.raises(InputError, match="layers expects numbers from 0 to 1"):
        train(tmp_path / "run", Settings(**INDUCTION, layers=(7,)), progress=False)
    train(tmp_path / "run", Settings(**INDUCTION, layers=(1,)), progress=False)
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_folders_that_are_none_are_refused_in_one_line(tmp_path, text):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="it is a file: choose another"):
        train(tmp_path / "file", Settings(**INDUCTION), progress=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"its run\.json is damaged"):
        train(tmp_path / "run", Settings(**INDUCTION), progress=False)


def test_data_that_is_misspelt_or_mixed_is_refused_before_anything_is_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr("posterity.training.data.open_documents", None)
    for data, line in ((("sinus",), "did you mean sines"), (("sines", "my.txt"), "expected sines alone")):
        with pytest.raises(InputError, match=line):
            train(tmp_path / "run", Settings(data=data), progress=False)


def test_a_folded_model_is_not_trained_as_if_it_were_plain(tmp_path):
    from posterity.inputs.limits_folder import save_folded

    (tmp_path / "text.txt").write_text("one two three " * 200)
    save_folded(tiny("llama", torch.float32), tokenizer(), {0: [0]}, tmp_path / "folded", {})
    settings = Settings(model=str(tmp_path / "folded"), data=(str(tmp_path / "text.txt"),))
    with pytest.raises(InputError, match="runs folded: train the plain one"):
        train(tmp_path / "new", settings, progress=False)


def test_a_horizon_s_class_and_half_a_step_are_refused():
    with pytest.raises(InputError, match="expected a horizon such as Myopic"), posterity.horizon(tiny("llama"), Myopic):
        pass
    with pytest.raises(InputError, match=r"every 1 steps or more; got 2\.5"):
        Monitor(every=2.5)


def test_a_model_from_scratch_on_text_has_a_tokenizer_and_held_out_ends(tmp_path):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", ""]
    text = " ".join(words[(n * n) % len(words)] for n in range(3000))
    file = tmp_path / "words.txt"
    file.write_text(text)
    settings = Settings(data=(str(file),), steps=2, batch=2, context=32, width=16, depth=1, heads=2)
    data = prepare_data(settings)
    starts = ["".join(data.tokenizer.decode(row) for row in rows[0]) for rows in (data.train, data.held_out)]
    assert text[: round(0.9 * len(text))].startswith(starts[0])
    assert text[round(0.9 * len(text)) :].startswith(starts[1])
    run = train(tmp_path / "run", settings, progress=False)
    model = AutoModelForCausalLM.from_pretrained(run)
    assert model.config.vocab_size == data.vocabulary
    resumed = train(
        tmp_path / "resumed", Settings(model=str(run), data=(str(file),), steps=1, batch=2, context=32), progress=False
    )
    assert read_run(resumed).settings.model == str(run)


def test_many_short_texts_are_held_out_whole(tmp_path):
    lines = [f"this is text {n} " * 40 for n in range(25)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = prepare_data(Settings(data=(str(tmp_path / "many.jsonl"),), context=8))
    held_out = {data.tokenizer.decode(row) for row in data.held_out[0]}
    assert held_out
    for row in held_out:
        assert row in lines[9] + lines[19]
    assert not any(row in held_out for row in map(data.tokenizer.decode, data.train[0]))
