"""Layers that run again in the backward pass give the same bits, and nothing but their inputs is kept meanwhile."""

import weakref

import pytest
import torch
from support.families import build
from support.tiny import CONFIGS, tiny, tokens

import posterity
from posterity import InputError
from posterity.models.checkpointing import checkpoint_layers
from posterity.models.chunked_loss import ChunkedLoss, LMHead
from posterity.models.interception import interceptions
from posterity.models.language_model import freeze_parameters
from posterity.ops import fused_kernels

ALL_PASSES = {"losses": True, "horizons": (1, 4, 16)}
# Keys that layers share, two calls in a layer, sparse experts, state spaces and convolutions beside attention.
UNUSUAL = ["gemma3n_text", "gemma4_text", "diffllama", "mixtral", "bert", "opt"]
HYBRIDS = ["jamba", "lfm2", "qwen3_next", "recurrent_gemma"]


def both(model, ids, **options):
    """The results without and with checkpointing."""
    options = {"context": ids.shape[1], "progress": False} | options
    return (posterity.measure(model, None, ids, **options, checkpoint=checkpoint) for checkpoint in (False, True))


def assert_same_bits(expected, actual):
    assert list(expected.data_vars) == list(actual.data_vars)
    for name, variable in expected.data_vars.items():
        assert variable.identical(actual[name]), name


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("llama", "gemma2") else pytest.mark.slow) for name in CONFIGS]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_numbers_are_the_same_bits(name, dtype):
    model, ids = tiny(name, dtype), tokens(2, 20)
    assert_same_bits(*both(model, ids, **ALL_PASSES, parameters=True))
    assert_same_bits(*both(model, ids, batch=2, lags="all"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNUSUAL + HYBRIDS)
def test_the_same_bits_in_models_with_more_than_plain_layers(name):
    model, ids = build(name), torch.arange(3, 23)[None]
    assert_same_bits(*both(model, ids, **({} if name in HYBRIDS else ALL_PASSES)))


def activations(model, checkpoint):
    """How many layers hold their activations, in front of the backward pass and then at each attention layer of it."""
    held = []
    gates = [
        layer.mlp.gate_proj for layer in model.model.layers
    ]  # the input of the activation function, which is saved
    hooks = [x.register_forward_hook(lambda *call: held.append(weakref.ref(call[-1].untyped_storage()))) for x in gates]

    def count(*_):
        counts.append(sum(x() is not None for x in held))

    ids, counts = tokens(1, 20), []
    with freeze_parameters(model), posterity.account(model) as ledger:
        head = LMHead.probe(model)
        with checkpoint_layers(ledger.watch) if checkpoint else freeze_parameters(model):
            held.clear()
            loss = ChunkedLoss.run(model, ids, head)
            count()
            runs = len(held)
            with ledger.watch.report_to(count):
                loss = ChunkedLoss.run(model, ids, head)
                loss.backward(retain_graph=True)
                loss.backward()
    for hook in hooks:
        hook.remove()
    return runs, len(held) - 2 * runs, counts


def test_a_layer_runs_again_and_its_activations_live_no_longer_than_its_backward_pass():
    model = tiny("llama", torch.float32)
    runs, again, counts = activations(model, checkpoint=True)
    assert (runs, again) == (3, 6)  # three layers, in each of two backward passes
    assert counts[0] == 0
    assert len(counts) == 1 + 6
    assert max(counts) <= 1
    runs, again, counts = activations(model, checkpoint=False)
    assert (runs, again) == (3, 0)
    assert counts[0] == 3


def test_attention_does_not_run_again(monkeypatch):
    calls, counts = [], []
    kernel = fused_kernels.Kernel(
        lambda *args: calls.append(args) or fused_kernels.CPU.forward(*args), fused_kernels.CPU.backward
    )
    monkeypatch.setattr("posterity.ops.attention.select_kernel", lambda *streams: kernel)
    model, ids = tiny("llama"), tokens(1, 20)
    for checkpoint in (False, True):
        with freeze_parameters(model), posterity.account(model) as ledger:
            head = LMHead.probe(model)
            with checkpoint_layers(ledger.watch) if checkpoint else freeze_parameters(model):
                calls.clear()
                ChunkedLoss.run(model, ids, head).backward()
                counts.append(len(calls))
    assert counts == [3, 3]


def test_the_model_is_restored_and_the_numbers_hold_inside_a_horizon():
    model, ids = tiny("llama"), tokens(2, 20)
    with posterity.horizon(model, posterity.Discount(0.5)):
        assert_same_bits(*both(model, ids))
    with posterity.horizon(model, posterity.Myopic(), cut="hidden"):
        assert_same_bits(*both(model, ids))
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(interceptions.values())
    assert all(x.grad is None for x in model.parameters())


class Forgetful(torch.nn.Module):
    """An MLP that does something else when it runs again."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        in_backward = torch._C._current_graph_task_id() != -1
        return self.mlp(2 * x if in_backward else x)


def test_layers_that_give_other_numbers_when_run_again_are_refused():
    model = tiny("llama")
    model.model.layers[1].mlp = Forgetful(model.model.layers[1].mlp)
    with pytest.raises(InputError, match=r"the layers of LlamaForCausalLM cannot run again .*other gradients.*checkp"):
        posterity.measure(model, None, tokens(), context=12, checkpoint=True, progress=False)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "reason"), [("hrm_text", "several times"), ("deepseek_v32", "computes with its mask")]
)
def test_layers_entered_twice_and_masks_that_do_not_come_back_are_refused(name, reason):
    model, ids = build(name), torch.arange(3, 19)[None]
    with pytest.raises(InputError, match=rf"cannot run again in the backward pass: .*{reason}.*measure without"):
        posterity.measure(model, None, ids, context=16, checkpoint=True, progress=False)
