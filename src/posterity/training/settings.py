"""The settings of a training run, and their check."""

import dataclasses
import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from posterity.errors import InputError
from posterity.ops.horizon_rules import parse
from posterity.training.tasks import TASKS


@dataclass(frozen=True)
class Settings:
    """Everything that determines a run: equal settings train to the same weights on the same machine.

    Raises:
        InputError: A setting out of its range.
    """

    model: str = "llama"  # a type of transformers, from scratch; or a folder or hub id, to go on from
    data: tuple[str, ...] = ("text",)  # "text" (the default text), "sines", "induction"; or files, datasets
    horizon: str = "full"
    cut: str = "kv"
    streams: tuple[str, ...] = ("key", "value")
    layers: tuple[int, ...] | None = None
    steps: int = 1000
    batch: int = 16  # rows of one step, over all processes
    context: int = 128
    rate: float = 1e-3  # learning rate, after the warm-up; it then falls to 0 as a cosine
    warmup: int = 50  # steps
    width: int = 128
    depth: int = 4
    heads: int = 4
    seed: int = 0
    task: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # numbers of a built-in task, such as {"chance": 0.1}
    field: str | None = None  # of rows that holds the text
    skip_broken: bool = False  # leave out broken lines of .jsonl, .csv and .tsv files

    def __post_init__(self):
        """Check all that needs neither model nor data."""
        parse(self.horizon)
        if self.cut not in ("kv", "hidden"):
            raise InputError(f'cut expects "kv" or "hidden"; got {self.cut!r}')
        if not self.streams or not set(self.streams) <= {"key", "value"}:
            raise InputError(f'streams expects "key", "value" or both; got {self.streams!r}')
        for name in ("steps", "batch", "context", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"expected {name} of at least 1; got {getattr(self, name)}")
        if self.width % self.heads:
            raise InputError(f"expected a width that {self.heads} heads divide; got {self.width}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"expected a seed from 0 to {2**32 - 1}; got {self.seed}")
        if not 0 < self.rate < float("inf"):
            raise InputError(f"expected a learning rate above 0; got {self.rate}")
        if self.task and self.task_name is None:
            raise InputError(f"only sines and induction take numbers of their own; got {self.task} for {self.data}")

    @property
    def task_name(self) -> str | None:
        """The name of the built-in task; None for text."""
        return self.data[0] if len(self.data) == 1 and self.data[0] in TASKS else None

    def make_task(self) -> Any:
        """Make the built-in task with its numbers."""
        assert self.task_name is not None
        kind = TASKS[self.task_name]
        names = [number.name for number in fields(kind)]
        if not set(self.task) <= set(names):
            raise InputError(f"{self.task_name} takes {', '.join(names)}; got {', '.join(set(self.task) - set(names))}")
        return kind(**self.task)

    def check_data(self) -> None:
        """Raise InputError for built-in data that is mixed with other data or misspelt; nothing is looked up."""
        built_in = [*TASKS, "text"]
        mixed = [name for name in self.data if name in built_in]
        if mixed and len(self.data) > 1:
            raise InputError(f"expected {mixed[0]} alone, or files and datasets; got {', '.join(self.data)}")
        for name in self.data:
            near = difflib.get_close_matches(name, built_in, 1, 0.7)
            if name not in built_in and near and not Path(name).exists():
                raise InputError(
                    f"expected {', '.join(built_in)}, a file or a dataset; got {name!r}: did you mean {near[0]}?"
                )
