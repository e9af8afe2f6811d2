"""Training runs: a folder for each, with what was asked for, checkpoints to go on from, and the trained model.

    run.json       settings, digest of the data, versions
    checkpoint-*   of the Trainer; an interrupted run goes on from the last whole one
    model files    and `metrics.json`, once the run is finished

Two runs with equal settings train to the same weights on the same machine; arms that differ only in the horizon start
from the same weights and see the same batches.
"""

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedModel,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from posterity._version import __version__
from posterity.atomic_files import write_whole
from posterity.errors import InputError, one_line
from posterity.inputs import model as loading
from posterity.models.interface import FOLDED
from posterity.models.transformers_logging import without_bars
from posterity.ops.horizon_rules import parse
from posterity.training.data import Data, Rows, prepare
from posterity.training.monitor import Monitor
from posterity.training.settings import Settings
from posterity.training.tasks import Regressor
from posterity.training.trainer import Trainer

MONITORED = 4  # rows
FILE = "run.json"


def make_model(settings: Settings, data: Data) -> PreTrainedModel:
    """A model from scratch with the settings' seed, without any dropout.

    Raises:
        InputError: transformers knows no such type, or cannot make it of this size.
    """
    size = {
        "vocab_size": data.vocabulary, "max_position_embeddings": data.context, "hidden_size": settings.width,
        "num_hidden_layers": settings.depth, "num_attention_heads": settings.heads,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    set_seed(settings.seed)
    if settings.task_name == "sines":
        config = GPT2Config(**size)
        _without_dropout(config)
        return Regressor(config)
    try:
        more = {"num_key_value_heads": settings.heads, "intermediate_size": 3 * settings.width}
        config = AutoConfig.for_model(settings.model, **size, **more)
        _without_dropout(config)
        return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a type of transformers raises for sizes it cannot take
        raise InputError(
            f"expected a type of transformers that can be made with width {settings.width}, depth {settings.depth} and "
            f"{settings.heads} heads, or a folder or hub id to go on from; got {settings.model!r}: "
            f"{str(error).splitlines()[0][:200]}"
        ) from error


def _without_dropout(config: Any) -> None:
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)


