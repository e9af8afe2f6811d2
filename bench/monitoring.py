"""Training with a Monitor: seconds of a step beside those of a measurement."""

import statistics
import tempfile
import time

from rich.table import Table
from timing import console, default_window
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from posterity import Monitor, Trainer
from posterity.training.data import Rows, prepare_data
from posterity.training.run import make_model
from posterity.training.settings import Settings


class TimedMonitor(Monitor):
    """A Monitor that records the seconds of each measurement."""

    def _measure(self, step, model):
        started = time.perf_counter()
        super()._measure(step, model)
        self.seconds = [*getattr(self, "seconds", []), time.perf_counter() - started]


class StepClock(TrainerCallback):
    """Records the seconds of each step, without what happens between steps."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)


def monitor():
    table = Table("training", "step: s", "measurement: s", "share of the time, every 100 steps", title="Monitor")
    settings = Settings()
    data = prepare_data(settings)
    default_model, ids = default_window(512)
    kinds = {
        "`posterity train` as it is: llama of 4 layers, 16 rows of 128": (
            make_model(settings, data),
            data.train[0],
            16,
        ),
        "SmolLM2-135M, one row of 512": (default_model, ids.repeat(8, 1), 1),
    }
    for label, (model, inputs, batch) in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=8, per_device_train_batch_size=batch, report_to="none", save_strategy="no",
                disable_tqdm=True, learning_rate=1e-5, dataloader_pin_memory=False,
            )  # fmt: skip
            # a default Monitor but for its steps, so that a few of them give several measurements
            timed_monitor, clock = TimedMonitor(2, inputs[:2, :128]), StepClock()
            rows = Rows(inputs, inputs)
            trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[timed_monitor, clock])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        step, measurement = (statistics.median(timer.seconds[1:]) for timer in (clock, timed_monitor))
        table.add_row(label, f"{step:.2f}", f"{measurement:.2f}", f"{measurement / (100 * step + measurement):.1%}")
    console.print(table)
