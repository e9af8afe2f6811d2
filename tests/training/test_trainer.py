"""Training under a horizon: the Trainer's own steps, the oracle's gradients, and nothing else changed."""

import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support.loss_oracles import dense
from support.processes import torchrun
from support.tiny import tiny, tokens
from support.trainings import equal_tensors, logged_losses, saved_losses, train_tiny, training_arguments, weights
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers import Trainer as PlainTrainer

import posterity
from posterity import Discount, EdgeWindow, Full, InputError, Leak, Myopic, Trainer
from posterity.models.interception import interceptions
from posterity.training.data import Rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_discount_of_rate_1_trains_to_the_bit_like_vanilla(tmp_path):
    full = train_tiny(tmp_path, settings={"horizon": Full()})
    for settings in ({"horizon": Discount(1)}, {"horizon": Discount(1), "cut": "hidden"}, {"horizon": Leak(1)}, {}):
        assert equal_tensors(weights(train_tiny(tmp_path, settings=settings)), weights(full))
    assert not equal_tensors(weights(train_tiny(tmp_path, settings={"horizon": Discount(0.5)})), weights(full))
    assert not any(interceptions.values())
    assert full.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("rule", [Myopic(), Discount(0.6), EdgeWindow(3), Leak(0.2)])
@pytest.mark.parametrize("cut", ["kv", "hidden"])
def test_one_step_is_that_of_the_dense_oracle(tmp_path, rule, cut):
    step = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "logging_steps": 1}
    mine = weights(train_tiny(tmp_path, dtype=torch.float64, settings={"horizon": rule, "cut": cut}, **step))
    with pytest.MonkeyPatch.context() as patch:
        model, ids = tiny("llama"), tokens(64)
        trainer = PlainTrainer(model=model, args=training_arguments(tmp_path, **step), train_dataset=Rows(ids, ids))
        with dense(model) as spy:
            spy.factor, spy.hidden = (rule.factor, rule.factor), cut == "hidden"
            trainer.train()
        patch.undo()
    right = weights(trainer)
    assert not equal_tensors(right, weights(train_tiny(tmp_path, dtype=torch.float64, **step)))
    for name, x in right.items():  # transformers' norms and softmax go through float32
        torch.testing.assert_close(mine[name], x, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
    ],
)
def test_accumulation_checkpointing_and_compilation_train_the_same(tmp_path, changes):
    settings = {"horizon": Discount(0.5), "cut": "hidden"}
    right = train_tiny(tmp_path, settings=settings)
    mine = train_tiny(tmp_path, settings=settings, **changes)
    np.testing.assert_allclose(logged_losses(mine), logged_losses(right), rtol=2e-4)
    plain = train_tiny(tmp_path)
    assert not np.allclose(logged_losses(plain), logged_losses(right), rtol=2e-4)


@pytest.mark.parametrize("cut", ["kv", "hidden"])
def test_a_horizon_around_a_trainer_or_a_loop_of_one_s_own_trains_the_same(tmp_path, cut):
    rule, plain = Discount(0.5), {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    right = train_tiny(tmp_path, settings={"horizon": rule, "cut": cut}, **plain)
    model, ids = tiny("llama", torch.float32), tokens(64)
    trainer = PlainTrainer(model=model, args=training_arguments(tmp_path, **plain), train_dataset=Rows(ids, ids))
    batches = [batch["input_ids"] for batch in trainer.get_train_dataloader()][:4]
    with posterity.horizon(model, rule, cut=cut):
        trainer.train()
    assert equal_tensors(weights(trainer), weights(right))

    accelerator = Accelerator(cpu=True)
    model = tiny("llama", torch.float32)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-2))
    step_losses = []
    with posterity.horizon(accelerator.unwrap_model(wrapped), rule, cut=cut):
        for batch in batches:
            loss = wrapped(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step_losses.append(loss.item())
    np.testing.assert_allclose(step_losses, logged_losses(right), rtol=1e-4)
    for name, x in weights(right).items():
        torch.testing.assert_close(model.get_parameter(name).detach(), x, rtol=1e-4, atol=1e-6)


def test_half_precision_autocast_trains(tmp_path):
    mine = train_tiny(tmp_path, settings={"horizon": Discount(0.5), "cut": "hidden"}, bf16=True)
    right = train_tiny(tmp_path, settings={"horizon": Discount(0.5), "cut": "hidden"})
    np.testing.assert_allclose(logged_losses(mine), logged_losses(right), rtol=0.05)


def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path):
    with pytest.raises(
        InputError, match=r"attn_pdrop=0.1 in the config of GPT2LMHeadModel: set model.config.attn_pdrop = 0"
    ):
        train_tiny(tmp_path, name="gpt2", settings={"horizon": Myopic()})
    with pytest.raises(InputError, match="a model, not a model_init"):
        Trainer(model_init=lambda: tiny("llama"), args=training_arguments(tmp_path))
    with pytest.raises(InputError, match="layers expects numbers from 0 to 2, or from the end with -1; got 7"):
        train_tiny(tmp_path, settings={"horizon": Myopic(), "layers": [7]})


