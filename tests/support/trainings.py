"""Small trainings: of a tiny model by a Trainer, and of a whole run; and what they leave to compare."""

import json

import torch
from support.tiny import tiny, tokens
from transformers import AutoModelForCausalLM, TrainingArguments

from posterity import Trainer
from posterity.training.data import Rows

INDUCTION = {"data": ("induction",), "width": 16, "depth": 2, "heads": 2, "batch": 4, "steps": 6, "warmup": 1}
INDUCTION |= {"task": {"vocabulary": 11, "length": 8}}


def training_arguments(folder, **changes):
    defaults = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "report_to": "none",
        "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "learning_rate": 1e-2,
    }  # fmt: skip
    return TrainingArguments(**defaults | changes)


def train_tiny(folder, *callbacks, name="llama", kind=Trainer, dtype=torch.float32, settings=(), **changes):
    """A Trainer of this kind that has trained a tiny model; `settings` of its horizon, `changes` of its arguments."""
    model, ids = tiny(name, dtype), tokens(64)
    arguments = training_arguments(folder, **changes)
    rows = Rows(ids, ids)
    trainer = kind(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks), **dict(settings))
    trainer.train()
    return trainer


def weights(trainer):
    return {name: x.detach().clone() for name, x in trainer.model.named_parameters()}


def logged_losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def saved_weights(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def saved_losses(folder):
    return [row["loss"] for row in json.loads((folder / "metrics.json").read_text()) if "loss" in row]


def equal_tensors(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
