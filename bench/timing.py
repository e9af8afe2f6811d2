"""What all tables of the benchmark share: seconds, peak memory, processes of their own, the default model."""

import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from posterity.inputs.documents import default_text
from posterity.inputs.model import load_model
from posterity.inputs.windows import cut_windows

ROUNDS = 5
ENTRY = Path(__file__).with_name("bench.py")
console = Console(width=130)


def default_window(context):
    """The default model and one window of the default text, (1, context)."""
    loaded = load_model(None)
    return loaded.model, cut_windows([default_text()], loaded.tokenizer, context, 1)[0].ids[None]


def seconds(step, *args):
    started = time.perf_counter()
    step(*args)
    return time.perf_counter() - started


def median_ratio(times, base_times):
    """Median over the rounds of the ratio within a round; the first round warms up."""
    return statistics.median(time / base for time, base in zip(times[1:], base_times[1:], strict=True))


def peak_memory():
    """Peak memory of this process. A child's ru_maxrss begins at its parent's, so Linux is asked another way."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def run_alone(measurement, *arguments):
    """Run one of bench.py's MEASUREMENTS in a process of its own; None where it ran out of memory."""
    command = [sys.executable, str(ENTRY), measurement.__name__, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        if process.returncode == -9 or "allocate" in process.stderr:
            return None
        raise SystemExit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def processor():
    """Name and number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
