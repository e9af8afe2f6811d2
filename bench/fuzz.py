"""Hostile inputs without end: how many of each target were tried, taken and refused, and what broke the law.

    python bench/fuzz.py --seconds 60

Hypothesis makes the inputs of every target of tests/support/hostile.py. Where atheris is installed (it is no dependency), the
targets that take bytes are also fuzzed by coverage, each in a process of its own.
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


def by_hypothesis(name: str, seconds: float) -> tuple[int, int, list[str]]:
    """Inputs tried and taken, and failures, each in its smallest form."""
    from hypothesis import HealthCheck, given, settings
    from support.hostile import TARGETS

    use, inputs = TARGETS[name]
    tried, failures, end = [0, 0], [], time.monotonic() + seconds

    def law(one):
        tried[0] += 1
        tried[1] += bool(use(one))

    checks = [*HealthCheck]
    profile = settings(max_examples=20, deadline=None, database=None, suppress_health_check=checks)
    while time.monotonic() < end and not failures:
        try:
            profile(given(inputs)(law))()
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", []))
            failures.append(f"{type(error).__name__}: {error} {notes}"[:500])
    return *tried, failures


def by_coverage(name: str, seconds: float) -> None:
    """Fuzz one target in this process; libFuzzer ends it and prints what it did."""
    import atheris

    with atheris.instrument_imports(
        include=[
            "posterity.inputs.windows",
            "posterity.inputs.text_sources",
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
    asked = parser.parse_args()
    if asked.coverage:
        by_coverage(asked.coverage, asked.seconds)
        return
    warnings.simplefilter("ignore")
    from support.hostile import BYTES, TARGETS

    found = 0
    print("| target | way | tried | taken | failures |\n|---|---|---|---|---|")
    wanted = asked.target or list(TARGETS)
    for name in wanted:
        tried, taken, failures = by_hypothesis(name, asked.seconds)
        found += len(failures)
        print(f"| {name} | hypothesis | {tried:,} | {taken:,} | {len(failures)} |", flush=True)
        for failure in failures:
            print(f"  {failure}", file=sys.stderr)
    if importlib.util.find_spec("atheris"):
        for name in sorted(BYTES & set(wanted)):
            command = [sys.executable, __file__, "--coverage", name, "--seconds", str(asked.seconds)]
            done = subprocess.run(command, capture_output=True, text=True)
            runs = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("Done ")]
            found += done.returncode != 0
            print(
                f"| {name} | coverage | {int(runs[0]) if runs else 0:,} | | {int(done.returncode != 0)} |", flush=True
            )
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
