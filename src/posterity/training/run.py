"""Training runs, a folder each: settings, checkpoints to resume from, and the trained model.

    run.json       settings, digest of the data, versions
    checkpoint-*   of the Trainer; an interrupted run resumes from the last complete one
    model files    and `metrics.json`, once the run is finished

Two runs with equal settings train to the same weights on the same machine; arms that differ only in the horizon start
from the same weights and see the same batches.
"""

import contextlib
import errno
import json
import math
import os
import shlex
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
from posterity.atomic_files import write_atomically
from posterity.errors import InputError, first_line, one_line
from posterity.inputs.model import LoadedModel, load_model
from posterity.models.context_length import check_context
from posterity.models.masks import FOLDED
from posterity.models.transformers_logging import hide_progress_bars
from posterity.ops.horizon_rules import parse
from posterity.training.data import Data, Rows, prepare_data
from posterity.training.monitor import Monitor
from posterity.training.settings import Settings
from posterity.training.tasks import Regressor
from posterity.training.trainer import Trainer

RUN_FILE = "run.json"
METRICS_FILE = "metrics.json"  # written last: it marks a finished run
MONITOR_ROWS = 4


def make_model(settings: Settings, data: Data) -> PreTrainedModel:
    """Initialize a model from scratch with the settings' seed, without any dropout.

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
        _disable_dropout(config)
        return Regressor(config)
    try:
        size |= {"num_key_value_heads": settings.heads, "intermediate_size": 3 * settings.width}
        config = AutoConfig.for_model(settings.model, **size)
        _disable_dropout(config)
        return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a type of transformers raises for sizes it cannot take
        raise InputError(
            f"expected a type of transformers that can be made with width {settings.width}, depth {settings.depth} and "
            f"{settings.heads} heads, or a folder or hub id to go on from; got {settings.model!r}: "
            f"{first_line(error)[:200]}"
        ) from error


def _disable_dropout(config: Any) -> None:
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
    """Train a run, or resume one that was interrupted; a finished run is left as it is.

    Args:
        output: The folder of the run.
        settings: Model, data, horizon and optimization.
        callbacks: Further callbacks of the Trainer.
        save_every: Optimizer steps between checkpoints; a fifth of the run by default.
        keep: Number of checkpoints to keep; the oldest are deleted first.
        monitor: Optimizer steps between measurements of held-out rows, by `posterity.Monitor`, into `monitor.nc` and
            its page.
        progress: Show a progress bar, the number of skipped lines and what no row holds on standard error.

    Returns:
        The folder.

    Raises:
        InputError: A wrong setting; a folder that holds another run or something else; a loss that is not finite.
    """
    folder = Path(output)
    if "\0" in str(folder):
        raise InputError(f"{folder}: expected a folder that can be made: a name holds no zero byte; choose another")
    settings.check_data()
    pretrained = _load_pretrained(settings)
    data = prepare_data(settings, None if pretrained is None else pretrained.tokenizer)
    if progress and data.skipped is not None:
        print(one_line(str(data.skipped)), file=sys.stderr)
    for rows, coverage in zip(("training", "held-out"), data.coverage if progress else (), strict=False):
        if str(coverage):
            print(f"{rows} rows, {coverage}", file=sys.stderr)
    record = _identity(settings, data)
    _claim_folder(folder, record)
    if (folder / METRICS_FILE).exists():
        return folder
    model = make_model(settings, data) if pretrained is None else pretrained.model
    if monitor is not None:
        callbacks = [*(callbacks or []), _held_out_monitor(folder, settings, data, monitor)]
    trainer = _make_trainer(folder, settings, data, model, callbacks, save_every or max(1, settings.steps // 5), keep)
    if progress:
        trainer.add_callback(LossBar())
    _run_trainer(trainer, folder, record)
    return folder


def _load_pretrained(settings: Settings) -> LoadedModel | None:
    """Load the model that training starts from; None for one from scratch."""
    if settings.task_name is not None or settings.model in _model_types():
        return None
    loaded = load_model(settings.model, "float32")
    check_context(loaded.model, settings.context)
    if getattr(loaded.model.config.get_text_config(decoder=True), FOLDED, None):
        raise InputError(f"expected a model whose heads all attend; {settings.model} runs folded: train the plain one")
    return loaded


def _identity(settings: Settings, data: Data) -> dict[str, Any]:
    """Return the part of run.json that must agree for an interrupted run to resume."""
    record = {**json.loads(json.dumps(asdict(settings))), "data_digest": data.digest}
    if settings.field is None:
        record.pop("field")  # a run from before this setting existed is the same run
    if data.skipped is None:
        record.pop("skip_broken")  # likewise
    else:
        record["skipped_lines"] = data.skipped.total
    return record


def _held_out_monitor(folder: Path, settings: Settings, data: Data, every: int) -> Monitor:
    """Make a Monitor of the first held-out rows."""
    if settings.task_name == "sines":
        raise InputError("a monitor measures models that read tokens; sines has none: leave --monitor-every out")
    probe = data.held_out[0][:MONITOR_ROWS]
    return Monitor(every, probe, output=folder / "monitor.nc", limit=MONITOR_ROWS)


def _make_trainer(
    folder: Path, settings: Settings, data: Data, model: PreTrainedModel, callbacks: list[TrainerCallback] | None,
    save_every: int, keep: int,
) -> Trainer:  # fmt: skip
    """Make the Trainer of a run, for the number of processes that torchrun started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch % world:
        raise InputError(f"expected a batch that {world} processes divide; got {settings.batch}")
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
    return trainer


