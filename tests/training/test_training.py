"""Training under a horizon: the Trainer's own steps, the oracle's gradients, and nothing else changed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support.loss_oracles import dense
from support.texts import tokenizer
from support.tiny import tiny, tokens
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers import Trainer as PlainTrainer

import posterity
from posterity import Discount, EdgeWindow, Full, InputError, Monitor, Myopic, Trainer
from posterity.models.watch import watches
from posterity.ops.horizon_rules import Leak, parse
from posterity.results import stats as derived
from posterity.results import steps
from posterity.results.comparison_schema import gaps
from posterity.training import myopia
from posterity.training.compare import compare, position_losses, read_run
from posterity.training.myopia import local_bonus, probe
from posterity.training.run import Rows, Settings, last_checkpoint, prepare, train
from posterity.training.tasks import Induction, Regressor, Sines

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
SMALL = {"data": ("induction",), "width": 16, "depth": 2, "heads": 2, "batch": 4, "steps": 6, "warmup": 1}
SMALL |= {"task": {"vocabulary": 11, "length": 8}}


def arguments(folder, **changes):
    given = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "report_to": "none",
        "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "learning_rate": 1e-2,
    }  # fmt: skip
    return TrainingArguments(**given | changes)


def trained(folder, *callbacks, name="llama", kind=Trainer, dtype=torch.float32, settings=(), **changes):
    model, ids = tiny(name, dtype), tokens(64)
    given = arguments(folder, **changes)
    trainer = kind(model=model, args=given, train_dataset=Rows(ids, ids), callbacks=list(callbacks), **dict(settings))
    trainer.train()
    return trainer


def weights(trainer):
    return {name: x.detach().clone() for name, x in trainer.model.named_parameters()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# ---- the Trainer -----------------------------------------------------------------------------------------------------


def test_discount_of_rate_1_trains_to_the_bit_like_vanilla(tmp_path):
    full = trained(tmp_path, settings={"horizon": Full()})
    for settings in ({"horizon": Discount(1)}, {"horizon": Discount(1), "cut": "hidden"}, {"horizon": Leak(1)}, {}):
        assert same(weights(trained(tmp_path, settings=settings)), weights(full))
    assert not same(weights(trained(tmp_path, settings={"horizon": Discount(0.5)})), weights(full))
    assert not watches
    assert full.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("rule", [Myopic(), Discount(0.6), EdgeWindow(3), Leak(0.2)])
@pytest.mark.parametrize("cut", ["kv", "hidden"])
def test_one_step_is_that_of_the_dense_oracle(tmp_path, rule, cut):
    step = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "logging_steps": 1}
    mine = weights(trained(tmp_path, dtype=torch.float64, settings={"horizon": rule, "cut": cut}, **step))
    with pytest.MonkeyPatch.context() as patch:
        model, ids = tiny("llama"), tokens(64)
        trainer = PlainTrainer(model=model, args=arguments(tmp_path, **step), train_dataset=Rows(ids, ids))
        with dense(model) as spy:
            spy.factor, spy.hidden = (rule.weight, rule.weight), cut == "hidden"
            trainer.train()
        patch.undo()
    right = weights(trainer)
    assert not same(right, weights(trained(tmp_path, dtype=torch.float64, **step)))
    for name, x in right.items():  # transformers' norms and softmax go through float32
        torch.testing.assert_close(mine[name], x, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "how",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
    ],
)
def test_accumulation_checkpointing_and_compilation_train_the_same(tmp_path, how):
    settings = {"horizon": Discount(0.5), "cut": "hidden"}
    right = trained(tmp_path, settings=settings)
    mine = trained(tmp_path, settings=settings, **how)
    np.testing.assert_allclose(losses(mine), losses(right), rtol=2e-4)
    plain = trained(tmp_path)
    assert not np.allclose(losses(plain), losses(right), rtol=2e-4)


@pytest.mark.parametrize("cut", ["kv", "hidden"])
def test_a_horizon_around_a_trainer_or_a_loop_of_one_s_own_trains_the_same(tmp_path, cut):
    rule, plain = Discount(0.5), {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    right = trained(tmp_path, settings={"horizon": rule, "cut": cut}, **plain)
    model, ids = tiny("llama", torch.float32), tokens(64)
    trainer = PlainTrainer(model=model, args=arguments(tmp_path, **plain), train_dataset=Rows(ids, ids))
    batches = [batch["input_ids"] for batch in trainer.get_train_dataloader()][:4]
    with posterity.horizon(model, rule, cut=cut):
        trainer.train()
    assert same(weights(trainer), weights(right))

    accelerator = Accelerator(cpu=True)
    model = tiny("llama", torch.float32)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-2))
    taken = []
    with posterity.horizon(accelerator.unwrap_model(wrapped), rule, cut=cut):
        for batch in batches:
            loss = wrapped(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            taken.append(loss.item())
    np.testing.assert_allclose(taken, losses(right), rtol=1e-4)
    for name, x in weights(right).items():
        torch.testing.assert_close(model.get_parameter(name).detach(), x, rtol=1e-4, atol=1e-6)


def test_half_precision_autocast_trains(tmp_path):
    mine = trained(tmp_path, settings={"horizon": Discount(0.5), "cut": "hidden"}, bf16=True)
    right = trained(tmp_path, settings={"horizon": Discount(0.5), "cut": "hidden"})
    np.testing.assert_allclose(losses(mine), losses(right), rtol=0.05)


def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path):
    with pytest.raises(
        InputError, match=r"attn_pdrop=0.1 in the config of GPT2LMHeadModel: set model.config.attn_pdrop = 0"
    ):
        trained(tmp_path, name="gpt2", settings={"horizon": Myopic()})
    with pytest.raises(InputError, match="a model, not a model_init"):
        Trainer(model_init=lambda: tiny("llama"), args=arguments(tmp_path))
    with pytest.raises(InputError, match="layers expects numbers from 0 to 2, or from the end with -1; got 7"):
        trained(tmp_path, settings={"horizon": Myopic(), "layers": [7]})


def test_a_diverged_run_stops_and_keeps_the_checkpoint_before(tmp_path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    next(model.parameters()).fill_(math.nan)

    with pytest.raises(InputError, match=r"not finite at step 4 \(learning rate"):
        trained(tmp_path, Spoil(), save_strategy="steps", save_steps=2)
    left = [path.name for path in tmp_path.glob("checkpoint-*")]
    assert left == ["checkpoint-2"]
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(x.isfinite().all() for x in kept.parameters())


DDP = """
import sys, torch, torch.distributed
sys.path[:0] = [{tests!r}]
from training.test_training import arguments, tiny, tokens, Rows, Trainer, Discount
ids = tokens(64)
backend = "gloo" if {world} > 1 else None
given = arguments({folder!r}, per_device_train_batch_size={rows}, max_grad_norm=0, optim="sgd", ddp_backend=backend)
trainer = Trainer(model=tiny("llama"), args=given, train_dataset=Rows(ids, ids), horizon=Discount(0.5), cut={cut!r})
trainer.train()
assert given.world_size == {world}, given.world_size
if trainer.is_world_process_zero():
    torch.save({{name: x.detach() for name, x in trainer.model.named_parameters()}}, {out!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["kv", "hidden"])
def test_two_processes_train_like_one(tmp_path, cut):
    found = []
    for world in (1, 2):
        script, out = tmp_path / f"{world}.py", tmp_path / f"{world}.pt"
        tests = str(Path(__file__).parents[1])
        code = DDP.format(
            tests=tests, folder=str(tmp_path / "run"), rows=4 // world, world=world, cut=cut, out=str(out)
        )
        script.write_text(code)
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", "29577"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*run, str(script)], capture_output=True, text=True, env=environment, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out, weights_only=True))
    one, two = found
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_command_line_under_torchrun_trains_like_one_process(tmp_path):
    small = {"data": "induction", "width": 16, "depth": 2, "heads": 2, "batch": 4, "steps": 6, "warmup": 1}
    small |= {"horizon": "myopic", "cut": "hidden", "monitor-every": 3}
    settings = ["--task", "vocabulary=11", "--task", "length=12"]
    settings += [part for name, value in small.items() for part in (f"--{name}", str(value))]
    found = []
    for world in (1, 2):
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", "29578"]
        done = subprocess.run(
            [*run, "-m", "posterity", "train", "-o", str(tmp_path / str(world)), *settings],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("trained:") == 1
        monitored = posterity.load(tmp_path / str(world) / "monitor.nc")
        assert list(monitored.step.values) == [0, 3, 6]
        found.append((curve(tmp_path / str(world)), monitored.credit.values))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)


# ---- the Monitor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Full(), Myopic()])
def test_a_monitor_changes_nothing_and_measures_the_whole_gradient(tmp_path, rule):
    settings, probe = {"horizon": rule, "cut": "hidden"}, tokens(2, seed=9)
    monitor = Monitor(2, probe, output=tmp_path / "run.nc")
    watched = trained(tmp_path, monitor, settings=settings)
    assert same(weights(watched), weights(trained(tmp_path, settings=settings)))
    assert losses(watched) == losses(trained(tmp_path, settings=settings))
    found = posterity.load(tmp_path / "run.nc")
    assert list(found.step.values) == [0, 2, 4]
    assert (tmp_path / "run.html").exists()
    for step, model in ((0, tiny("llama", torch.float32)), (4, watched.model)):
        right = posterity.measure(model, None, probe, context=12, losses=True, horizons=(1, 4), progress=False)
        for name in right.data_vars:
            np.testing.assert_array_equal(steps.by_step(found)[step][name], right[name])
    logged = [row for row in watched.state.log_history if "posterity/key_self_share" in row]
    assert [row["step"] for row in logged] == [0, 2, 4]
    assert {
        "posterity/layer02/value_own_share",
        "posterity/key_later_share",
        "posterity/layer00/key_weight_self_share",
    } <= set(logged[0])
    share = derived.shares(steps.by_step(found)[4], ("layer",)).share
    assert logged[-1]["posterity/layer01/key_self_share"] == pytest.approx(
        float(share.sel(layer=1, stream="key", side="self"))
    )


def test_a_monitor_works_with_any_trainer_and_says_so_when_it_is_not_attached(tmp_path):
    monitor = Monitor(3, tokens(1))
    with pytest.raises(InputError, match=r"call monitor.attach\(trainer\)"):
        trained(tmp_path, monitor, kind=PlainTrainer)
    model, ids = tiny("llama", torch.float32), tokens(64)
    trainer = PlainTrainer(model=model, args=arguments(tmp_path), train_dataset=Rows(ids, ids))
    Monitor(3, tokens(1)).attach(trainer)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "posterity/key_self_share" in row] == [0, 3, 4]
    with pytest.raises(InputError, match="every 1 steps or more; got 0"):
        Monitor(0, tokens(1))


