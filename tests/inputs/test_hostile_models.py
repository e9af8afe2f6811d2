"""A folder of a model that means harm is refused in one line, and none of its code runs."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from support.model_folders import change_config, refusal

from posterity.inputs.model import load_model
from posterity.inputs.model_files import TO_SAFETENSORS


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path):
    """What appears when code of the folder runs; looked for after the test."""
    place = tmp_path / "canary"
    pickle.loads(pickle.dumps(Evil(place)))  # the canary can sing
    place.rmdir()
    yield place
    assert not place.exists(), "code of the folder ran"


@pytest.fixture
def folder_with_code(folder, canary):
    for name in ("code", "configuration_llama", "modeling_llama", "tokenization_llama", "torch", "json"):
        (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Zorg: pass\n")
    return folder


def index(folder, files):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "model.ckpt", "weights.pkl"]


@pytest.mark.parametrize("name", PICKLES)
def test_weights_in_a_pickle_are_refused_unread_with_the_way_to_convert_them(folder, canary, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Evil(canary)))
    message = refusal(str(folder))
    assert "has pickled ones" in message
    assert message.endswith(TO_SAFETENSORS)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_by_the_name_of_safetensors_is_refused_unread(folder, canary, zipped):
    if zipped:
        torch.save({"weight": Evil(canary)}, folder / "model.safetensors")
    else:
        (folder / "model.safetensors").write_bytes(pickle.dumps(Evil(canary)))
    assert "is a pickle by its form" in refusal(str(folder))


def test_a_header_whose_length_begins_like_a_pickle_is_read(folder):
    """The first byte of a length may be 0x80, as that of a pickle is."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    longer = (length // 256 + 1) * 256 + 0x80
    file.write_bytes(struct.pack("<Q", longer) + data[8 : 8 + length].ljust(longer) + data[8 + length :])
    assert file.read_bytes()[:1] == b"\x80"
    load_model(str(folder))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a": "pytorch_model.bin"}, "names 'pytorch_model.bin'"),
        ({"a": "../other.safetensors"}, "names '../other.safetensors'"),
        ({"a": "/etc/passwd"}, "names '/etc/passwd'"),
        ({"a": 3}, "names 3"),
        ({}, "it has none"),
        ([1], "it has none"),
        ({"a": "missing.safetensors"}, "missing.safetensors: No such file"),
    ],
)
def test_an_index_names_safetensors_files_beside_it_and_nothing_else(folder, canary, files, reason):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(canary)))
    index(folder, files)
    assert reason in refusal(str(folder))


@pytest.mark.parametrize("length", [2**63, 2**40, 90_000_001, 0, 1])
def test_a_header_that_claims_a_size_of_its_own_is_refused(folder, length):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    assert "its weights are damaged" in refusal(str(folder))


CONFIGS = [
    {"num_hidden_layers": 10**9},  # would be made, one by one
    {"num_hidden_layers": 0},
    {"num_hidden_layers": "1"},
    {"num_attention_heads": 0},
    {"vocab_size": 2**62},
    {"vocab_size": -1},
    {"hidden_size": 10**9},
    {"hidden_size": None},
    {"rope_parameters": 3},
    {"auto_map": 3},
    {"model_type": "../llama"},
    {"model_type": ["llama"]},
    {"auto_map": {"AutoConfig": "code.Zorg"}, "model_type": "zorg"},
    {"auto_map": {"AutoConfig": "../../x.Y"}, "model_type": "zorg"},
    {"attn_implementation": "evil/kernel"},
    {"_attn_implementation": "evil/kernel"},
    {"experts_implementation": {"": "evil/kernel"}},
    {"posterity_folded": 3},
    {"posterity_folded": {"0": [5]}},
    {"posterity_folded": {"7": [0]}},
    {"posterity_folded": {"0": "x"}},
]


@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_a_config_that_cannot_be_is_refused(folder_with_code, change):
    change_config(folder_with_code, **change)
    refusal(str(folder_with_code))


def test_code_beside_the_weights_never_runs_by_itself(folder_with_code, monkeypatch):
    monkeypatch.chdir(folder_with_code)
    change_config(folder_with_code, auto_map={"AutoConfig": "code.Zorg", "AutoModelForCausalLM": "code.Zorg"})
    tokenizer = folder_with_code / "tokenizer_config.json"
    known = json.loads(tokenizer.read_text())
    (folder_with_code / "chat_template.jinja").write_text("{{ raise_exception('ran') }}{% for")
    for change in ({"auto_map": {"AutoTokenizer": ["code.Zorg", None]}}, {"chat_template": "{{ 1 / 0 }}"}):
        tokenizer.write_text(json.dumps(known | change))
        load_model(str(folder_with_code))  # transformers has these classes itself


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b"{"], ids=repr)
def test_files_that_are_not_what_their_names_say_are_refused(folder, name, data):
    (folder / name).write_bytes(data)
    refusal(str(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_in_a_loop_and_folders_by_the_name_of_a_file_are_refused(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    refusal(str(folder))
    (folder / name).unlink()
    (folder / name).mkdir()
    refusal(str(folder))


HEADS = [[], 3, {"0": [9]}, {"9": [0]}, {"0": [-1]}, {"0": [0.7]}, {"0": ["1"]}, {"0": [True]}, {"0": [0], "00": [1]}]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_folded_heads_that_cannot_be_are_refused(folder, heads):
    (folder / "folded.json").write_text(json.dumps({"version": 1, "heads": heads}))
    refusal(str(folder))


def test_folded_heads_that_are_no_json_are_refused(folder):
    for text in ("", "[" * 100_000, '{"version": 1, "heads": {"0": [1e400]}}', "\0"):
        (folder / "folded.json").write_text(text)
        assert "damaged: fold it again" in refusal(str(folder))


@pytest.mark.parametrize(
    "name", ["", " ", "a\0b", "\ud800", "\x1b[31mx", "x" * 5000, "-", "..", "~nobody/x", "/dev/zero"]
)
def test_names_that_no_model_has_are_refused(name, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(name).isprintable()
    shutil.rmtree(tmp_path)
