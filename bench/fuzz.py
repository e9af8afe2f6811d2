"""Fuzz the readers and the command line: how many inputs of each target were tried and taken, and what broke the law.

    python bench/fuzz.py --seconds 60

Hypothesis makes the inputs of every target of tests/support/hostile.py. Where atheris is installed (it is no
dependency), the targets that take bytes are also fuzzed by coverage, each in a process of its own.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"  # names that are no file are looked for on the hub, again and again


def fuzz_by_hypothesis(name: str, seconds: float) -> tuple[int, int, list[str]]:
    """Return how many inputs were tried and taken, and the failures, each in its smallest form."""
    from hypothesis import HealthCheck, given, settings
    from support.hostile import TARGETS

    target, inputs = TARGETS[name]
    counts, failures, end = [0, 0], [], time.monotonic() + seconds

    def law(value):
        counts[0] += 1
        counts[1] += bool(target(value))

    profile = settings(max_examples=20, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    while time.monotonic() < end and not failures:
        try:
            profile(given(inputs)(law))()
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", []))
            failures.append(f"{type(error).__name__}: {error} {notes}"[:500])
    return *counts, failures


def fuzz_by_coverage(name: str, seconds: float) -> None:
    """Fuzz one target in this process; libFuzzer ends it and prints what it did."""
    import atheris

    with atheris.instrument_imports(
        include=[
            "posterity.inputs.windows",
            "posterity.inputs.text_sources",
            "posterity.inputs.text_files",
            "posterity.inputs.row_files",
            "posterity.inputs.documents",
            "posterity.results.netcdf",
            "posterity.inputs.model_files",
            "json",
        ]
    ):
        from support.hostile import TARGETS
    atheris.Setup([sys.argv[0], f"-max_total_time={int(seconds)}", "-rss_limit_mb=8000"], TARGETS[name][0])
    atheris.Fuzz()


def main() -> None:
    """Fuzz every target and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="for each target and each way")
    parser.add_argument("--target", action="append", help="only this one; may be repeated")
    parser.add_argument("--coverage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.coverage:
        fuzz_by_coverage(args.coverage, args.seconds)
        return
    warnings.simplefilter("ignore")
    from support.hostile import BYTES, TARGETS

    failure_count = 0
    print("| target | way | tried | taken | failures |\n|---|---|---|---|---|")
    names = args.target or list(TARGETS)
    for name in names:
        tried, taken, failures = fuzz_by_hypothesis(name, args.seconds)
        failure_count += len(failures)
        print(f"| {name} | hypothesis | {tried:,} | {taken:,} | {len(failures)} |", flush=True)
        for failure in failures:
            print(f"  {failure}", file=sys.stderr)
    if importlib.util.find_spec("atheris"):
        for name in sorted(BYTES & set(names)):
            command = [sys.executable, __file__, "--coverage", name, "--seconds", str(args.seconds)]
            process = subprocess.run(command, capture_output=True, text=True)
            runs = [line.split()[1] for line in process.stderr.splitlines() if line.startswith("Done ")]
            failures = int(process.returncode != 0)
            failure_count += failures
            print(f"| {name} | coverage | {int(runs[0]) if runs else 0:,} | | {failures} |", flush=True)
            if process.returncode:
                print(process.stderr[-2000:], file=sys.stderr)
    sys.exit(failure_count > 0)


if __name__ == "__main__":
    main()
