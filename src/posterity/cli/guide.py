"""What each command is for: the question that it answers and an example, in the order of use."""

import inspect
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Purpose:
    """The question that a command answers, which the list of commands shows, and examples for its own help."""

    question: str
    examples: tuple[str, ...]


GUIDE = {
    "check": Purpose(
        "Can a model be measured, and what does that take?",
        ("posterity check gpt2", "posterity check gpt2 --context 1024 --limit 64"),
    ),
    "measure": Purpose(
        "Which readers, how far off, does the gradient of keys and values come from?",
        (
            "posterity measure gpt2 my.txt -o run.nc -r run.html",
            "posterity measure gpt2 my.txt --losses -o paid.nc",
            "posterity measure",
        ),
    ),
    "summary": Purpose("The table of a run, again.", ("posterity summary run.nc",)),
    "reach": Purpose("How long a window does each layer need?", ("posterity reach run.nc",)),
    "table": Purpose("The numbers of a run, for a spreadsheet.", ("posterity table run.nc",)),
    "report": Purpose(
        "A page of one or several runs, side by side.", ("posterity report before.nc after.nc -o both.html",)
    ),
    "inspect": Purpose(
        "Which loss pays for the key and value of which token, in a short text?",
        ('posterity inspect gpt2 --text "The cat sat on the mat." -r cat.html',),
    ),
    "audit": Purpose(
        "Does what is commonly said of keys and values hold on this model?",
        ("posterity audit gpt2 my.txt --quick -r audit.html",),
    ),
    "train": Purpose(
        "What does a model learn if later losses pay less, or nothing?",
        ("posterity train -o runs/full", "posterity train -o runs/myopic --horizon myopic"),
    ),
    "compare": Purpose("What did that cost, by position?", ("posterity compare runs/full runs/myopic -r gap.html",)),
    "fold": Purpose(
        "Which heads can be replaced by a linear map?", ("posterity fold gpt2 my.txt --budget 0.01 -o folded",)
    ),
    "windows": Purpose(
        "Which layers may look back less far, and what does that cost?",
        (
            "posterity windows gpt2 my.txt --local 1/2 --verify",
            "posterity windows gpt2 my.txt --local 1/2 --window 128 -o local",
            "posterity windows run.nc --local 0.75",
        ),
    ),
    "prices": Purpose(
        "Which cached keys and values will the future need?",
        ("posterity prices gpt2 my.txt -o prices", "posterity prices gpt2 my.txt --limit 64 -o prices --resume"),
    ),
    "evict": Purpose(
        "What does it cost to drop cached keys and values, by which score?",
        (
            "posterity evict gpt2 other.txt --prices prices --keep 1/4,1/10 -r evict.html",
            "posterity evict gpt2 --task retrieval --prices prices",
        ),
    ),
    "score": Purpose(
        "Which documents of a corpus train keys and values for far-away readers?",
        (
            "posterity score gpt2 corpus.jsonl -o scores.parquet",
            "posterity score gpt2 a.txt --beyond 256 -o scores.csv",
        ),
    ),
    "features": Purpose(
        "Which losses train the residual stream, and a probe or feature in it?",
        (
            "posterity features gpt2 my.txt -r features.html",
            "posterity features gpt2 my.txt --directions probes.safetensors --influence",
            "posterity features gpt2 my.txt --layers 4,8 --positions 0:64",
        ),
    ),
    "explain": Purpose("Why was this refused?", ("posterity explain", "posterity explain other-paths")),
}


def explain_commands(commands: list[Any]) -> None:
    """Give typer's registered commands their questions and examples, and put them in the order of use."""
    order = list(GUIDE)
    commands.sort(key=lambda command: order.index(command.name) if command.name in order else len(order))
    for command in commands:
        if (purpose := GUIDE.get(command.name)) is not None:
            command.short_help = purpose.question
            examples = "\n".join(f"  {example}" for example in purpose.examples)
            # \b: click leaves the lines of this paragraph as they are
            command.help = f"{purpose.question}\n\n{inspect.getdoc(command.callback)}\n\n\b\nExample:\n{examples}"