# ---- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Sines(), Sines(3, 2.0, 0.5, 7), Sines(9, 1.0, 0.1, 4)])
def test_targets_of_sines_are_the_formula(task):
    inputs = task.inputs(5, seed=3).double()
    for (x, z), found in zip(inputs.transpose(1, 2), task.labels(inputs), strict=True):
        for n in range(task.length):
            waves = sum(math.sin(task.frequency * x[n - i]) for i in range(1, task.terms + 1) if n - i >= 0)
            assert float(found[n]) == pytest.approx(float(z[n] * waves + (1 - z[n]) * x[n]), abs=1e-12)
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
    found = model(input_ids=inputs, labels=task.labels(inputs))
    right = torch.nn.functional.huber_loss(found.logits[..., 0].float(), task.labels(inputs).float())
    assert float(found.loss) == pytest.approx(float(right))
    with posterity.account(model) as ledger:
        model(input_ids=inputs, labels=task.labels(inputs)).loss.backward()
    assert float(derived.balance(ledger.result()).max()) < 1e-9


def test_horizons_have_names():
    given = {
        "full": Full(),
        "myopic": Myopic(),
        "discount:0.9": Discount(0.9),
        "window:16": EdgeWindow(16),
        "leak:0.1": Leak(0.1),
    }
    for name, rule in given.items():
        assert parse(name) == rule
    for name in ("none", "discount", "myopic:1", "window:1.5", "discount:x", ""):
        with pytest.raises(InputError, match="expected a horizon full, myopic"):
            parse(name)
    with pytest.raises(InputError, match="Leak expects a fraction from 0 to 1; got 2"):
        Leak(2)


