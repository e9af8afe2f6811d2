"""The command `windows`: which layers may look back less far. `main` registers it."""

from pathlib import Path
from typing import Annotated

import typer

import posterity
from posterity.cli.options import (
    Device,
    Dtype,
    Field,
    Revision,
    Seed,
    SkipBroken,
    Texts,
    TrustRemoteCode,
    drop_unset,
)
from posterity.cli.outputs import print_skipped_lines, real_path, require_one_process, run_attrs
from posterity.errors import InputError, one_line


def windows_command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Hub id, folder or .gguf file; 'default' or nothing: SmolLM2-135M-Instruct; or a result file (.nc) "
            "that measure --prices wrote, for the table and the proposal alone.",
        ),
    ] = None,
    text: Texts = None,
    local: Annotated[
        str | None,
        typer.Option(metavar="SHARE|N", help="Layers that may be local: a share of all (1/2, 0.5), or a number (12)."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that they see, a power of two; the smallest within the budget unless given."),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Nats per token that they may cost by their prices.  [default: 0.01]")
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option("--verify", help="Try it on held-out windows, beside as many layers chosen without prices."),
    ] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in a window of text.  [default: 512]")] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", "--documents", min=1, help="Windows of text that are priced; as many judge.  [default: 16]"
        ),
    ] = None,
    prices: Annotated[
        str | None, typer.Option(metavar="samples|text", help="Whose losses make prices.  [default: samples]")
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(
            min=0, help="First keys that local layers keep; sliding_window in a config keeps none.  [default: 0]"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write the model with the local layers to.")
    ] = None,
    field: Field = None,
    skip_broken: SkipBroken = False,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find layers that may look back less far.

    Prints what every window costs every layer, in nats per token. With --local it proposes the layers that cost least,
    with --verify it tries them, and with --output it writes the model: with layer_types and sliding_window in its
    config where the architecture has them, else with a list that the commands of posterity run. Where no window is
    within the budget, nothing is written and the exit code is 1.
    """
    require_one_process()
    from posterity.reporting.window_table import print_windows
    from posterity.results.window_plan import plan_windows

    choice = drop_unset(local=local, window=window, budget=budget)
    if model is not None and model.lower().endswith(".nc"):
        others = {
            "TEXT": text, "--verify": verify, "--context": context, "--limit": limit, "--prices": prices,
            "--sinks": sinks, "--output": output,
        }  # fmt: skip
        if extra := ", ".join(name for name, value in others.items() if value is not None):
            raise InputError(f"expected a model with {extra}; {model} is a result: it has its prices, and no weights")
        print_windows(plan_windows(posterity.load(model), **choice))
        return
    from posterity.inputs.limits_folder import check_folder
    from posterity.inputs.model import load_model
    from posterity.inputs.text_sources import SkippedLines, open_documents
    from posterity.measurement.local_layers import save_model

    if output is not None:
        _check_output(output, model, local, sinks)
        check_folder(output)
    skipped = SkippedLines() if skip_broken else None
    loaded = load_model(model, dtype, device, revision, trust_remote_code)
    plan = posterity.windows(
        loaded, None, open_documents(text or [], field, skipped),
        **choice, **drop_unset(verify=verify, context=context, limit=limit, prices=prices, sinks=sinks, seed=seed),
    )  # fmt: skip
    attrs = {**run_attrs(loaded), **print_skipped_lines(skipped)}
    print_windows(plan)
    if output is None:
        return
    if plan.proposal is None:
        typer.echo(one_line(f"posterity: {output} is not written: no window is within the budget"), err=True)
        raise typer.Exit(1)
    in_config = save_model(loaded.model, loaded.tokenizer, plan.proposal, output, {**plan.record(), **attrs})
    runs = "layer_types and sliding_window in its config" if in_config else "windows.json, which posterity runs"
    typer.echo(one_line(f"written and loaded again: {output}, with {runs}"))


def _check_output(output: Path, model: str | None, local: str | None, sinks: int | None) -> None:
    """Raise InputError for a folder that takes the model's place, or for windows that no folder can say."""
    if model is not None and real_path(output) == real_path(model):
        raise InputError(f"cannot write {output}: it is read here; choose another folder for the output")
    if local is None:
        raise InputError("--output writes a model with local layers: say how many, such as --local 1/2")
    if sinks:
        raise InputError(
            f"no folder can be written with --sinks {sinks}: a sliding window keeps no first keys; leave out one of "
            "the two"
        )
