"""The command `features`: which losses train the residual stream, and given directions of it."""

from pathlib import Path
from typing import Annotated

import typer

import posterity
from posterity.cli.options import (
    Context,
    Device,
    Dtype,
    Field,
    Limit,
    Model,
    OutputFile,
    ReportPage,
    Resume,
    Revision,
    Seed,
    SkipBroken,
    Texts,
    TrustRemoteCode,
    drop_unset,
    parse_integers,
)
from posterity.cli.outputs import ResumableRun, check_outputs, require_one_process, run_attrs, write_outputs
from posterity.errors import InputError


def features_command(
    model: Model = None,
    text: Texts = None,
    directions: Annotated[
        Path | None,
        typer.Option(
            help="File (.safetensors) of directions: probes, decoder rows of a sparse autoencoder, a lens; tensors of "
            "width, or direction by width, named by their layer, such as layers.5."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Layers in front of which the stream is split, from 0.  [default: those of the directions, else all]",
        ),
    ] = None,
    positions: Annotated[
        str | None, typer.Option(metavar="N|N:N", help="A position, or the first and the one behind the last.  [all]")
    ] = None,
    influence: Annotated[
        bool | None,
        typer.Option(
            "--influence", help="What a step along each part does to each direction: a backward pass for each."
        ),
    ] = None,
    context: Context = None,
    limit: Limit = None,
    field: Field = None,
    skip_broken: SkipBroken = False,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
    resume: Resume = False,
    output: OutputFile = None,
    report: ReportPage = None,
) -> None:
    """Split what trains the residual stream by the losses that it comes from.

    In front of each layer the gradient of all parameters is split in its direct, pre-cached and shared parts. With
    --directions, what own and later losses want of each direction stands beside it.
    """
    require_one_process()
    from posterity.inputs.model import load_model
    from posterity.inputs.text_sources import SkippedLines, open_documents

    check_outputs(output, report, inputs=[model or "", *(text or ()), directions or ""])
    options = drop_unset(
        directions=directions, layers=parse_integers(layers, "layers", "5,10"), positions=_parse_positions(positions),
        influence=influence, context=context, limit=limit, seed=seed,
    )  # fmt: skip
    run = ResumableRun.open(output, resume)
    skipped = SkippedLines() if skip_broken else None
    loaded = load_model(model, dtype, device, revision, trust_remote_code)
    result = posterity.features(
        loaded, None, open_documents(text or [], field, skipped), state=run.folder,
        attrs={"command": run_attrs(loaded)["command"]}, **options,
    )  # fmt: skip
    write_outputs(result, output, report, skipped, run)


def _parse_positions(text: str | None) -> int | tuple[int, int] | None:
    """Return a position, or the first and the one behind the last."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) != 2:
        raise InputError(f"--positions expects a position such as 12, or a range such as 0:64; got {text}")
    return numbers[0], numbers[1]