# ---- runs ------------------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """An interruption in the middle."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


def parameters(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def curve(folder):
    return [row["loss"] for row in json.loads((folder / "metrics.json").read_text()) if "loss" in row]


@pytest.mark.parametrize("at", [3, 5])
def test_an_interrupted_run_goes_on_to_the_same_losses_and_weights(tmp_path, at):
    settings = Settings(**SMALL, horizon="discount:0.5", cut="hidden")
    right = train(tmp_path / "whole", settings, progress=False, save_every=2, monitor=2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", settings, callbacks=[Stop(at)], progress=False, save_every=2, monitor=2)
    assert not (tmp_path / "cut" / "metrics.json").exists()
    broken = tmp_path / "cut" / "checkpoint-5"  # one that was being written
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_step": ')
    assert last_checkpoint(tmp_path / "cut") == str(tmp_path / "cut" / f"checkpoint-{at - at % 2}")
    mine = train(tmp_path / "cut", settings, progress=False, save_every=2, monitor=2)
    assert curve(mine) == curve(right)
    assert same(parameters(mine), parameters(right))
    one, two = (posterity.load(folder / "monitor.nc") for folder in (mine, right))
    assert one.drop_attrs().drop_vars("loss").identical(two.drop_attrs().drop_vars("loss"))
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("*")}
    assert train(mine, settings, progress=False) == mine  # finished: nothing to do
    assert {path: path.stat().st_mtime_ns for path in mine.rglob("*")} == before


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on(tmp_path, monkeypatch):
    settings, save = Settings(**SMALL), torch.save

    def full(what, path, *more, **given):
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(what, path, *more, **given)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"no space left in .*the same command goes on"):
        train(tmp_path / "run", settings, progress=False, save_every=2)
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")
    monkeypatch.undo()
    mine = train(tmp_path / "run", settings, progress=False, save_every=2)
    assert same(parameters(mine), parameters(train(tmp_path / "whole", settings, progress=False)))


