"""`make audit`: the tables of docs/audit.md, from audits of the default model.

python bench/audit.py            the audit with its defaults, and a quick one beside random weights (25 minutes)
python bench/audit.py FILE ...   the tables of saved audits
"""

import subprocess
import sys
from pathlib import Path

import posterity
from posterity.reporting.audit_table import figure_rows

FOLDER = Path(__file__).parent.parent / "audits"
RUNS = {"default": [], "control": ["--quick", "--control", "random"]}


def run_audits():
    """Run the audits of `RUNS`; return their files."""
    FOLDER.mkdir(exist_ok=True)
    for name, options in RUNS.items():
        files = ["-o", str(FOLDER / f"{name}.nc"), "-r", str(FOLDER / f"{name}.html")]
        subprocess.run([sys.executable, "-m", "posterity", "audit", *options, *files], check=True)
    return [FOLDER / f"{name}.nc" for name in RUNS]


def markdown_table(audit):
    """Yield a Markdown table: a line for every clause with its verdicts, then one for each of its figures."""
    models = [str(model) for model in audit.model.values]
    yield "| | " + " | ".join(models) + " | expected |"
    yield "|---" * (len(models) + 2) + "|"
    for column, number in enumerate(audit.clause.values):
        verdicts = " | ".join(f"**{verdict}**" for verdict in audit.verdict.values[:, column])
        yield f"| **{number} · {audit.name.values[column]}** | {verdicts} | |"
        for row in figure_rows(audit, int(number)):
            name = row.name + (f", {row.units}" if row.units else "")
            yield f"| {name.replace('|', '∣')} | {' | '.join(row.values)} | {row.baseline} |"


def main():
    """Print the tables of the files named on the command line, or of new audits."""
    for file in sys.argv[1:] or run_audits():
        print(f"\n{file}\n", *markdown_table(posterity.load(file)), sep="\n")


if __name__ == "__main__":
    main()
