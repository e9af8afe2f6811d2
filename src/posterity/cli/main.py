"""The app and its measuring commands: each is one call of the library, and every mistake of the user's is one line."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import posterity
from posterity.cli.caches import evict_command, prices_command
from posterity.cli.exit_codes import exit_with_one_line, raise_termination
from posterity.cli.features import features_command
from posterity.cli.guide import explain_commands
from posterity.cli.options import (
    Context,
    Device,
    Dtype,
    Field,
    Horizons,
    Limit,
    Model,
    OutputFile,
    ReportPage,
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
from posterity.cli.outputs import ResumableRun, check_outputs, require_one_process, run_attrs, write_outputs
from posterity.cli.tables import reach_command, score_command, table_command
from posterity.cli.training import compare_command, fold_command, train_command
from posterity.cli.windows import windows_command
from posterity.errors import InputError, one_line
from posterity.inputs.checkpoints import find_checkpoints


class _Group(TyperGroup):
    """Runs every command inside the one place that turns mistakes into a line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with exit_with_one_line():
            value = super().invoke(ctx)
            sys.stdout.flush()
            return value


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Shows, exactly, who the keys and values of causal attention are written for.\n\n"
    "The commands stand in the order of use: check a model, measure it on texts (measure MODEL TEXT -o run.nc), then "
    "read run.nc as a table or a page. COMMAND --help has an example of each.",
)