def test_folders_of_other_runs_and_wrong_settings_are_refused_in_one_line(tmp_path):
    train(tmp_path / "run", Settings(**SMALL), progress=False)
    with pytest.raises(InputError, match=r"holds another run \(seed was 0, now 1; data_digest was"):
        train(tmp_path / "run", Settings(**SMALL, seed=1), progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="it holds something else"):
        train(tmp_path / "other", Settings(**SMALL), progress=False)
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
            Settings(**SMALL | changes)
    with pytest.raises(InputError, match="induction takes vocabulary, length; got zorg"):
        train(tmp_path / "new", Settings(**SMALL | {"task": {"zorg": 1}}), progress=False)
    with pytest.raises(InputError, match="expected a type of transformers that can be made"):
        train(tmp_path / "new2", Settings(**SMALL | {"model": "zorg"}), progress=False)
    with pytest.raises(InputError, match="a monitor measures models that read tokens"):
        train(tmp_path / "new3", Settings(data=("sines",), steps=1), monitor=1, progress=False)


def test_a_run_that_is_refused_leaves_its_folder_free(tmp_path):
    with pytest.raises(InputError, match="layers expects numbers from 0 to 1"):
        train(tmp_path / "run", Settings(**SMALL, layers=(7,)), progress=False)
    train(tmp_path / "run", Settings(**SMALL, layers=(1,)), progress=False)
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_folders_that_are_none_are_refused_in_one_line(tmp_path, text):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="it is a file: choose another"):
        train(tmp_path / "file", Settings(**SMALL), progress=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"its run\.json is damaged"):
        train(tmp_path / "run", Settings(**SMALL), progress=False)


