"""The checkpoints of one training, by step."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from posterity.errors import InputError


def checkpoints(names: Sequence[str]) -> tuple[dict[int, str], list[str]]:
    """The checkpoints of one training at the head of `names`, by step, and the names after them.

    Several folders with a model each, such as `run/checkpoint-*`; or one folder that holds checkpoints and no model of
    its own. None for anything else.

    Raises:
        InputError: A folder does not say its step, or two say the same.
    """
    folders = list(itertools.takewhile(_holds_model, (Path(os.path.expanduser(name)) for name in names)))
    used = len(folders)
    if used == 0 and names:
        folders, used = [one for one in Path(os.path.expanduser(names[0])).glob("checkpoint-*") if _holds_model(one)], 1
    elif used == 1:
        folders = []
    found: dict[int, str] = {}
    for folder in folders:
        step = _step(folder)
        if step in found:
            raise InputError(
                f"expected checkpoints of one training; {found[step]} and {folder} are both of step {step}"
            )
        found[step] = str(folder)
    return dict(sorted(found.items())), list(names[used if found else 0 :])


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _step(folder: Path) -> int:
    """The training step of a checkpoint, by the Trainer's own state or else by the number its name ends with."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((folder / "trainer_state.json").read_text())["global_step"])
    number = re.search(r"(\d+)$", folder.name)
    if number is None:
        raise InputError(f"expected checkpoints of one training, each with its step; {folder} does not say its step")
    return int(number[1])
