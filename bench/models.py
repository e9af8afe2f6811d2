"""`make models`: docs/models.md, what Posterity does with every causal language model type of transformers.

Builds a tiny random model of each type and compares it with its own eager path by tests/support/verification.py, in 3
minutes.
"""

import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from rich.progress import track

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.families import TYPES  # noqa: E402
from support.verification import LENGTH, TOLERANCE, row, verify  # noqa: E402

TEMPLATE = Path(__file__).with_suffix(".md")


def page(verdicts):
    """The page: its template with the counts, and a row for every type."""
    registered = [verdict.kind for verdict in verdicts.values() if verdict.uses_interface]
    kinds = Counter(registered)
    measured = kinds["exact"] + kinds["ledger only"]
    numbers = {
        "length": LENGTH,
        "tolerance": f"{TOLERANCE:.0e}".replace("e-0", "e-"),
        "count": len(verdicts),
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "hook": len(registered),
        "exact": kinds["exact"],
        "ledger": kinds["ledger only"],
        "share": f"{100 * measured / len(registered):.1f}",
        "rest": f"{kinds['refused']} refused, {kinds['not built']} not built",
    }
    return TEMPLATE.read_text().format(**numbers) + "".join(
        f"{row(name, verdict)}\n" for name, verdict in verdicts.items()
    )


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    verdicts = {name: verify(name) for name in track(TYPES, "verifying")}
    wrong = [row(name, verdict) for name, verdict in verdicts.items() if verdict.kind == "wrong"]
    if wrong:
        raise SystemExit("\n".join(wrong))
    (ROOT / "docs" / "models.md").write_text(page(verdicts))


if __name__ == "__main__":
    main()
