"""The folder of an adapter loads over the base that it names, and means no more harm than a model's folder."""

import json
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from support.adapted import PEFT_WARNING
from support.model_folders import refusal, tiny_tokenizer
from support.tiny import tokens
from transformers import AutoModelForCausalLM

import posterity
from posterity.errors import InputError
from posterity.inputs.checkpoints import find_checkpoints
from posterity.inputs.limits_folder import save_folded
from posterity.inputs.model import load_model

pytestmark = pytest.mark.filterwarnings(PEFT_WARNING)
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def save_adapter(base, place, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(place)
    return Path(place)


@pytest.fixture
def adapter(folder, tmp_path):
    return save_adapter(folder, tmp_path / "adapter", LoraConfig(**LORA, task_type="CAUSAL_LM"))


def change(adapter, **entries):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


KINDS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True, use_rslora=True),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False),
    "head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_folder_loads_as_peft_loads_it_and_says_what_it_is(folder, tmp_path, kind, capfd):
    place = save_adapter(folder, tmp_path / "adapter", KINDS[kind])
    capfd.readouterr()
    loaded = load_model(str(place))
    assert capfd.readouterr() == ("", "")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), place).eval()
    ids = tokens(2)
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert {x.dtype for x in loaded.model.parameters()} == {x.dtype for x in expected.parameters()}
    assert not loaded.model.training
    assert (loaded.name, loaded.tokenizer("the").input_ids) == (str(place), tiny_tokenizer()("the").input_ids)
    result = posterity.measure(loaded.model, None, ids, context=12, progress=False)
    assert result.attrs["base_model"] == str(folder)
    assert result.attrs["adapters"] == f"default ({'IA3' if kind == 'ia3' else 'LORA'})"
    assert result.sizes["adapter"] > 0
    assert {x.dtype for x in load_model(str(place), "float64").model.parameters()} == {torch.float64}


def test_an_adapter_of_the_hub_loads_from_the_cache_and_names_its_commit(adapter, tmp_path, monkeypatch):
    commit = "0123456789" * 4
    place = tmp_path / "hub" / "models--lab--adapter"
    shutil.copytree(adapter, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = load_model("lab/adapter")
    assert (loaded.name, loaded.revision) == ("lab/adapter", commit)
    assert "default" in loaded.model.peft_config


def test_tokens_that_an_adapter_adds_need_embeddings_of_its_own(folder, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new {number}>" for number in range(60)])
    base = AutoModelForCausalLM.from_pretrained(folder)
    rows = base.get_input_embeddings().weight.shape[0]
    assert len(tokenizer) > rows
    place = save_adapter(folder, tmp_path / "without", LoraConfig(**LORA))
    tokenizer.save_pretrained(place)
    assert f"its tokenizer has {len(tokenizer)} tokens, its base {rows}" in refusal(str(place))
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = get_peft_model(base, LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "with")
    tokenizer.save_pretrained(tmp_path / "with")
    loaded = load_model(str(tmp_path / "with"))
    ids = torch.tensor([[3, len(tokenizer) - 1, 5]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_without_peft_and_without_the_base_the_message_names_the_base_and_peft(adapter, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        message = refusal(str(adapter))
        assert f"{adapter}, an adapter over the base model {folder}: peft is not installed" in message
        assert "pip install 'posterity[peft]'" in message
        assert "load it with peft" in message
    change(adapter, base_model_name_or_path=str(folder / "nowhere"))
    message = refusal(str(adapter))
    assert f"over the base model {folder / 'nowhere'}" in message
    assert "load it with peft" in message
    change(adapter, base_model_name_or_path=None)
    assert "names None" in refusal(str(adapter))


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_a_pickled_adapter_is_refused_unread(adapter, tmp_path):
    canary = tmp_path / "canary"
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil(canary)))
    assert "expected adapter_model.safetensors, and it has pickled weights" in refusal(str(adapter))
    (adapter / "adapter_model.safetensors").write_bytes(pickle.dumps(Evil(canary)))
    assert "is a pickle by its form" in refusal(str(adapter))
    assert not canary.exists()


def test_a_base_with_pickled_weights_is_refused_unread(adapter, folder, tmp_path):
    canary = tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(canary)))
    assert "has pickled ones" in refusal(str(adapter))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "its megatron_config would let it import code"),
        ({"r": 10**12}, "its config has the size 1000000000000"),
        ({"rank_pattern": {"q_proj": 10**12}}, "its config has the size 1000000000000"),
        ({"peft_type": "NOTHING"}, "load it with peft"),
        ({"r": 3}, "load it with peft"),
        ({"target_modules": ["q_proj"]}, "its config has no place for"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "adapter_model.safetensors lacks"),
        ({"target_modules": ["nothing"]}, "load it with peft"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused_in_one_line(adapter, tmp_path, monkeypatch, entries, reason):
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    change(adapter, **entries)
    assert reason in refusal(str(adapter))
    assert not (tmp_path / "canary").exists()


def test_an_adapter_over_an_adapter_and_code_of_its_base_are_refused(adapter, folder, tmp_path):
    assert "no code of a base model runs" in refusal(str(adapter), trust_remote_code=True)
    second = Path(shutil.copytree(adapter, tmp_path / "second"))
    change(second, base_model_name_or_path=str(adapter))
    assert "its base model is an adapter itself" in refusal(str(second))


def test_an_adapter_that_names_itself_as_its_base_is_refused(adapter):
    change(adapter, base_model_name_or_path=str(adapter))
    assert "its base model is an adapter itself" in refusal(str(adapter))


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_a_learned_prompt_is_refused_when_it_is_loaded(folder, tmp_path, kind):
    place = save_adapter(folder, tmp_path / "adapter", kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert "puts a learned prompt in front of every text" in refusal(str(place))


def test_a_model_with_adapters_is_not_written_as_a_folded_one(adapter, tmp_path):
    loaded = load_model(str(adapter))
    with pytest.raises(InputError, match="merge them first"):
        save_folded(loaded.model, loaded.tokenizer, {0: [0]}, tmp_path / "folded", {})
    assert not (tmp_path / "folded").exists()


def test_checkpoints_of_adapters_are_found_by_step(adapter, tmp_path):
    run = tmp_path / "run"
    for step in (20, 10):
        shutil.copytree(adapter, run / f"checkpoint-{step}")
    folders, rest = find_checkpoints([str(run), "text"])
    assert list(folders) == [10, 20]
    assert rest == ["text"]
