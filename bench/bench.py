"""`make bench`: the tables of docs/cost.md. Time as ratios of medians taken in turns; memory in a process each.

python bench/bench.py            all of it (about 40 minutes on two cores)
python bench/bench.py steps      ratio to a plain training step on SmolLM2-135M
python bench/bench.py losses     own and later losses, the horizon curve, and one backward pass per position
python bench/bench.py naive      the same lag profile with eager attention and everything kept
python bench/bench.py long       a two-layer model at long contexts
python bench/bench.py sweep      the accounts of one layer beside torch's fused attention of the same layer
python bench/bench.py context    memory on SmolLM2-135M up to 8192 tokens, beside what was estimated (12 GB)
python bench/bench.py precision  bfloat16, float16 and autocast beside float32, on SmolLM2-135M
python bench/bench.py monitor    training with a Monitor at its default
python bench/bench.py trends     what it logs over three trainings from scratch
"""

import json
import os
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded, as the command line does

import torch
from contexts import context, default_model_context, long, two_layers, two_layers_losses, two_layers_sliding
from eager_profile import lag_profile, naive
from layer_sweep import sweep
from monitoring import monitor
from precisions import measured_precision, precision
from step_kinds import losses, step_peak, steps
from timing import ROUNDS, console
from trends import trends

TABLES = {table.__name__: table for table in (steps, losses, naive, long, sweep, context, precision, monitor, trends)}
MEASUREMENTS = {  # each in a process of its own
    measurement.__name__: measurement
    for measurement in (
        step_peak,
        lag_profile,
        two_layers,
        two_layers_losses,
        two_layers_sliding,
        default_model_context,
        measured_precision,
    )
}


def main():
    torch.manual_seed(0)
    names = sys.argv[1:]
    if names and names[0] in MEASUREMENTS:
        print(json.dumps(MEASUREMENTS[names[0]](*names[1:])))
        return
    unknown = set(names) - set(TABLES)
    if unknown:
        raise SystemExit(f"expected any of {', '.join(TABLES)}; got {', '.join(sorted(unknown))}")
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {ROUNDS} rounds in turns")
    for name in names or TABLES:
        TABLES[name]()


if __name__ == "__main__":
    main()
