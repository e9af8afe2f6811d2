"""Models as people run them: experts by their default kernel, half precision, images, several processes, nnsight."""

import subprocess

import pytest
import torch
from nnsight import NNsight
from support.processes import torchrun
from support.tiny import summed_loss, tiny, tokens
from support.verification import double, record_calls
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import posterity

IMAGE = 60  # the token that stands for a patch of an image


def credits(result):
    return torch.tensor(result.credit.values)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_experts_by_their_default_kernel_have_the_gradients_of_autograd(name):
    model, ids = tiny(name, torch.float32), tokens(1)
    model.set_experts_implementation("grouped_mm")
    result = posterity.measure(model, None, ids, context=12, parameters=True, progress=False)
    summed_loss(model, ids).backward()
    own, later, inner = torch.tensor(result.parameter_by_document.isel(document=0).transpose("loss_term", ...).values)
    expected = torch.zeros(len(own))
    for number, module in enumerate(map(str, result.parameter.values)):
        direct = model.get_submodule(module).parameters(recurse=False)
        expected[number] = sum(x.grad.square().sum() for x in direct if x.grad is not None)
    # float32 has 7 digits; the two parts of a square cancel in part
    torch.testing.assert_close(own + later + 2 * inner, expected.double(), rtol=1e-4, atol=1e-5 * expected.max().item())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_batch_changes_half_precision_by_its_rounding_only(name):
    model, ids = tiny(name, torch.bfloat16), tokens(4)
    single, pairs, four = (
        posterity.measure(model, None, ids, context=12, batch=batch, progress=False) for batch in (1, 2, 4)
    )
    for result in (pairs, four):
        for document in range(4):
            other, credit = (
                torch.tensor(x.credit_by_document.isel(document=document).sum(("reader_of", "side")).values)
                for x in (result, single)
            )
            # bfloat16 has 8 bits, and some 20 roundings in a row add up at random
            torch.testing.assert_close(other, credit, rtol=0, atol=20**0.5 * 2**-8 * credit.abs().max().item())


def test_a_model_that_sees_images_balances_at_text_and_image_tokens():
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").double().eval()
    ids, images = tokens(2, 16), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    ids[:, 3:7] = IMAGE
    inputs = {"input_ids": ids, "pixel_values": images, "labels": ids.masked_fill(ids == IMAGE, -100)}
    with double(), record_calls() as calls:
        model(**inputs, use_cache=False).loss.backward()
    language = set(model.model.language_model.modules())
    calls = [call for call in calls if call.module in language]
    with double(), posterity.account(model) as ledger:
        model(**inputs, use_cache=False).loss.backward()
    result = ledger.result()
    assert result.sizes["layer"] == len(calls) == 2
    by_position = torch.tensor(result.credit_by_position.sum(("head", "side")).values)
    expected = torch.stack([torch.stack([x.grad.square().sum((0, 1, 3)) for x in call.streams]) for call in calls])
    torch.testing.assert_close(by_position, expected, rtol=1e-9, atol=1e-9 * expected.max().item())
    assert (by_position[:, :, 3:7] > 0).any()
    with posterity.account(model) as ledger:  # another image is another result
        model(**inputs | {"pixel_values": -images}, use_cache=False).loss.backward()
    assert not torch.allclose(credits(ledger.result()), credits(result), rtol=1e-3)


def test_a_trace_of_nnsight_inside_a_ledger_changes_nothing(tmp_path):
    model, ids = tiny("llama"), tokens(1)
    with posterity.account(model) as ledger:
        model(input_ids=ids, labels=ids).loss.backward()
    plain = ledger.result()
    traced = NNsight(model)
    with posterity.account(model) as ledger:
        with traced.trace(input_ids=ids, labels=ids):
            hidden = traced.model.layers[0].output.save()
            output = traced.output.save()
        output.loss.backward()
    torch.testing.assert_close(credits(ledger.result()), credits(plain))
    assert posterity.save(plain, tmp_path / "run.nc") == tmp_path / "run.nc"  # nnsight gives every object a `save`
    assert (hidden[0] if isinstance(hidden, tuple) else hidden).shape[-1] == 24


PARALLEL = """
import sys
sys.path.insert(0, "tests")
import torch, posterity
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from support.tiny import summed_loss, tiny, tokens

dist.init_process_group("gloo")
assert dist.get_world_size() == 2
ids = tokens(2)[dist.get_rank(), None]
credits = []
for wrap in (DistributedDataParallel, lambda model: model):
    model = wrap(tiny("llama"))
    with posterity.account(model) as ledger:
        summed_loss(model, ids).backward()
    credits.append(torch.tensor(ledger.result().credit.values))
torch.testing.assert_close(*credits, rtol=1e-12, atol=0)
print("the same", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_ledger_of_a_process_of_ddp_is_that_of_its_own_rows(tmp_path):
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL)
    run = subprocess.run([*torchrun(2), str(script)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("the same") == 2