def test_data_that_is_misspelt_or_mixed_is_refused_before_anything_is_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr("posterity.inputs.text_sources.documents", None)
    for data, line in ((("sinus",), "did you mean sines"), (("sines", "my.txt"), "expected sines alone")):
        with pytest.raises(InputError, match=line):
            train(tmp_path / "run", Settings(data=data), progress=False)


def test_a_folded_model_is_not_trained_as_if_it_were_plain(tmp_path):
    from posterity.inputs.folded_folder import save_folded

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
    file = tmp_path / "some.txt"
    file.write_text(text)
    settings = Settings(data=(str(file),), steps=2, batch=2, context=32, width=16, depth=1, heads=2)
    data = prepare(settings)
    shown = ["".join(data.tokenizer.decode(row) for row in rows[0]) for rows in (data.train, data.held_out)]
    assert text[: round(0.9 * len(text))].startswith(shown[0])
    assert text[round(0.9 * len(text)) :].startswith(shown[1])
    run = train(tmp_path / "run", settings, progress=False)
    again = AutoModelForCausalLM.from_pretrained(run)
    assert again.config.vocab_size == data.vocabulary
    more = train(
        tmp_path / "more", Settings(model=str(run), data=(str(file),), steps=1, batch=2, context=32), progress=False
    )
    assert read_run(more).settings.model == str(run)


def test_many_short_texts_are_held_out_whole(tmp_path):
    lines = [f"this is text {n} " * 40 for n in range(25)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = prepare(Settings(data=(str(tmp_path / "many.jsonl"),), context=8))
    held_out = {data.tokenizer.decode(row) for row in data.held_out[0]}
    assert held_out
    for row in held_out:
        assert row in lines[9] + lines[19]
    assert not any(row in held_out for row in map(data.tokenizer.decode, data.train[0]))


# ---- comparisons -----------------------------------------------------------------------------------------------------


def test_the_myopia_gap_is_the_difference_of_held_out_losses(tmp_path):
    folders = []
    for horizon in ("full", "myopic"):
        for seed in (0, 1):
            settings = Settings(**SMALL | {"steps": 30, "rate": 0.05}, horizon=horizon, seed=seed)
            folders.append(train(tmp_path / f"{horizon}{seed}", settings, progress=False))
    compared = compare(folders, progress=False)
    ids = prepare(Settings(**SMALL)).held_out[0]
    right = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            loss = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in ids])
        right.append(loss.numpy())
    np.testing.assert_allclose(compared.loss.mean("position"), right, rtol=1e-4)
    found = gaps(compared)
    assert list(found.arm.values) == ["vanilla", "myopic, cut at k and v"]
    gap = np.stack(right)[2:] - np.stack(right)[:2]  # seed, row
    assert float(found.gap[1]) == pytest.approx(gap.mean(), rel=1e-3)
    error = math.sqrt(gap.mean(0).var(ddof=1) / gap.shape[1] + gap.mean(1).var(ddof=1) / 2)
    assert float(found.gap_error[1]) == pytest.approx(error, rel=1e-3)
    np.testing.assert_allclose(found.gap_by_position.mean("position"), found.gap, rtol=1e-9, atol=1e-12)
    assert float(found.gap[0]) == 0
    for message, chosen in {
        "at least two runs; got 1": folders[:1],
        "expected each run once; vanilla with seed 0 came twice": [folders[0], folders[0]],
        "expected a run with horizon full and seed 1 beside": [folders[0], folders[3]],
        "its run.json cannot be read": [folders[0], tmp_path],
    }.items():
        with pytest.raises(InputError, match=message):
            compare(chosen, progress=False)
    longer = train(tmp_path / "longer", Settings(**SMALL | {"steps": 4}, seed=5), progress=False)
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
        found = position_losses(model, inputs, task.labels(inputs))
        off = model(input_ids=inputs).logits[..., 0] - task.labels(inputs)
    right = torch.where(off.abs() < 1, off**2 / 2, off.abs() - 0.5)
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-7)


