"""The commands that make models: train, compare, fold. `cli.py` holds the others, and the way in."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from posterity.cli.exit_codes import rank
from posterity.cli.options import (
    Device,
    Dtype,
    Field,
    Model,
    Output,
    Page,
    Revision,
    Seed,
    SkipBroken,
    Texts,
    Trust,
    assigned,
    given,
    numbers,
)
from posterity.cli.outputs import alone, check_writable, provenance, real_path, told_of
from posterity.errors import InputError, one_line


def train(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; an interrupted one goes on.")],
    model: Annotated[
        str | None,
        typer.Option(help="Type of transformers, from scratch; or folder or hub id, to go on from.  [default: llama]"),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="sines, induction, text, or files and datasets as for measure; may be repeated."),
    ] = None,
    horizon: Annotated[
        str | None, typer.Option(help="full, myopic, discount:RATE, window:LAGS or leak:FRACTION.  [default: full]")
    ] = None,
    cut: Annotated[Literal["kv", "hidden"] | None, typer.Option(help="Where it cuts.  [default: kv]")] = None,
    streams: Annotated[str | None, typer.Option(help="key, value or key,value.  [default: key,value]")] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Layers that it cuts; all unless given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.  [default: 1000]")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of one step.  [default: 16]")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of a row of text.  [default: 128]")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate.  [default: 0.001]")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps of warm-up.  [default: 50]")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of a model from scratch.  [default: 128]")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Of a model from scratch.  [default: 4]")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Of a model from scratch.  [default: 4]")] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="Number of a built-in task; may be repeated.")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints; a fifth of the run unless given.")
    ] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="Checkpoints to keep, the last ones.  [default: 2]")] = None,
    monitor: Annotated[
        int | None,
        typer.Option(
            "--monitor-every", min=1, help="Measure held-out rows every so many steps: monitor.nc, monitor.html."
        ),
    ] = None,
    seed: Seed = None,
    skip_broken: SkipBroken = False,
) -> None:
    """Train under a horizon.

    Runs that differ only in --horizon start from the same weights and see the same batches; `compare` then shows what
    the horizon costs.
    """
    from posterity.training import run as runs

    settings = runs.Settings(
        **given(
            model=model, data=None if data is None else tuple(data), horizon=horizon, cut=cut, steps=steps, batch=batch,
            streams=None if streams is None else tuple(one.strip() for one in streams.split(",")),
            layers=numbers(layers, "layers", "0,1,-1"), context=context, rate=rate, warmup=warmup, width=width,
            depth=depth, heads=heads, seed=seed, task=assigned(task), skip_broken=skip_broken or None,
        )
    )  # fmt: skip
    folder = runs.train(output, settings, monitor=monitor, **given(save_every=save_every, keep=keep))
    if rank() == "0":
        typer.echo(one_line(f"trained: {folder}"))


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of finished runs of `train`.")],
    output: Output = None,
    report: Page = None,
) -> None:
    """Show what horizons cost.

    Prints the held-out loss of every run and its gap to the plain run (horizon full) of the same seed.
    """
    import posterity

    check_writable(output, report, reads=folders)
    compared = posterity.compare(folders)
    if output is not None:
        posterity.save(compared, output)
    if report is not None:
        posterity.report(compared, report)
    posterity.summary(compared)


def fold(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the folded model.")],
    model: Model = None,
    text: Texts = None,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Nats per token that the loss may grow.  [default: 0.01]")
    ] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in a window.  [default: 128]")] = None,
    documents: Annotated[
        int | None,
        typer.Option(min=1, help="Windows on which every head is tried; four times as many judge.  [default: 4]"),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Heads tried in one pass.  [default: 8]")] = None,
    field: Field = "text",
    skip_broken: SkipBroken = False,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Let heads look only at themselves.

    Finds the heads for which that costs least, folds as many as the budget allows, and writes the model with the list
    of its folded heads, which `measure` and the other commands then run folded.
    """
    alone()
    import posterity
    from posterity.inputs import folded_folder as folded
    from posterity.inputs import model as loading
    from posterity.inputs import text_sources as sources

    if model is not None and real_path(output) == real_path(model):
        raise InputError(f"cannot write {output}: it is read here; choose another folder for the output")
    folded.checked_folder(output)
    skipped = sources.Skipped() if skip_broken else None
    loaded = loading.load_model(model, dtype, device, revision, trust_remote_code)
    found = posterity.fold(
        loaded.model, loaded.tokenizer, sources.documents(text or [], field, skipped),
        **given(budget=budget, context=context, limit=documents, batch=batch),
    )  # fmt: skip
    known = {**found.record(), **provenance(loaded), **told_of(skipped)}
    folded.save_folded(loaded.model, loaded.tokenizer, found.by_layer, output, known)
    typer.echo(str(found))
    again = loading.load_model(str(output), dtype, device)
    typer.echo(one_line(f"written and loaded again: {output}, loss {found.verify(again.model):.4f} as measured"))
