"""Models whose weights several processes share: FSDP2 is measured as if it were whole, all else is refused by name."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.processes import torchrun
from support.tiny import tiny, tokens

import posterity
from posterity import InputError

START = """
import contextlib, sys, numpy as np, torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
sys.path[:0] = [{tests!r}]
import posterity
from support.tiny import summed_loss, tiny, tokens
dist.init_process_group("gloo")
rank, ids = dist.get_rank(), tokens(3)
assert dist.get_world_size() == 2

def shard(model, layers=True):
    for layer in model.model.layers if layers else ():
        fully_shard(layer)
    return fully_shard(model)

def same(mine, right):
    assert set(mine.data_vars) == set(right.data_vars)
    for name in right.data_vars:
        if right[name].dtype.kind == "f":
            np.testing.assert_allclose(mine[name], right[name], rtol=1e-9, atol=1e-12, err_msg=name)

def refused(run, words):
    try:
        run()
    except posterity.InputError as error:
        assert words in str(error), error
    else:
        raise AssertionError("not refused: " + words)
"""
END = """
print("done", flush=True)
dist.destroy_process_group()
"""

FSDP2 = """
options = dict(context=12, progress=False)
for layers, more in ((True, {"losses": True, "horizons": (2, 4)}), (False, {"batch": 2})):
    right = posterity.measure(tiny("llama"), None, ids, **options, **more)
    same(posterity.measure(shard(tiny("llama"), layers), None, ids, **options, **more), right)

with posterity.account(whole := tiny("llama")) as right:
    summed_loss(whole, ids).backward()
with posterity.account(model := shard(tiny("llama"))) as ledger:
    summed_loss(model, ids).backward()
same(ledger.result(), right.result())
for cut in ("kv", "hidden"):
    grads = []
    for model in (tiny("llama"), shard(tiny("llama"))):
        with posterity.horizon(model, posterity.Discount(0.5), cut=cut):
            summed_loss(model, ids).backward()
        grads.append([getattr(x.grad, "full_tensor", lambda: x.grad)() for x in model.parameters()])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)

replicas = torch.nn.parallel.DistributedDataParallel(tiny("llama"))
if rank == 0:  # it waits for nobody
    same(posterity.measure(replicas, None, ids, **options), posterity.measure(tiny("llama"), None, ids, **options))

model = tiny("llama")
for layer in model.model.layers:
    fully_shard(layer.self_attn.q_proj)
shard(model)
refused(lambda: posterity.measure(model, None, ids, **options), "a module in it is sharded by itself")
same(posterity.measure(model, None, ids, weights=False, **options),
     posterity.measure(tiny("llama"), None, ids, weights=False, **options))
model = shard(tiny("llama"))
refused(lambda: posterity.measure(model, None, ids, state="never", **options), "this one is sharded (FSDP2)")
refused(lambda: posterity.measure(model, None, ids, parameters=True, **options), "leave it out, or measure")
refused(lambda: posterity.measure(model, None, ids, checkpoint=True, **options), "checkpoint=True expects weights")

# The processes share the windows: 3, 4, and 5 in batches of 2; one of them has a pass less, and helps.
from posterity.measurement import measure as module
passes, run = [], module.measure_batch
module.measure_batch = lambda *args: passes.append(args) or run(*args)
processes = posterity.Processes.join()
for rows, more, count in ((3, {"losses": True, "horizons": (2, 4)}, 2), (4, {}, 2), (5, {"batch": 2}, 2)):
    right = posterity.measure(tiny("llama"), None, tokens(rows), **options, **more)
    passes.clear()
    same(posterity.measure(model, None, tokens(rows), processes=processes, **options, **more), right)
    assert len(passes) == count
options |= {"processes": processes, "pack": True}
refused(lambda: posterity.measure(model, None, ids, **options), "pack=True makes others")
"""

MONITOR = """
from types import SimpleNamespace

class Loop:  # what a Monitor needs of a Trainer
    def __init__(self):
        self.logged, self.processing_class = [], None
        self.control = SimpleNamespace(should_log=False, should_save=False)
        self.callback_handler = SimpleNamespace(callbacks=[])
    def add_callback(self, callback):
        self.callback_handler.callbacks.append(callback)
    def is_world_process_zero(self):
        return rank == 0
    def log(self, logs):
        self.logged.append(logs)

