"""`make reproduce`: what training under a horizon costs, scaled down, beside the published figures.

python bench/reproduce.py                 all of it (42 minutes on two cores; what is finished is not done again)
python bench/reproduce.py sines           the synthetic task of Wu, Morris and Levine 2024 (arXiv 2404.00859)
python bench/reproduce.py induction       repeated random sequences
python bench/reproduce.py text            a small language model from scratch: the gap as a function of the horizon

Runs are in `reproduce/`; the figure is written to docs/reproduce.png.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

import posterity
from posterity.results.comparison_schema import myopia_gaps
from posterity.results.stats import mean_and_error
from posterity.training.compare import load_run, position_losses, read_run
from posterity.training.data import prepare_data
from posterity.training.myopia import local_bonus, probe
from posterity.training.run import train
from posterity.training.settings import Settings

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "reproduce"
SINES = {
    "data": ("sines",),
    "width": 48,
    "depth": 2,
    "heads": 1,
    "batch": 96,
    "steps": 2400,
    "rate": 2e-3,
    "warmup": 100,
}
INDUCTION = {"data": ("induction",), "width": 64, "depth": 2, "heads": 4, "batch": 32, "steps": 1500, "rate": 3e-3}
INDUCTION |= {"task": {"vocabulary": 32, "length": 64}}
TEXT = {
    "data": ("text",),
    "width": 128,
    "depth": 4,
    "heads": 4,
    "batch": 16,
    "context": 128,
    "steps": 600,
    "rate": 2e-3,
}
DISCOUNTS = (2, 8, 32)
console = Console(width=110)


def train_arms(name, settings, arms, seeds):
    """Folders of finished runs, by arm and seed; trained side by side, one on each core."""
    folders = {(arm, seed): FOLDER / name / f"{arm}-{seed}" for seed in seeds for arm in arms}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    started = time.perf_counter()
    with ProcessPoolExecutor(cores, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        jobs = [
            pool.submit(train, folder, Settings(**settings, **arms[arm], seed=seed), progress=False)
            for (arm, seed), folder in folders.items()
        ]
        for (arm, seed), job in zip(folders, jobs, strict=True):
            job.result()
            console.print(f"{name}: {arm}, seed {seed}, after {(time.perf_counter() - started) / 60:.1f} min")
    return folders


def mean_text(values):
    mean, error = mean_and_error(values)
    return f"{mean:.3f} ± {error:.3f}"


def load_arm(folders, arm, seed):
    """The trained model of a run, and its rows."""
    return load_run(read_run(folders[arm, seed]))


def print_gaps(title, folders, seeds, columns=None):
    """Print loss and gap of every arm, with further columns as functions of the arm; return them."""
    gaps = myopia_gaps(posterity.compare(list(folders.values()), progress=False))
    table = Table("arm", "held-out loss", "myopia gap", *(columns or {}), title=f"{title}, {len(seeds)} seeds")
    arms = list(dict.fromkeys(arm for arm, _ in folders))
    for arm, label in zip(arms, gaps.arm.values, strict=True):
        row = gaps.sel(arm=label)
        gap = "" if label == "vanilla" else f"{float(row.gap):+.3f} ± {float(row.gap_error):.3f}"
        cells = [f"{float(row.loss):.3f} ± {float(row.loss_error):.3f}", gap]
        table.add_row(str(label), *cells, *(cell(arm) for cell in (columns or {}).values()))
    console.print(table)
    return gaps


def sines(axis):
    arms = {
        "vanilla": {},
        "myopic-hidden": {"horizon": "myopic", "cut": "hidden"},
        "myopic-kv": {"horizon": "myopic", "cut": "kv"},
    }
    seeds = (0, 1, 2)
    folders = train_arms("sines", SINES, arms, seeds)
    settings = Settings(**SINES)
    task, data = settings.make_task(), prepare_data(settings)
    fit = task.inputs(4000, seed=77)

    def waves(inputs):
        return torch.sin(task.frequency * inputs[..., 0])

    def probes(arm):
        scores = []
        for seed in seeds:
            model, _ = load_arm(folders, arm, seed)
            held_out = data.held_out[0]
            scores.append(probe(model, (fit, waves(fit)), (held_out, waves(held_out)))[1])
        return mean_text(scores)

    gaps = print_gaps(
        "sines (m = 8, b = 4, p = 1): Huber loss", folders, seeds, {"R² of sin(b x) after layer 1": probes}
    )
    zero = torch.nn.functional.huber_loss(torch.zeros_like(data.held_out[1]), data.held_out[1]).item()
    console.print(f"predicting zero: {zero:.3f}")
    bonuses = []
    for seed in seeds:
        model, rows = load_arm(folders, "vanilla", seed)
        bonuses.append(local_bonus(model, rows.train, rows.held_out, steps=600, batch=96, progress=False).bonus)
    console.print(f"local myopia bonus of vanilla (an estimate from below): {mean_text(bonuses)}")
    console.print(
        "published at full size: myopic loss over p = 1, 0.3, 0.1, 0.01: 1.257, 1.034, 0.966, 1.103 against 1.2569 for "
        "predicting zero; R² of sin(b x) after layer 1: 0.985 vanilla, below 0.02 myopic (arXiv 2404.00859)"
    )
    plot_by_position(axis, gaps, "sines: Huber loss")


def induction(axis):
    arms = {"vanilla": {}, "myopic": {"horizon": "myopic", "cut": "hidden"}}
    seeds = (0, 1, 2)
    folders = train_arms("induction", INDUCTION, arms, seeds)
    settings = Settings(**INDUCTION)
    task, data = settings.make_task(), prepare_data(settings)

    def repeated(arm):
        losses = []
        for seed in seeds:
            model, _ = load_arm(folders, arm, seed)
            with torch.no_grad():
                losses.append(position_losses(model, *data.held_out)[:, task.length // 2 - 1 :].mean().item())
        return mean_text(losses)

    gaps = print_gaps(
        f"induction ({task.vocabulary} tokens, {task.length} positions, periods {task.length // 4} to "
        f"{task.length // 2}): nats", folders, seeds, {"loss on the repeated half": repeated},
    )  # fmt: skip
    console.print(f"uniform predictor: {task.uniform_loss:.3f}")
    print_loss_split(folders, seeds[0], data.held_out[0][:64], task.length)
    plot_by_position(axis, gaps, "induction: nats")


def print_loss_split(folders, seed, ids, length):
    """Print the shares of all key credit: of the own losses, and of the later losses in every head."""
    table = Table("arm", "own losses", "later losses, by layer and head", title=f"who pays for keys, seed {seed}")
    for arm in dict.fromkeys(arm for arm, _ in folders):
        model, _ = load_arm(folders, arm, seed)
        result = posterity.measure(model, None, ids, context=length, limit=None, losses=True, batch=16, progress=False)
        credit = result.loss_credit.sel(written="key").sum("position") / result.loss_credit.sel(written="key").sum()
        later = credit.sel(part=["self later", "future"]).sum("part")
        cells = (
            f"L{layer}: " + " ".join(f"{x:.0%}" for x in later.sel(layer=layer).values) for layer in later.layer.values
        )
        table.add_row(arm, f"{float(credit.sel(part='own').sum()):.0%}", " · ".join(cells))
    console.print(table)


def text(axis):
    discounts = {f"h={h}": {"horizon": f"discount:{1 - 1 / h}", "cut": "hidden"} for h in DISCOUNTS}
    arms = {"vanilla": {}, "myopic": {"horizon": "myopic", "cut": "hidden"}, **discounts}
    seeds = (0, 1)
    folders = train_arms("text", TEXT, arms, seeds)
    gaps = print_gaps("language model from scratch on the embedded text: nats per token", folders, seeds)
    console.print(
        "published for natural language, not run here: GPT-2 124M 3.28 vanilla, 3.40 myopic; gaps of Pythia 14M to "
        "2.8B 0.16 0.11 0.04 0.10 0.15 0.16 0.17 0.23 (arXiv 2404.00859)"
    )
    horizons = [1, *DISCOUNTS]
    gap, error = gaps.gap.values[1:], gaps.gap_error.values[1:]
    axis.errorbar(horizons, gap, error, marker="o", capsize=3, color="#1c5f9e")
    axis.axhline(0, color="#7a828c", linewidth=0.8)
    axis.set(xscale="log", xlabel="horizon h (discount rate 1 - 1/h)", ylabel="myopia gap, nats per token")
    axis.set_xticks(horizons, [str(h) for h in horizons])
    axis.minorticks_off()
    axis.set_title("text: what a horizon costs")


def plot_by_position(axis, gaps, title):
    """Draw the gap of every arm by position."""
    for arm, colour in zip(gaps.arm.values[1:], ("#c25a00", "#8a3f8f"), strict=False):
        row = gaps.sel(arm=arm)
        gap, error = row.gap_by_position, row.gap_by_position_error
        axis.plot(gaps.position, gap, color=colour, label=str(arm))
        axis.fill_between(gaps.position, gap - error, gap + error, color=colour, alpha=0.2, linewidth=0)
    axis.axhline(0, color="#7a828c", linewidth=0.8)
    axis.set(xlabel="position", ylabel="myopia gap")
    axis.set_title(title)
    axis.legend(frameon=False)


def main():
    parts = {"sines": sines, "induction": induction, "text": text}
    names = sys.argv[1:] or list(parts)
    figure, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 3.6), layout="constrained", squeeze=False)
    started = time.perf_counter()
    for name, axis in zip(names, axes[0], strict=True):
        parts[name](axis)
    console.print(f"{(time.perf_counter() - started) / 60:.0f} minutes, without what had been finished before")
    if names == list(parts):
        figure.savefig(ROOT / "docs" / "reproduce.png", dpi=120)


if __name__ == "__main__":
    main()