@app.command("measure")
def measure_command(
    model: Model = None,
    text: Texts = None,
    context: Context = None,
    limit: Limit = None,
    pack: Annotated[
        bool | None,
        typer.Option(
            "--pack",
            help="Measure short documents too, several in one window, unseen by each other; tails are left out.",
        ),
    ] = None,
    lags: Annotated[
        Literal["octaves", "all", "self"] | None,
        typer.Option(help="Bins of a quarter octave, every lag, or only self and other.  [default: octaves]"),
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(min=0, help="First keys of each document that are told apart (attention sinks).  [default: 4]"),
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(
            metavar="text|samples",
            help="What cached keys and values, and windows, are worth in nats: by the losses of the text, or of labels "
            "that the model draws (one more backward pass).",
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows in one pass.  [default: 1]")] = None,
    checkpoint: Annotated[
        bool | None,
        typer.Option("--checkpoint", help="Long windows in less memory: layers run again in the backward pass."),
    ] = None,
    weights: Annotated[
        bool | None, typer.Option("--weights/--no-weights", help="Split the weights' gradients.  [default: weights]")
    ] = None,
    field: Field = None,
    skip_broken: SkipBroken = False,
    dtype: Dtype = None,
    device: Device = None,
    kernels: Annotated[
        Literal["auto", "triton", "blocks"],
        typer.Option(help="What sums over edges on a GPU: Triton kernels or an error, or plain PyTorch by blocks."),
    ] = "auto",
    revision: Revision = None,
    losses: Annotated[
        bool | None, typer.Option("--losses", help="Who pays: own or later losses; one more backward pass.")
    ] = None,
    horizons: Horizons = None,
    parameters: Annotated[
        bool | None, typer.Option("--parameters", help="Who pays for every module's parameters too.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Measure a model of the same config with random weights instead.")
    ] = False,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
    output: OutputFile = None,
    report: ReportPage = None,
    resume: Resume = False,
) -> None:
    """Measure a model on texts.

    Shows where the gradients of its queries, keys and values come from. With --output and --report the result is kept
    as a file and as a page; the table is printed in any case. Several folders of checkpoints in place of MODEL, such as
    run/checkpoint-*, give one result over training. While it is measured, OUTPUT.state keeps what is done; several
    processes share the windows: torchrun --nproc-per-node 2 -m posterity measure ...
    """
    from posterity.inputs.model import load_model
    from posterity.inputs.text_sources import SkippedLines, open_documents
    from posterity.results.steps import join_steps

    check_outputs(output, report, inputs=[model or "", *(text or [])])
    checkpoints, names = find_checkpoints([model, *(text or [])] if model else [])
    names = names if checkpoints else text or []
    if len(checkpoints) > 1 and "-" in names:
        raise InputError("standard input can be read for one model only; write it to a file for several checkpoints")
    skipped = SkippedLines() if skip_broken else None
    texts = open_documents(names, field, skipped)
    run = ResumableRun.open(output, resume)
    if run.show_if_done(report):
        return
    options = drop_unset(
        context=context, limit=limit, lags=lags, sinks=sinks, weights=weights, losses=losses, parameters=parameters,
        prices=prices, batch=batch, seed=seed, checkpoint=checkpoint, pack=pack, horizons=parse_integers(horizons),
    )  # fmt: skip

    def measure_model(name: str | None, texts: Any, part: str = "") -> Any:
        loaded = load_model(name, dtype, device, revision, trust_remote_code)
        if random_weights:
            loaded = loaded.with_random_weights(seed or 0)
        with posterity.choose_kernels(kernels):
            return posterity.measure(
                loaded.model, loaded.tokenizer, texts, attrs=run_attrs(loaded), state=run.subfolder(part),
                processes=run.processes, **options,
            )  # fmt: skip

    if checkpoints:
        result = join_steps(
            {
                step: measure_model(folder, open_documents(names, field, skipped), f"step-{step}")
                for step, folder in checkpoints.items()
            }
        )
    else:
        result = measure_model(model, texts)
    write_outputs(result, output, report, skipped, run)


@app.command("inspect")
def inspect_command(
    text: Annotated[str, typer.Option("--text", "-t", help="The text, at most 256 tokens.")],
    model: Model = None,
    horizons: Horizons = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Losses in one backward pass.  [default: 8]")] = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
    output: OutputFile = None,
    report: ReportPage = None,
) -> None:
    """Put one text under the glass.

    Finds, by one backward pass for each loss, which loss pays for the key and value of every position. With --report
    the text can be explored token by token.
    """
    require_one_process()
    from posterity.inputs.model import load_model
    from posterity.inputs.named_documents import refuse_path

    check_outputs(output, report, inputs=[model or ""])
    refuse_path(text)
    options = drop_unset(batch=batch, seed=seed, horizons=parse_integers(horizons))
    loaded = load_model(model, dtype, device, revision, trust_remote_code)
    result = posterity.inspect(loaded.model, loaded.tokenizer, text, attrs=run_attrs(loaded), **options)
    write_outputs(result, output, report)


@app.command("explain")
def explain_command(
    page: Annotated[str | None, typer.Argument(metavar="PAGE", help="What a message names; nothing: the list.")] = None,
) -> None:
    """Say why something is refused, and what to do."""
    from posterity.reporting.explanation_text import print_explanation

    print_explanation(page)


app.command("reach")(reach_command)
app.command("table")(table_command)
app.command("train")(train_command)
app.command("compare")(compare_command)
app.command("fold")(fold_command)
app.command("windows")(windows_command)
app.command("prices")(prices_command)
app.command("evict")(evict_command)
app.command("score")(score_command)
app.command("features")(features_command)


@app.command("audit")
def audit_command(
    model: Model = None,
    text: Texts = None,
    rows: Annotated[str | None, typer.Option(metavar="N,N,...", help="Clauses by number; all unless given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look: a quarter of the passes or less.")] = False,
    contexts: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Lengths for clause 5.  [default: 64,128,256,512,1024]")
    ] = None,
    context: Annotated[int | None, typer.Option(min=8, help="Tokens in a window.  [default: 512]")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "--documents", min=1, help="Windows to measure, at most.  [default: 4]")
    ] = None,
    pass_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of each pass of clauses 6 and 8, in two windows at least.  [default: 256]"),
    ] = None,
    control: Annotated[
        Literal["random"] | None, typer.Option(help="Beside it, a model of the same config with random weights.")
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Another model, side by side; may be repeated.")
    ] = None,
    field: Field = None,
    skip_broken: SkipBroken = False,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
    output: OutputFile = None,
    report: ReportPage = None,
    resume: Resume = False,
) -> None:
    """Ask of a model, clause by clause, whether the idea holds.

    Each clause is measured, set beside what counting or chance predicts, and judged: holds, fails or mixed. Several
    folders of checkpoints in place of MODEL are set side by side.
    """
    from posterity.inputs.model import load_model
    from posterity.inputs.text_sources import SkippedLines, open_documents

    others = beside or []
    if len({model or "default", *others}) <= len(others):
        raise InputError(f"expected other models beside {model or 'the default'}; one came twice")
    check_outputs(output, report, inputs=[model or "", *(text or []), *others])
    run = ResumableRun.open(output, resume)
    if run.show_if_done(report):
        return
    options = drop_unset(
        contexts=parse_integers(contexts, "contexts", "64,128,256"), context=context, limit=limit,
        pass_tokens=pass_tokens, rows=parse_integers(rows, "rows", "4,8"), seed=seed,
    )  # fmt: skip
    checkpoints, names = find_checkpoints([model, *(text or [])] if model else [])
    skipped = SkippedLines() if skip_broken else None
    texts = open_documents(names if checkpoints else text or [], field, skipped)
    names_by_label = {f"step {step}": folder for step, folder in checkpoints.items()} or {"": model}
    names_by_label |= {name: name for name in others}
    models = {
        label: load_model(name, dtype, device, revision, trust_remote_code) for label, name in names_by_label.items()
    }
    models = {label or loaded.name: loaded for label, loaded in models.items()}
    first = next(iter(models.values()))
    result = posterity.audit(
        {label: loaded.model for label, loaded in models.items()},
        {label: loaded.tokenizer for label, loaded in models.items()},
        texts, quick=quick, control=control, attrs=run_attrs(first), state=run.folder, processes=run.processes,
        **options,
    )  # fmt: skip
    write_outputs(result, output, report, skipped, run)


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Result files; several are set side by side.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write (HTML).")],
    labels: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME,...", help="Names of the runs in the page, in place of model, text and file."),
    ] = None,
) -> None:
    """Write a page from one or several runs."""
    require_one_process()
    check_outputs(None, output, inputs=runs)
    names = [name.strip() for name in labels.split(",")] if labels is not None else []
    posterity.report(runs, output, labels=names)
    typer.echo(one_line(f"page written: {output}"))