results, weights = [], []
for model in (tiny("llama"), shard(tiny("llama"))):
    loop, monitor, state = Loop(), posterity.Monitor(2, ids), SimpleNamespace(global_step=0, max_steps=4)
    monitor.attach(loop)
    monitor.on_train_begin(None, state, loop.control, model=model)
    for state.global_step in range(1, 5):
        summed_loss(model, ids).backward()
        with torch.no_grad():
            for x in model.parameters():
                x -= 1e-3 * x.grad
                x.grad = None
        monitor.on_step_end(None, state, loop.control, model=model)
    assert len(loop.logged) == (3 if rank == 0 else 0)
    weights.append([getattr(x, "full_tensor", lambda: x)() for x in model.parameters()])
    if rank == 0:
        results.append(monitor.result())
for x, y in zip(*weights, strict=True):  # no measurement has changed the training
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
if rank == 0:
    assert list(results[0].step.values) == [0, 2, 4]
    same(results[1], results[0])
"""

FSDP1 = """
for original in (True, False):
    model = FullyShardedDataParallel(tiny("llama"), use_orig_params=original, device_id=torch.device("cpu"))
    inner = next(x for x in model.modules() if type(x).__name__ == "LlamaForCausalLM")
    for part in (model, inner):
        assert "with torch.distributed.fsdp.fully_shard" in posterity.check(part).reason
        refused(lambda: posterity.measure(part, None, ids, context=12), "FullyShardedDataParallel")
"""

TENSOR_PARALLEL = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

def entered(enter):
    with enter:
        pass

def refuse_all(model):
    assert not posterity.check(model).ok
    for run in (
        lambda: posterity.measure(model, None, ids, context=12, progress=False),
        lambda: entered(posterity.account(model, weights=False)),
        lambda: entered(posterity.horizon(model, posterity.Myopic())),
        lambda: posterity.fold(model, None, ids, context=12, progress=False),
        lambda: posterity.inspect(model, None, ids[0]),
    ):
        refused(run, "tensor parallelism (DTensor weights), and each process holds a part of it")

if rank == 0:
    tiny("llama", torch.float32).save_pretrained("whole")
dist.barrier()
refuse_all(AutoModelForCausalLM.from_pretrained("whole", distributed_config=DistributedConfig(tp_size=2)))
plan = dict.fromkeys(["q_proj", "k_proj", "v_proj"], ColwiseParallel()) | {"o_proj": RowwiseParallel()}
model, mesh = tiny("llama"), init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    parallelize_module(layer.self_attn, mesh, plan)
refuse_all(model)
"""


def run_in_two_processes(folder, *parts):
    script = folder / "script.py"
    script.write_text("".join((START.format(tests=str(Path(__file__).parents[1])), *parts, END)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*torchrun(2), str(script)], capture_output=True, text=True, env=environment, timeout=240, cwd=folder
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("done") == 2


@pytest.mark.slow
def test_a_model_under_fsdp2_is_measured_watched_and_trained_as_if_it_were_whole(tmp_path):
    run_in_two_processes(tmp_path, FSDP2, MONITOR)


@pytest.mark.slow
def test_a_model_of_which_each_process_holds_a_part_is_refused_with_the_reason(tmp_path):
    run_in_two_processes(tmp_path, FSDP1, TENSOR_PARALLEL)


def zero_stage_3(model):
    for x in model.parameters():
        x.ds_id = 0  # the mark that DeepSpeed leaves


def expert_parallel(model):
    model.model.layers[0].mlp._is_expert_parallel = True  # the mark that transformers leaves


def pipeline_parallel(model):
    model._pp_stage = SimpleNamespace(pp_size=2)


def bridge(model):
    attention = model.model.layers[0].self_attn
    attention.__class__ = type("AttentionBridge", (type(attention),), {"__module__": "transformer_lens.model_bridge"})


REFUSALS = {
    zero_stage_3: "DeepSpeed ZeRO-3 holds its weights in parts: use ZeRO stage 2",
    expert_parallel: "it runs with expert parallelism, and each process holds a part of it",
    pipeline_parallel: "it runs with pipeline parallelism, and each process holds a part of it",
    bridge: "TransformerLens has put its own attention in place of the model's: load the model again",
}


@pytest.mark.parametrize("change", REFUSALS, ids=lambda change: change.__name__)
def test_what_is_wrong_with_the_weights_is_said_as_it_is(change):
    model, words = tiny("llama"), re.escape(REFUSALS[change])
    change(model)
    assert re.search(words, posterity.check(model).reason)
    with pytest.raises(InputError, match=words):
        posterity.measure(model, None, tokens(1), context=12, progress=False)
    with pytest.raises(InputError, match=words), posterity.account(model):
        pass
    with pytest.raises(InputError, match=words), posterity.horizon(model, posterity.Myopic()):
        pass
