"""Texts and tokenizers of a few lines."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def tokenizer():
    """A tokenizer of 61 words, w0 to w60, split at white space."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


WORDS = "the cat sat on the mat and the dog ran to the end of the long road \n"
# From one to many characters in a token, with and without white space to cut at.
LONG = ["cat", "table", "market", "wonderful", "antidisestablishmentarianism"]


def byte_tokenizer(begin=False, end=False):
    """A byte-level BPE with a few merges; limit 8, so that a longer text would bring the library's warning."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    core.train_from_iterator([WORDS + " ".join(LONG)] * 10, trainer)
    if begin or end:
        template = " ".join(["<s>"] * begin + ["$A"] + ["</s>"] * end)
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", model_max_length=8)


PLAIN = byte_tokenizer()