@app.command("check")
def check_command(
    model: Model = None,
    context: Context = None,
    limit: Limit = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say whether a model can be measured.

    One line, with the reasons, then its size, and the time and memory that measure takes with so many windows of so
    many tokens on this machine, from trial passes. The exit code is 0 for yes and 2 for no.
    """
    require_one_process()
    from posterity.inputs.model import load_model
    from posterity.measurement.forecast import forecast

    loaded = load_model(model, dtype, device, revision, trust_remote_code)
    result: Any = posterity.check(loaded.model)
    typer.echo(str(result))
    if not result.ok:
        raise typer.Exit(2)
    typer.echo(result.describe_kernels())
    typer.echo(forecast(loaded.model, **drop_unset(context=context, limit=limit)))


@app.command("summary")
def summary_command(run: ResultFile) -> None:
    """Print the table of a run."""
    require_one_process()
    posterity.summary(posterity.load(run))


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"posterity {posterity.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


explain_commands(app.registered_commands)


def main() -> None:
    """Run the command line; the console script and `python -m posterity` come here."""
    signal.signal(signal.SIGTERM, raise_termination)
    if "OMP_WAIT_POLICY" not in os.environ:
        # GNU OpenMP reads this when torch is loaded. By default a thread that waits for others keeps its core for
        # 300,000 rounds; where another process wants that core, each wait then takes a time slice of the scheduler.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    app(prog_name="posterity")