# ---- local myopia bonus, probes --------------------------------------------------------------------------------------


def test_a_local_model_that_has_not_been_trained_is_the_plain_one():
    model, ids = tiny("llama", torch.float32), tokens(6)
    found = local_bonus(model, (ids, ids), (ids, ids), steps=0, progress=False)
    assert found.bonus == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        right = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in ids]).mean()
    assert found.loss == pytest.approx(float(right), rel=1e-5)
    assert model.config._attn_implementation == "eager"


def test_a_local_model_learns_for_its_own_position_from_the_plain_model_s_past():
    plain, local, ids = tiny("llama"), tiny("llama"), tokens(2)
    with torch.no_grad():
        for x in local.parameters():
            x += 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()), dtype=x.dtype)
    past = myopia._Past()
    with myopia._looking_back(plain, past), myopia._looking_back(local, past):
        found = myopia._local_losses(plain, local, past, ids, ids)
        for position in range(ids.shape[1] - 1):  # one position at a time: plain before it, local at it
            got = one_position(plain, local, ids[:, : position + 1])
            right = torch.nn.functional.cross_entropy(got, ids[:, position + 1], reduction="none").double()
            torch.testing.assert_close(found[:, position], right, rtol=1e-4, atol=1e-5)


def one_position(plain, local, ids):
    """Logits of the last position by the local model, with a cache that the plain model has filled."""
    for model in (plain, local):
        model.set_attn_implementation("eager")
    cache = plain(input_ids=ids[:, :-1], use_cache=True).past_key_values if ids.shape[1] > 1 else None
    logits = local(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    for model in (plain, local):
        model.set_attn_implementation(myopia._NAME)
    return logits


def test_training_the_local_model_gains_and_leaves_the_plain_one_as_it_is():
    model, ids = tiny("llama", torch.float32), tokens(64) % 3
    before = {name: x.clone() for name, x in model.named_parameters()}
    found = local_bonus(model, (ids, ids), (ids, ids), steps=20, rate=1e-2, progress=False)
    assert found.bonus > 0.1
    assert found.bonus == pytest.approx(found.loss - found.local_loss)
    assert same(before, dict(model.named_parameters()))


def test_a_probe_reads_off_what_a_linear_map_can():
    torch.manual_seed(0)
    model = tiny("llama", torch.float32)
    fitted, judged = tokens(200, seed=1), tokens(50, seed=2)
    with torch.no_grad():
        embedded = [model.get_input_embeddings()(ids) for ids in (fitted, judged)]
        states = [model(input_ids=ids, output_hidden_states=True).hidden_states[2] for ids in (fitted, judged)]
    direction = torch.randn(embedded[0].shape[-1])
    linear = [x @ direction for x in embedded]
    found = probe(model, (fitted, linear[0]), (judged, linear[1]), ridge=1e-8)
    assert found[0] == pytest.approx(1, abs=1e-4)
    noise = [torch.randn(ids.shape) for ids in (fitted, judged)]
    assert max(abs(one) for one in probe(model, (fitted, noise[0]), (judged, noise[1]))) < 0.1
    x, other = ((torch.nn.functional.pad(state.flatten(0, 1), (0, 1), value=1)).double().numpy() for state in states)
    weight = np.linalg.lstsq(x, linear[0].flatten().double().numpy(), rcond=None)[0]
    y = linear[1].flatten().double().numpy()
    right = 1 - ((y - other @ weight) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert found[2] == pytest.approx(right, abs=1e-4)
