"""The commands that make models, and what compares them: train, compare, fold. `main` registers them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

import posterity
from posterity.cli.exit_codes import process_rank
from posterity.cli.options import (
    Device,
    Dtype,
    Field,
    Model,
    OutputFile,
    ReportPage,
    Revision,
    Seed,
    SkipBroken,
    Texts,
    TrustRemoteCode,
    drop_unset,
    parse_assignments,
    parse_integers,
)
from posterity.cli.outputs import (
    check_outputs,
    print_skipped_lines,
    real_path,
    require_one_process,
    run_attrs,
    write_outputs,
)
from posterity.errors import InputError, one_line


def train_command(
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
    field: Annotated[
        str | None, typer.Option(help="Field of rows of text that holds the text.  [default: text]")
    ] = None,
    skip_broken: SkipBroken = False,
) -> None:
    """Train under a horizon.

    Runs that differ only in --horizon start from the same weights and see the same batches; `compare` then shows what
    the horizon costs.
    """
    from posterity.training.run import final_loss, next_command, train
    from posterity.training.settings import Settings

    settings = Settings(
        **drop_unset(
            model=model, data=None if data is None else tuple(data), horizon=horizon, cut=cut, steps=steps, batch=batch,
            streams=None if streams is None else tuple(stream.strip() for stream in streams.split(",")),
            layers=parse_integers(layers, "layers", "0,1,-1"), context=context, rate=rate, warmup=warmup, width=width,
            depth=depth, heads=heads, seed=seed, task=parse_assignments(task), skip_broken=skip_broken or None,
            field=field,
        )
    )  # fmt: skip
    folder = train(output, settings, monitor=monitor, **drop_unset(save_every=save_every, keep=keep))
    if process_rank() == "0":
        typer.echo(one_line(f"trained: {folder}, {final_loss(folder, settings)}"))
        typer.echo(one_line(f"next: {next_command(folder, settings)}"))


def compare_command(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of finished runs of `train`.")],
    output: OutputFile = None,
    report: ReportPage = None,
) -> None:
    """Show what horizons cost.

    Prints the held-out loss of every run and its gap to the plain run (horizon full) of the same seed.
    """
    check_outputs(output, report, inputs=folders)
    write_outputs(posterity.compare(folders), output, report)


def fold_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the folded model.")],
    model: Model = None,
    text: Texts = None,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Nats per token that the loss may grow.  [default: 0.01]")
    ] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in a window.  [default: 128]")] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            "--documents",
            min=1,
            help="Windows on which every head is priced; four times as many judge.  [default: 4]",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write the model even if the loss on held-out windows exceeds the budget.")
    ] = False,
    field: Field = None,
    skip_broken: SkipBroken = False,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Let heads look only at themselves.

    Finds the heads for which that costs least by their prices, folds as many as the budget allows, and writes the model
    with the list of its folded heads, which `measure` and the other commands then run folded. Where that costs more
    than the budget on held-out windows, nothing is written and the exit code is 1, unless --force is given.
    """
    require_one_process()
    from posterity.inputs.limits_folder import check_folder, save_folded
    from posterity.inputs.model import load_model
    from posterity.inputs.text_sources import SkippedLines, open_documents

    if model is not None and real_path(output) == real_path(model):
        raise InputError(f"cannot write {output}: it is read here; choose another folder for the output")
    check_folder(output)
    skipped = SkippedLines() if skip_broken else None
    loaded = load_model(model, dtype, device, revision, trust_remote_code)
    result = posterity.fold(
        loaded.model, loaded.tokenizer, open_documents(text or [], field, skipped),
        **drop_unset(budget=budget, context=context, limit=limit, seed=seed),
    )  # fmt: skip
    attrs = {**result.record(), **run_attrs(loaded), **print_skipped_lines(skipped)}
    typer.echo(str(result))
    if result.exceeds_budget and not force:
        cost = f"{result.held_out.change:+.4f} nats per token on held-out windows, budget {result.budget:g}"
        refusal = f"posterity: {output} is not written: {cost}; add --force to write it all the same"
        typer.echo(one_line(refusal), err=True)
        raise typer.Exit(1)
    save_folded(loaded.model, loaded.tokenizer, result.by_layer, output, attrs)
    folded = load_model(str(output), dtype, device)
    typer.echo(one_line(f"written and loaded again: {output}, loss {result.verify(folded.model):.4f} as measured"))
