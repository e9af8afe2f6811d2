"""What a tokenizer makes of a text, without and with the special tokens that it puts in front."""

from typing import Any

from posterity.errors import InputError


def special_prefix(tokenizer: Any) -> list[int]:
    """Return the special tokens that the tokenizer puts in front of a text; those after it are not used."""
    if not callable(tokenizer):
        raise InputError(f"expected a tokenizer of transformers to read text; got {type(tokenizer).__name__}")
    probe = "a"
    bare, full = encode_text(tokenizer, probe), encode_text(tokenizer, probe, special=True)
    starts = [start for start in range(len(full) - len(bare) + 1) if full[start : start + len(bare)] == bare]
    return full[: starts[0]] if starts else []


def encode_text(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Return the token ids of a text, with or without the tokenizer's special tokens around it."""
    # verbose=False: no warning about a text longer than the model's limit, for it is cut into windows afterwards.
    return tokenizer(text, add_special_tokens=special, return_attention_mask=False, truncation=False, verbose=False)[
        "input_ids"
    ]
