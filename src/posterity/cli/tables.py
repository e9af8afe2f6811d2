"""The command that writes the numbers of a run as a table for other programs. `main` registers it."""

from pathlib import Path
from typing import Annotated

import typer

import posterity
from posterity.atomic_files import check_output_path, write_atomically
from posterity.cli.options import ResultFile, drop_unset
from posterity.cli.outputs import check_outputs, require_one_process
from posterity.errors import InputError

FORMATS = {".csv": "csv", ".parquet": "parquet", ".tex": "latex"}  # by the suffix of a file


def table_command(
    run: ResultFile,
    kind: Annotated[
        str, typer.Option(help="shares, profile, sinks, losses, horizons, weights; audit; comparison.")
    ] = "shares",
    by: Annotated[
        str | None,
        typer.Option(
            metavar="PART,PART",
            help="Parts with rows of their own: layer; layer,head; '' for the whole.  [default: the finest there are]",
        ),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values; the default.")] = False,
    parquet: Annotated[bool, typer.Option("--parquet", help="Apache Parquet; needs --output.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="A tabular environment with the rules of booktabs.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write (.csv, .parquet, .tex); else it is printed.")
    ] = None,
) -> None:
    """Write numbers of a run as a table, one row for each.

    A row has a number, its standard error, its units and whether it is too weak to report, such as: posterity table
    run.nc --kind profile --by layer -o profile.csv
    """
    require_one_process()
    style = _choose_format({"csv": csv, "parquet": parquet, "latex": latex}, output)
    check_outputs(output, inputs=[run], output_kind=style)
    parts = None if by is None else tuple(part.strip() for part in by.split(",") if part.strip())
    frame = posterity.table(posterity.load(run), kind, **drop_unset(by=parts))
    if style == "parquet":
        content = frame.to_parquet(index=False)
    else:
        text = frame.to_csv(index=False) if style == "csv" else frame.to_latex(index=False, escape=True, na_rep="")
        content = text.encode()
    if output is None:
        typer.echo(content.decode(), nl=False)
    else:
        write_atomically(check_output_path(output), content)


def _choose_format(flags: dict[str, bool], output: Path | None) -> str:
    """Return the one format that was asked for, else that of the file's suffix, else csv."""
    chosen = [name for name, is_set in flags.items() if is_set]
    if len(chosen) > 1:
        raise InputError(f"expected one format; got --{' and --'.join(chosen)}")
    suffix = "" if output is None else output.suffix.lower()
    style = chosen[0] if chosen else FORMATS.get(suffix, "csv")
    if style == "parquet" and output is None:
        raise InputError("--parquet cannot be printed: add --output with a file, such as -o table.parquet")
    return style
