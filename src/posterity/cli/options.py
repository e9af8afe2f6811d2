"""Options and arguments that several commands share, and how their text is read."""

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
        metavar="TEXT", help="Files, '-', .jsonl files, dataset names (name:config:split); nothing: default text."
    ),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64; as stored unless given.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda:1, ..., or auto: over all devices; CUDA where there is one unless given.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's own Python code run.")]
Field = Annotated[str, typer.Option(help="Field of .jsonl lines and dataset rows that holds the text.")]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Leave out broken lines of .jsonl files, and say how many.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the random numbers.  [default: 0]")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Result file to write (netCDF).")]
Page = Annotated[Path | None, typer.Option("--report", "-r", help="Report page to write (HTML).")]
Horizons = Annotated[
    str | None,
    typer.Option(metavar="H,H,...", help="Horizon curve at these horizons, such as 1,2,4,8,16,32,64,128,256."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with this command where it was interrupted; needs --output.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Result file that measure --output wrote.")]


def given(**options: Any) -> dict[str, Any]:
    """Only what was given is passed on: the defaults are those of the library's functions."""
    return {name: value for name, value in options.items() if value is not None}


def numbers(text: str | None, option: str = "horizons", such: str = "1,2,4,8") -> tuple[int, ...] | None:
    """Whole numbers from text with commas."""
    if text is None:
        return None
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError:
        raise InputError(f"--{option} expects whole numbers with commas, such as {such}; got {text!r}") from None


def assigned(pairs: list[str] | None) -> dict[str, float] | None:
    """Numbers by name from NAME=NUMBER; whole ones stay whole."""
    found: dict[str, float] = {}
    for one in pairs or ():
        name, _, number = one.partition("=")
        try:
            found[name.strip()] = int(number) if number.strip().lstrip("-").isdecimal() else float(number)
        except ValueError:
            raise InputError(f"--task expects NAME=NUMBER, such as chance=0.1; got {one!r}") from None
    return found or None
