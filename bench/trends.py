"""What a Monitor logs over trainings from scratch: one that learns, one under a horizon, one with too high a rate."""

import tempfile
from pathlib import Path

from rich.table import Table
from timing import console

import posterity
from posterity.results.steps import split_steps
from posterity.training.monitor import scalars
from posterity.training.run import train
from posterity.training.settings import Settings

STEPS, EVERY = 200, 50
SHOWN = (0, 50, 100, 200)
TRAININGS = {
    "plain": {},
    "myopic, cut at hidden": {"horizon": "myopic", "cut": "hidden"},
    "learning rate 100 times too high": {"rate": 0.1},
}
COLUMNS = ("key_self_share", "value_self_share", "key_own_share", "value_own_share", "key_effective_horizon")


def trends():
    table = Table("training", "step", "probe loss", *COLUMNS, title="Monitor over training (min to max over layers)")
    for label, changes in TRAININGS.items():
        with tempfile.TemporaryDirectory() as folder:
            run = train(Path(folder) / "run", Settings(steps=STEPS, **changes), monitor=EVERY)
            results = split_steps(posterity.load(run / "monitor.nc"))
        for step in SHOWN:
            logs = {name.removeprefix("posterity/"): value for name, value in scalars(results[step]).items()}
            cells = [_cell(logs, name) for name in COLUMNS]
            table.add_row(label if step == 0 else "", str(step), f"{float(results[step].loss.mean()):.2f}", *cells)
    console.print(table)


def _cell(logs, name):
    def number(key):
        value = logs.get(key)
        if value is None:
            return "beyond"
        return f"{value:.1f}" if name.endswith("horizon") else f"{100 * value:.0f} %"

    return f"{number(name)} ({number(name + '_min')} to {number(name + '_max')})"
