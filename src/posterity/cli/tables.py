"""The commands that print and write tables of a run: reach, and table for other programs. `main` registers them."""

from pathlib import Path
from typing import Annotated, Any

import typer

import posterity
from posterity.atomic_files import check_output_path, write_atomically
from posterity.cli.options import (
    Device,
    Dtype,
    Field,
    Model,
    ResultFile,
    Resume,
    Revision,
    Seed,
    SkipBroken,
    Texts,
    TrustRemoteCode,
    drop_unset,
    parse_integers,
)
from posterity.cli.outputs import ResumableRun, check_outputs, print_skipped_lines, require_one_process
from posterity.errors import InputError, one_line

FORMATS = {".csv": "csv", ".parquet": "parquet", ".tex": "latex"}  # by the suffix of a file


def table_command(
    run: ResultFile,
    kind: Annotated[
        str,
        typer.Option(
            help="shares, profile, reach, sinks, losses, horizons, weights, prices, windows; audit; comparison; "
            "eviction; features."
        ),
    ] = "shares",
    by: Annotated[
        str | None,
        typer.Option(
            metavar="PART,PART",
            help="Parts with rows of their own: layer; layer,kv_head; layer,head; '' for the whole.  "
            "[default: the finest there are]",
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
    _check_suffix(output, style, is_chosen=csv or latex or parquet)
    parts = None if by is None else tuple(part.strip() for part in by.split(",") if part.strip())
    _write_table(posterity.table(posterity.load(run), kind, **drop_unset(by=parts)), style, output)


def score_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write: .parquet or .csv.")],
    model: Model = None,
    text: Texts = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a document that are measured together, at most.  [default: 32768]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents.  [default: all]")] = None,
    beyond: Annotated[
        str | None, typer.Option(metavar="TOKENS,...", help="Distances, powers of two.  [default: 1024,4096,16384]")
    ] = None,
    losses: Annotated[
        bool | None,
        typer.Option(
            "--losses/--no-losses",
            help="By the distance of the losses too: a backward pass for each.  [default: losses]",
        ),
    ] = None,
    field: Field = None,
    skip_broken: SkipBroken = False,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
    resume: Resume = False,
) -> None:
    """Score every document of a corpus by how far away its keys and values are used.

    Writes a row for each document: the share of the gradient of its keys and values that arrives over edges of so many
    tokens and more, and from losses so far away. An interrupted run goes on with --resume.
    """
    require_one_process()
    from posterity.inputs.model import load_model
    from posterity.inputs.text_sources import SkippedLines, open_documents

    style = _choose_format({}, output)
    check_outputs(output, inputs=[model or "", *(text or [])], output_kind=style)
    _check_suffix(output, style, is_chosen=False)
    run = ResumableRun.open(output, resume)
    skipped = SkippedLines() if skip_broken else None
    distances = parse_integers(beyond, "beyond", "1024,4096")
    loaded = load_model(model, dtype, device, revision, trust_remote_code)
    frame = posterity.score(
        loaded, None, open_documents(text or [], field, skipped), state=run.folder,
        **drop_unset(context=context, limit=limit, beyond=distances, losses=losses, seed=seed),
    )  # fmt: skip
    print_skipped_lines(skipped)
    _write_table(frame, style, output)
    run.remove_state()
    typer.echo(one_line(f"written: {output}, {len(frame)} documents"))


def _write_table(frame: Any, style: str, output: Path | None) -> None:
    """Write a table, whole or not at all, or print it."""
    if style == "parquet":
        content = frame.to_parquet(index=False)
    else:
        text = frame.to_csv(index=False) if style == "csv" else frame.to_latex(index=False, escape=True, na_rep="")
        content = text.encode()
    if output is None:
        typer.echo(content.decode(), nl=False)
    else:
        write_atomically(check_output_path(output), content)


def reach_command(
    run: ResultFile,
    level: Annotated[
        float | None, typer.Option(help="The share that lies within a lag, between 0 and 1.  [default: 0.95]")
    ] = None,
) -> None:
    """Print how far back each layer and key/value head reaches: which window it needs.

    The lags within which most of its attention, mass and credit lie, without the first positions, and what these
    positions and a window hold together.
    """
    require_one_process()
    from posterity.reporting.reach_table import print_reach

    print_reach(posterity.load(run), **drop_unset(level=level))


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


def _check_suffix(output: Path | None, style: str, is_chosen: bool) -> None:
    """Raise InputError for a file whose suffix is that of another format, or of none without an option that says it."""
    suffix = "" if output is None else output.suffix.lower()
    if suffix and suffix not in FORMATS and not is_chosen:
        raise InputError(f"expected a table that ends in {', '.join(FORMATS)}; got {output}: name it so, or add --csv")
    if FORMATS.get(suffix, style) != style:
        raise InputError(f"expected a file for --{style}; {output} ends as a table of another format: rename it")
