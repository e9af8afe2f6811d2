"""Options and arguments that several commands share, and the parsing of their text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from posterity.errors import InputError

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Hub id, folder or .gguf file; 'default' or nothing: SmolLM2-135M-Instruct."),
]
Texts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TEXT",
        help="Text files, '-', .jsonl, .json, .csv, .tsv, dataset names (name:config:split); nothing: default text.",
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 (bf16), float16 (fp16) or float64; as stored unless given.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda:1, ..., or auto: over all devices; CUDA where there is one unless given.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's own Python code run.")]
Field = Annotated[
    str | None,
    typer.Option(
        help="Field of JSON objects, tables and dataset rows that holds the text.  [default: text; without it measure "
        "reads messages, or prompt and completion, with the loss on the answers only]"
    ),
]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Leave out broken lines of .jsonl, .csv and .tsv files, and say how many.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the random numbers.  [default: 0]")]
Context = Annotated[int | None, typer.Option(min=2, help="Tokens in a window.  [default: 512]")]
Limit = Annotated[  # --documents is its older name
    int | None, typer.Option("--limit", "--documents", min=1, help="Windows to measure, at most.  [default: 16]")
]
OutputFile = Annotated[Path | None, typer.Option("--output", "-o", help="Result file to write (.nc, netCDF).")]
ReportPage = Annotated[Path | None, typer.Option("--report", "-r", help="Report page to write (.html).")]
Horizons = Annotated[
    str | None,
    typer.Option(metavar="H,H,...", help="Horizon curve at these horizons, such as 1,2,4,8,16,32,64,128,256."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with this command where it was interrupted; needs --output.")
]
ResultFile = Annotated[Path, typer.Argument(metavar="RUN", help="Result file that measure --output wrote.")]


def drop_unset(**options: Any) -> dict[str, Any]:
    """Return the options that the user has set: the defaults of the others are those of the library's functions."""
    return {name: value for name, value in options.items() if value is not None}


def parse_integers(text: str | None, option: str = "horizons", example: str = "1,2,4,8") -> tuple[int, ...] | None:
    """Parse whole numbers with commas; None stays None."""
    if text is None:
        return None
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"--{option} expects whole numbers with commas, such as {example}; got {text!r}") from None


def parse_assignments(pairs: list[str] | None) -> dict[str, float] | None:
    """Parse NAME=NUMBER into numbers by name; whole ones stay whole, and no pair gives None."""
    numbers: dict[str, float] = {}
    for pair in pairs or ():
        name, _, number = pair.partition("=")
        try:
            numbers[name.strip()] = int(number) if number.strip().lstrip("-").isdecimal() else float(number)
        except ValueError:
            raise InputError(f"--task expects NAME=NUMBER, such as chance=0.1; got {pair!r}") from None
    return numbers or None
