"""`make audit`: the tables of docs/audit.md, from audits of the default model.

python bench/audit.py            the audit with its defaults, and a quick one beside random weights (25 minutes)
python bench/audit.py FILE ...   the tables of saved audits
"""

import subprocess
import sys
from pathlib import Path

import posterity
from posterity.reporting.audit_table import rows

FOLDER = Path(__file__).parent.parent / "audits"
RUNS = {"default": [], "control": ["--quick", "--control", "random"]}


def run():
    FOLDER.mkdir(exist_ok=True)
    for name, options in RUNS.items():
        files = ["-o", str(FOLDER / f"{name}.nc"), "-r", str(FOLDER / f"{name}.html")]
        subprocess.run([sys.executable, "-m", "posterity", "audit", *options, *files], check=True)
    return [FOLDER / f"{name}.nc" for name in RUNS]


def table(audit):
    """Markdown: a line for every clause with its verdicts, then one for each of its figures."""
    models = [str(one) for one in audit.model.values]
    yield "| | " + " | ".join(models) + " | expected |"
    yield "|---" * (len(models) + 2) + "|"
    for at, number in enumerate(audit.clause.values):
        verdicts = " | ".join(f"**{one}**" for one in audit.verdict.values[:, at])
        yield f"| **{number} · {audit.name.values[at]}** | {verdicts} | |"
        for row in rows(audit, int(number)):
            name = row.name + (f", {row.units}" if row.units else "")
            yield f"| {name.replace('|', '∣')} | {' | '.join(row.values)} | {row.baseline} |"


def main():
    for file in sys.argv[1:] or run():
        print(f"\n{file}\n", *table(posterity.load(file)), sep="\n")


if __name__ == "__main__":
    main()