def train(
    output: str | Path,
    settings: Settings,
    *,
    callbacks: list[TrainerCallback] | None = None,
    save_every: int | None = None,
    keep: int = 2,
    monitor: int | None = None,
    progress: bool = True,
) -> Path:
    """Train, or go on with a run that was interrupted; a finished run is left as it is. Returns the folder.

    Args:
        output: The folder of the run.
        settings: What to train on what, and how.
        callbacks: Of transformers.
        save_every: Steps between checkpoints; a fifth of the run by default.
        keep: How many checkpoints; the oldest go first.
        monitor: Steps between measurements of held-out rows, by `posterity.Monitor`, into `monitor.nc` and its page.
        progress: Whether to show a progress bar.

    Raises:
        InputError: A wrong setting; a folder that holds another run or something else; a loss that is not finite.
    """
    folder = Path(output)
    if "\0" in str(folder):
        raise InputError(f"{folder}: expected a folder that can be made: a name holds no zero byte; choose another")
    settings.check_data()
    scratch = settings.task_name is not None or settings.model in _types()
    loaded = None if scratch else loading.load_model(settings.model, "float32")
    if loaded is not None and getattr(loaded.model.config.get_text_config(decoder=True), FOLDED, None):
        raise InputError(f"expected a model whose heads all attend; {settings.model} runs folded: train the plain one")
    data = prepare(settings, None if loaded is None else loaded.tokenizer)
    known = {**json.loads(json.dumps(asdict(settings))), "data_digest": data.digest}
    if data.skipped is None:
        known.pop("skip_broken")  # the run of before there was this setting is the same run
    else:
        known["skipped_lines"] = data.skipped.total
        if progress:
            print(one_line(str(data.skipped)), file=sys.stderr)
    _same_run(folder, known)
    if (folder / "metrics.json").exists():
        return folder
    model: Any = make_model(settings, data) if loaded is None else loaded.model
    if monitor is not None:
        if settings.task_name == "sines":
            raise InputError("a monitor measures models that read tokens; sines has none: leave --monitor-every out")
        probe = data.held_out[0][:MONITORED]
        callbacks = [*(callbacks or []), Monitor(monitor, probe, output=folder / "monitor.nc", limit=MONITORED)]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch % world:
        raise InputError(f"expected a batch that {world} processes divide; got {settings.batch}")
    save_every = save_every or max(1, settings.steps // 5)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=settings.steps, per_device_train_batch_size=settings.batch // world,
        learning_rate=settings.rate, warmup_steps=settings.warmup, lr_scheduler_type="cosine", seed=settings.seed,
        save_steps=save_every, save_total_limit=keep, report_to="none", disable_tqdm=True,
        logging_steps=math.gcd(save_every, max(1, settings.steps // 100)),  # no mean of losses spans a checkpoint
        dataloader_pin_memory=torch.cuda.is_available(), use_cpu=not torch.accelerator.is_available(),
        ddp_backend=None if world == 1 or torch.accelerator.is_available() else "gloo",
    )  # fmt: skip
    if arguments.world_size != world:  # each process would train alone, on the same rows
        raise InputError(f"expected {world} processes to train together; transformers sees {arguments.world_size}")
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Rows(*data.train), callbacks=callbacks,
        processing_class=data.tokenizer, data_collator=default_data_collator,
        horizon=parse(settings.horizon), cut=settings.cut, streams=settings.streams, layers=settings.layers,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if progress:
        trainer.add_callback(Bar())
    if trainer.is_world_process_zero():
        write_whole(folder / FILE, json.dumps({**known, **_made()}, indent=1).encode())
    with _unclaimed(folder), _told_of_a_full_disk(folder), without_bars():
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        write_whole(folder / "metrics.json", json.dumps(trainer.state.log_history, indent=1).encode())
    return folder


class Bar(ProgressCallback):
    """The Trainer's progress bar with the last loss beside it, where it prints every log entry in full."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss."""
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")


@contextlib.contextmanager
def _unclaimed(folder: Path) -> Iterator[None]:
    """A run that is refused before its first checkpoint leaves its folder free."""
    try:
        yield
    except InputError:
        if last_checkpoint(folder) is None:
            (folder / FILE).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _told_of_a_full_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)
        if not full and "PytorchStreamWriter failed" not in str(error):  # how torch.save puts it
            raise
        raise InputError(
            f"no space left in {folder}; the checkpoints before are whole: make room, and the same command goes on"
        ) from error


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that is whole: its state is written last."""
    whole = []
    for one in folder.glob("checkpoint-*"):
        try:
            whole.append((json.loads((one / "trainer_state.json").read_text())["global_step"], str(one)))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return max(whole)[1] if whole else None


def _same_run(folder: Path, known: dict[str, Any]) -> None:
    """Make the folder, or see that it holds this run."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: expected a folder for the run; it is a file: choose another")
    if not folder.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)  # another process of this run may have been faster
        except OSError as error:
            raise InputError(
                f"{folder}: expected a folder that can be made; {error.strerror}: choose another"
            ) from error
        return
    try:
        before = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        if any(folder.iterdir()):
            raise InputError(f"{folder}: expected a new folder or that of a run, but it holds something else") from None
        return
    except (OSError, ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise InputError(f"{folder}: expected the folder of a run, but its {FILE} is damaged: choose another folder")
    other = [name for name in known if before.get(name) != known[name]]
    if other:
        said = "; ".join(f"{name} was {before.get(name)!r}, now {known[name]!r}" for name in other[:4])
        raise InputError(f"{folder} holds another run ({said}): choose another folder, or the same settings")


def _made() -> dict[str, str]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "posterity_version": __version__,
        "torch_version": version("torch"),
        "transformers_version": version("transformers"),
    }


def _types() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
