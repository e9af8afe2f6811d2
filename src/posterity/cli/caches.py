"""The commands `prices` and `evict`: what cached keys and values are worth, and what it costs to drop them."""

from pathlib import Path
from typing import Annotated

import typer

import posterity
from posterity.cli.options import (
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
)
from posterity.cli.outputs import (
    ResumableRun,
    check_outputs,
    print_skipped_lines,
    real_path,
    require_one_process,
    run_attrs,
    write_outputs,
)
from posterity.errors import InputError, one_line


def prices_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the prices.")],
    model: Model = None,
    text: Texts = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in a window.  [default: 1024]")] = None,
    limit: Limit = None,
    horizon: Annotated[
        int | None, typer.Option(min=1, help="Later queries that a price is for.  [default: 256]")
    ] = None,
    prices: Annotated[
        str | None, typer.Option(metavar="samples|text", help="Whose losses make prices.  [default: samples]")
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
    """Learn to predict what cached keys and values will be worth.

    Measures prices on texts, and fits a linear map for each layer from its input to them. Every fourth window is held
    out, and tells how well they are predicted. The folder is what compress and evict take.
    """
    require_one_process()
    from posterity.inputs.model import load_model
    from posterity.inputs.text_sources import SkippedLines, open_documents
    from posterity.measurement.price_fit import check_price_folder

    if model is not None and real_path(output) == real_path(model):
        raise InputError(f"cannot write {output}: it is read here; choose another folder for the output")
    check_price_folder(output)
    run = ResumableRun.open(output, resume)
    skipped = SkippedLines() if skip_broken else None
    loaded = load_model(model, dtype, device, revision, trust_remote_code)
    fitted = posterity.Prices.fit(
        loaded, None, open_documents(text or [], field, skipped),
        state=run.folder, attrs={"command": run_attrs(loaded)["command"]},
        **drop_unset(context=context, limit=limit, horizon=horizon, prices=prices, seed=seed),
    )  # fmt: skip
    print_skipped_lines(skipped)
    fitted.save(output)
    run.remove_state()
    typer.echo(str(fitted))
    typer.echo(one_line(f"written: {output}; next: posterity evict {model or 'default'} OTHER.txt --prices {output}"))


def evict_command(
    model: Model = None,
    text: Texts = None,
    prices: Annotated[Path | None, typer.Option(help="Folder that `posterity prices` wrote for this model.")] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="SHARE,...", help="Shares of the cache to keep.  [default: 1/2,1/4,1/8,1/16]")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="model|layer|equal",
            help="One threshold for all heads, one for those of a layer, or equal shares; may be repeated.  "
            "[default: model and equal]",
        ),
    ] = None,
    scorers: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Only these scorers, such as predicted-price,snapkv.  [default: all]"),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="text|copy|retrieval", help="Plain text, or a task that the model can solve by looking back."
        ),
    ] = None,
    prefix: Annotated[int | None, typer.Option(min=2, help="Tokens of the prompt.  [default: 512]")] = None,
    continuation: Annotated[int | None, typer.Option(min=2, help="Tokens behind it.  [default: 256]")] = None,
    limit: Limit = None,
    scores: Annotated[
        list[Path] | None, typer.Option(help="File with scores of these windows by another library; may be repeated.")
    ] = None,
    save_windows: Annotated[
        Path | None,
        typer.Option("--save-windows", help="File (.safetensors) for the windows, to score them elsewhere."),
    ] = None,
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
    """Drop cached keys and values by different scores, and see what the model then predicts.

    Runs a prompt, drops the pairs that a score ranks lowest, and compares the predictions of the next tokens with those
    of the full cache: by prices, by oracles that look ahead, and by the usual scores.
    """
    require_one_process()
    from posterity.inputs.model import load_model
    from posterity.inputs.text_sources import SkippedLines, open_documents
    from posterity.measurement.eviction_texts import TEXT
    from posterity.results.eviction_schema import BUDGET_OPTIONS

    check_outputs(output, report, inputs=[model or "", *(text or ())])
    if task not in (None, TEXT) and text:
        raise InputError(f"the task {task!r} is written, not read: leave {text[0]} out")
    budgets = None
    if budget is not None:
        if unknown := [name for name in budget if name not in BUDGET_OPTIONS]:
            raise InputError(f"--budget expects {', '.join(BUDGET_OPTIONS)}; got {unknown[0]}")
        budgets = [BUDGET_OPTIONS[name] for name in budget]
    run = ResumableRun.open(output, resume)
    skipped = SkippedLines() if skip_broken else None
    loaded = load_model(model, dtype, device, revision, trust_remote_code)
    documents = open_documents(text or [], field, skipped) if task in (None, TEXT) else None
    result = posterity.evict(
        loaded, None, documents, state=run.folder, attrs={"command": run_attrs(loaded)["command"]},
        **drop_unset(
            prices=prices, kept=None if keep is None else keep.split(","), budgets=budgets, task=task, prefix=prefix,
            scorers=None if scorers is None else scorers.split(","), continuation=continuation, limit=limit,
            scores=scores, save_windows=save_windows, seed=seed,
        ),
    )  # fmt: skip
    write_outputs(result, output, report, skipped, run)
