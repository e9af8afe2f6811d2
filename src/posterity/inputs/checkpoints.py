"""The checkpoints of one training, by step."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from posterity.errors import InputError
from posterity.inputs.model_files import ADAPTER_CONFIG


def find_checkpoints(names: Sequence[str]) -> tuple[dict[int, str], list[str]]:
    """Split `names` into the checkpoints of one training at their head, by step, and the names after them.

    Checkpoints are several folders with a model each, such as `run/checkpoint-*`; or one folder that holds checkpoints
    and no model of its own. Anything else gives no checkpoint.

    Raises:
        InputError: A folder does not say its step, or two say the same.
    """
    folders = list(itertools.takewhile(_holds_model, (Path(os.path.expanduser(name)) for name in names)))
    count = len(folders)
    if count == 0 and names:
        candidates = Path(os.path.expanduser(names[0])).glob("checkpoint-*")
        folders, count = [folder for folder in candidates if _holds_model(folder)], 1
    elif count == 1:
        folders = []
    by_step: dict[int, str] = {}
    for folder in folders:
        step = _read_step(folder)
        if step in by_step:
            raise InputError(
                f"expected checkpoints of one training; {by_step[step]} and {folder} are both of step {step}"
            )
        by_step[step] = str(folder)
    return dict(sorted(by_step.items())), list(names[count if by_step else 0 :])


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()


def _read_step(folder: Path) -> int:
    """Return the training step of a checkpoint, by the Trainer's own state or else by the number its name ends with."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((folder / "trainer_state.json").read_text())["global_step"])
    number = re.search(r"(\d+)$", folder.name)
    if number is None:
        raise InputError(f"expected checkpoints of one training, each with its step; {folder} does not say its step")
    return int(number[1])