def test_a_diverged_run_stops_and_keeps_the_checkpoint_before(tmp_path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    next(model.parameters()).fill_(math.nan)

    with pytest.raises(InputError, match=r"not finite at step 4 \(learning rate"):
        train_tiny(tmp_path, Spoil(), save_strategy="steps", save_steps=2)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert all(x.isfinite().all() for x in checkpoint.parameters())


DDP = """
import os, sys, torch, torch.distributed
sys.path[:0] = [{tests!r}]
from posterity import Discount, Trainer
from posterity.training.data import Rows
from support.tiny import tiny, tokens
from support.trainings import training_arguments
ids = tokens(64)
changes = dict(per_device_train_batch_size={rows}, ddp_backend="gloo" if {world} > 1 else None)
arguments = training_arguments({folder!r}, max_grad_norm=0, optim="sgd", **changes)
rows = Rows(ids, ids)
trainer = Trainer(model=tiny("llama"), args=arguments, train_dataset=rows, horizon=Discount(0.5), cut={cut!r})
trainer.train()
assert arguments.world_size == {world}, arguments.world_size
if trainer.is_world_process_zero():
    torch.save({{name: x.detach() for name, x in trainer.model.named_parameters()}}, {out!r})
sys.stdout.flush()
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    os._exit(0)  # with two processes, gloo's threads now and then abort the interpreter while it shuts down
"""


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["kv", "hidden"])
def test_two_processes_train_like_one(tmp_path, cut):
    trained = []
    for world in (1, 2):
        script, out = tmp_path / f"{world}.py", tmp_path / f"{world}.pt"
        tests = str(Path(__file__).parents[1])
        code = DDP.format(
            tests=tests, folder=str(tmp_path / "run"), rows=4 // world, world=world, cut=cut, out=str(out)
        )
        script.write_text(code)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*torchrun(world), str(script)], capture_output=True, text=True, env=environment, timeout=280
        )
        assert done.returncode == 0, done.stderr[-3000:]
        trained.append(torch.load(out, weights_only=True))
    for name in trained[0]:
        torch.testing.assert_close(trained[0][name], trained[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_command_line_under_torchrun_trains_like_one_process(tmp_path):
    small = {"data": "induction", "width": 16, "depth": 2, "heads": 2, "batch": 4, "steps": 6, "warmup": 1}
    small |= {"horizon": "myopic", "cut": "hidden", "monitor-every": 3}
    settings = ["--task", "vocabulary=11", "--task", "length=12"]
    settings += [part for name, value in small.items() for part in (f"--{name}", str(value))]
    runs = []
    for world in (1, 2):
        done = subprocess.run(
            [*torchrun(world), "-m", "posterity", "train", "-o", str(tmp_path / str(world)), *settings],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("trained:") == 1
        monitored = posterity.load(tmp_path / str(world) / "monitor.nc")
        assert list(monitored.step.values) == [0, 3, 6]
        runs.append((saved_losses(tmp_path / str(world)), monitored.credit.values))
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=1e-5)
    np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=1e-3, atol=1e-6)