def _run_trainer(trainer: Trainer, folder: Path, record: dict[str, Any]) -> None:
    """Write run.json, train from the last complete checkpoint to the end, then write the model and its metrics."""
    if trainer.is_world_process_zero():
        write_atomically(folder / RUN_FILE, json.dumps({**record, **_versions()}, indent=1).encode())
    with _release_if_refused(folder), _explain_full_disk(folder), hide_progress_bars():
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        write_atomically(folder / METRICS_FILE, json.dumps(trainer.state.log_history, indent=1).encode())


class LossBar(ProgressCallback):
    """The Trainer's progress bar with the last loss beside it, instead of every log entry in full."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss."""
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")


@contextlib.contextmanager
def _release_if_refused(folder: Path) -> Iterator[None]:
    """Remove run.json if the run is refused before its first checkpoint, so that the folder is free again."""
    try:
        yield
    except InputError:
        if last_checkpoint(folder) is None:
            (folder / RUN_FILE).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _explain_full_disk(folder: Path) -> Iterator[None]:
    """Raise InputError in place of the several exceptions with which torch.save reports a full disk."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)
        if not full and "PytorchStreamWriter failed" not in str(error):
            raise
        raise InputError(
            f"no space left in {folder}; the checkpoints before are whole: make room, and the same command goes on"
        ) from error


def final_loss(folder: Path, settings: Settings) -> str:
    """Return the last training loss of a finished run, the mean since the entry before it in its metrics, in words."""
    entries = [entry for entry in json.loads((folder / METRICS_FILE).read_text()) if "loss" in entry]
    before = entries[-2]["step"] if len(entries) > 1 else 0
    units = "Huber loss" if settings.task_name == "sines" else "nats per token"
    return f"training loss {entries[-1]['loss']:.4f} ({units}, steps {before + 1} to {entries[-1]['step']})"


def next_command(folder: Path, settings: Settings) -> str:
    """Return what to run after a finished run: the comparison with a plain run, or the measurement of a plain one."""
    if settings.horizon != "full":
        command = shlex.join(["posterity", "compare", "PLAIN", str(folder), "-r", "gap.html"])
        return f"{command} # PLAIN: the run with --horizon full and --seed {settings.seed}"
    if settings.task_name is not None:
        command = shlex.join(["posterity", "compare", str(folder), "OTHER", "-r", "gap.html"])
        return f"{command} # OTHER: the same training with another --horizon and --output"
    texts = () if settings.data == ("text",) else settings.data
    options = ["--context", str(settings.context), "--losses", "-r", "report.html"]
    options += [] if settings.field is None else ["--field", settings.field]
    options += ["--skip-broken"] if settings.skip_broken else []
    return shlex.join(["posterity", "measure", str(folder), *texts, *options])


def last_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint; the Trainer writes its state last."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        try:
            complete.append((json.loads((path / "trainer_state.json").read_text())["global_step"], str(path)))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return max(complete)[1] if complete else None


def _claim_folder(folder: Path, record: dict[str, Any]) -> None:
    """Create the folder, or raise InputError if it exists and holds anything but this run."""
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
        before = json.loads((folder / RUN_FILE).read_text())
    except FileNotFoundError:
        if any(folder.iterdir()):
            raise InputError(f"{folder}: expected a new folder or that of a run, but it holds something else") from None
        return
    except (OSError, ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise InputError(
            f"{folder}: expected the folder of a run, but its {RUN_FILE} is damaged: choose another folder"
        )
    changed = [name for name in record if before.get(name) != record[name]]
    if changed:
        changes = "; ".join(f"{name} was {before.get(name)!r}, now {record[name]!r}" for name in changed[:4])
        raise InputError(f"{folder} holds another run ({changes}): choose another folder, or the same settings")


def _versions() -> dict[str, str]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "posterity_version": __version__,
        "torch_version": version("torch"),
        "transformers_version": version("transformers"),
    }


def _model_types() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
