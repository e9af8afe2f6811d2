"""Folders of tiny saved models, and the message with which one is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from posterity.errors import InputError
from posterity.inputs.model import load_model

TEXT = "the cat sat on the mat and the dog ran"


def tiny_tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([TEXT] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """A tiny Llama in bfloat16 with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=300, num_key_value_heads=1, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved_model, tmp_path):
    """A copy of the tiny model and its tokenizer that a test may damage."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


def change_config(folder, **changes):
    """Overwrite entries of the folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(*args, **options):
    """Return the one line with which load_model refuses its arguments."""
    with pytest.raises(InputError) as caught:
        load_model(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
