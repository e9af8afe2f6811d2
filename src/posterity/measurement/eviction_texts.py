"""Windows for evictions: plain text, and two tasks in which a wrong eviction hurts most.

A window is a prompt and what follows it. `copy`: random tokens, repeated from the first on, as induction heads predict
them. `retrieval`: a list of keys with values, then some of the keys again with their values, which alone count.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from posterity.errors import InputError
from posterity.inputs.windows import Window
from posterity.models.chunked_loss import NO_TARGET

TEXT, COPY, RETRIEVAL = TASKS = ("text", "copy", "retrieval")
LEAD = 8  # repeated tokens before copies count
NAMES, LETTERS = "bcdfghjklmnpqrstvwxz", "aeiou"  # of keys that tokenizers split alike


def task_windows(task: str, tokenizer: Any, count: int, prefix: int, continuation: int, seed: int) -> list[Window]:
    """Return windows of a task, the same for the same seed.

    Raises:
        InputError: An unknown task; no tokenizer; too little room.
    """
    if task not in (COPY, RETRIEVAL):
        raise InputError(f"expected one of the tasks {', '.join(TASKS)}; got {task!r}")
    if tokenizer is None:
        raise InputError(f"the task {task!r} is written with the model's tokenizer; there is none: pass it")
    generator = torch.Generator().manual_seed(seed)
    write = _copy if task == COPY else _retrieval
    windows = []
    for number in range(count):
        ids, answers = write(tokenizer, prefix, continuation, generator)
        windows.append(Window(ids, task, number, answers))
    return windows


def counted_targets(window: Window, prefix: int) -> Int64[Tensor, " position"]:
    """Return the token that follows each position, -100 unless it is behind the prompt and counts."""
    targets = window.ids.roll(-1)
    if window.answers is not None:
        targets = targets.masked_fill(~window.answers.roll(-1), NO_TARGET)
    targets[:prefix] = targets[-1] = NO_TARGET
    return targets


def _special(tokenizer: Any) -> list[int]:
    """Return what the tokenizer puts in front of a text."""
    text = "a"
    with_special, plain = (tokenizer(text, add_special_tokens=x)["input_ids"] for x in (True, False))
    return with_special[: with_special.index(plain[0])] if plain[0] in with_special else []


def _copy(tokenizer: Any, prefix: int, continuation: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    front = torch.tensor(_special(tokenizer), dtype=torch.long)
    special = {*tokenizer.all_special_ids}
    known = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    drawn = known[torch.randint(len(known), (prefix - len(front),), generator=generator)]
    repeated = drawn[: min(continuation, len(drawn))]
    if len(repeated) < continuation or continuation <= LEAD:
        raise InputError(
            f"the task 'copy' expects a continuation of {LEAD + 1} tokens to {len(drawn)}; got {continuation}"
        )
    ids = torch.cat((front, drawn, repeated))
    answers = torch.zeros(len(ids), dtype=torch.bool)
    answers[prefix + LEAD :] = True
    return ids, answers


def _retrieval(tokenizer: Any, prefix: int, continuation: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    front, entries, used = _special(tokenizer), [], {""}
    length = len(front)
    while True:
        entry = next(_entries(tokenizer, used, generator))
        size = sum(map(len, entry))
        if length + size > prefix:
            break
        entries.append(entry)
        length += size
    if not entries:
        raise InputError(f"the task 'retrieval' expects a prompt with room for an entry; got {prefix} tokens")
    filler = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids = (
        front + (filler * prefix)[: prefix - length] + [token for entry in entries for part in entry for token in part]
    )
    answers = [False] * len(ids)
    for index in torch.randperm(len(entries), generator=generator).repeat(2 + continuation // prefix).tolist():
        key, value, end = entries[index]
        ids += key + value + end
        answers += [False] * len(key) + [True] * len(value) + [False] * len(end)
    ids, answers = ids[: prefix + continuation], answers[: prefix + continuation]
    if not any(answers):
        raise InputError(
            f"the task 'retrieval' expects a continuation with room for an entry; got {continuation} tokens"
        )
    return torch.tensor(ids), torch.tensor(answers)


def _entries(
    tokenizer: Any, used: set[str], generator: torch.Generator
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Yield entries with keys that no other has: tokens of the key, of the value, of the end of the line."""
    while True:
        key, value = _word(generator), int(torch.randint(100, 1000, (1,), generator=generator))
        if key not in used:
            used.add(key)
            parts = (f"{key}:", f" {value}", "\n")
            yield tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)  # type: ignore[misc]


def _word(generator: torch.Generator) -> str:
    drawn = torch.randint(1000, (6,), generator=generator).tolist()
    return "".join(
        (NAMES, LETTERS)[place % 2][number % len((NAMES, LETTERS)[place % 2])] for place, number in enumerate(drawn)
    )
