"""What the scripts of all peers share: inputs, clock, peak memory, results. They run in environments of their own.

python bench/peers/with_PEER.py MODEL_FOLDER IDS.npy OUTPUT.npz SECONDS [QUANTITY]
"""

import json
import resource
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

SAMPLE = 8  # losses that are timed where all of them would take too long
PASSES = 5  # after a first one that is not timed
AGAIN = 60  # seconds: no further pass after so many


def main(measure, *packages):
    """Run `measure(folder, model, ids, budget, *quantity)` and save its arrays, seconds and further numbers by name."""
    folder, ids, output, budget, *quantity = sys.argv[1:]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    ids = torch.from_numpy(np.load(ids))[None]
    loaded = peak()
    arrays, seconds, estimated, *numbers = measure(folder, model, ids, float(budget), *quantity)
    np.savez(output, **arrays)
    cell = {"seconds": seconds, "estimated": estimated, "peak": peak(), "loaded": loaded}
    cell["versions"] = {name: version(name) for name in (*packages, "torch", "transformers")}
    cell["threads"] = torch.get_num_threads()
    cell |= dict(*numbers)
    Path(output).with_suffix(".json").write_text(json.dumps(cell))


def peak():
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(work):
    """Result and median seconds of up to five passes after a first one, or of the first if that took long."""
    began, passes = time.perf_counter(), []
    while len(passes) <= PASSES:
        result = None  # the pass before is not held beside this one
        started = time.perf_counter()
        result = work()
        ended = time.perf_counter()
        passes.append(ended - started)
        if ended - began > AGAIN:
            break
    return result, statistics.median(passes[1:] or passes)


def split_losses(prepare, length, budget):
    """Own credit, whole credit and the rows of single losses, with one call of `gradients` per loss.

    `prepare()` returns the whole gradients [key of layer 0, value of layer 0, key of layer 1, ...], each (position,
    dim), and the function `gradients(t)`: the same of the loss read at position t alone, which may end at position t.
    """
    started = time.perf_counter()
    whole, gradients = prepare()
    preparation, losses = time.perf_counter() - started, length - 1
    sample = sorted({int((k + 0.5) * losses / SAMPLE) for k in range(SAMPLE)})
    started = time.perf_counter()
    rows = {t: credits(gradients(t), whole) for t in sample}
    seconds = (time.perf_counter() - started) / len(sample) * losses
    estimated = preparation + seconds > budget
    if not estimated:
        rest = [t for t in range(losses) if t not in rows]
        rows |= {t: credits(gradients(t), whole) for t in rest}
        seconds = time.perf_counter() - started
    positions = sorted(rows)
    by_loss = np.stack([rows[t] for t in positions])  # loss, layer and written, position
    by_loss = by_loss.reshape(len(positions), -1, 2, length)
    arrays = {
        "positions": np.array(positions),
        "rows": by_loss,  # loss, layer, written, position
        "own": np.stack([row[..., t] for t, row in zip(positions, by_loss, strict=True)], -1),
        "whole": credits(whole, whole).reshape(-1, 2, length)[..., positions],
    }
    return arrays, preparation + seconds, estimated


def credits(single, whole):
    """Inner products of one loss's gradients with the whole ones: (layer and written, position), 0 past the end."""
    length = len(whole[0])
    credit = np.zeros((len(whole), length), np.float32)
    for row, grad, whole_grad in zip(credit, single, whole, strict=True):
        row[: len(grad)] = (grad * whole_grad[: len(grad)]).sum(-1).numpy()
    return credit
