"""The command line: every command is one call of the library, and every mistake of the user's is one line.

torch and transformers are imported inside the commands, so that `--help` answers at once.
"""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from posterity.cli.exit_codes import edge, terminate
from posterity.cli.options import (
    Device,
    Dtype,
    Field,
    Horizons,
    Model,
    Output,
    Page,
    Resume,
    Revision,
    Run,
    Seed,
    SkipBroken,
    Texts,
    Trust,
    given,
    numbers,
)
from posterity.cli.outputs import Unfinished, alone, check_writable, hand_over, provenance
from posterity.cli.training import compare, fold, train
from posterity.errors import InputError

DOCUMENTS = 16


class _Group(TyperGroup):
    """Runs the commands inside the one place that turns mistakes into a line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with edge():
            answer = super().invoke(ctx)
            sys.stdout.flush()
            return answer


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Shows, exactly, who the keys and values of causal attention are written for.",
)


@app.command()
def measure(
    model: Model = None,
    text: Texts = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens in a window.  [default: 512]")] = None,
    documents: Annotated[int, typer.Option(min=1, help="Windows to measure.")] = DOCUMENTS,
    lags: Annotated[
        Literal["octaves", "all", "self"] | None,
        typer.Option(help="Bins of a quarter octave, every lag, or only self and other.  [default: octaves]"),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows in one pass.  [default: 1]")] = None,
    weights: Annotated[
        bool | None, typer.Option("--weights/--no-weights", help="Split the weights' gradients.  [default: weights]")
    ] = None,
    field: Field = "text",
    skip_broken: SkipBroken = False,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    losses: Annotated[
        bool | None, typer.Option("--losses", help="Who pays: own or later losses; one more backward pass.")
    ] = None,
    horizons: Horizons = None,
    parameters: Annotated[
        bool | None, typer.Option("--parameters", help="Who pays for every module's parameters too.")
    ] = None,
    seed: Seed = None,
    trust_remote_code: Trust = False,
    output: Output = None,
    report: Page = None,
    resume: Resume = False,
) -> None:
    """Measure a model on texts.

    Shows where the gradients of its queries, keys and values come from. With --output and --report the result is kept
    as a file and as a page; the table is printed in any case. Several folders of checkpoints in place of MODEL, such as
    run/checkpoint-*, give one result over training. While it is measured, OUTPUT.state keeps what is done; several
    processes share the windows: torchrun --nproc-per-node 2 -m posterity measure ...
    """
    import posterity
    from posterity.inputs import model as loading
    from posterity.inputs import text_sources as sources
    from posterity.inputs.checkpoints import checkpoints
    from posterity.results import steps

    check_writable(output, report, reads=[model or "", *(text or [])])
    folders, names = checkpoints([model, *(text or [])] if model else [])
    names = names if folders else text or []
    if len(folders) > 1 and "-" in names:
        raise InputError("standard input can be read for one model only; write it to a file for several checkpoints")
    skipped = sources.Skipped() if skip_broken else None
    texts = sources.documents(names, field, skipped)
    unfinished = Unfinished(output, resume)
    if unfinished.is_done(report):
        return
    options = given(
        context=context, lags=lags, weights=weights, losses=losses, parameters=parameters, batch=batch, seed=seed,
        horizons=numbers(horizons),
    )  # fmt: skip

    def measured(name: str | None, texts: Any, part: str = "") -> Any:
        loaded = loading.load_model(name, dtype, device, revision, trust_remote_code)
        return posterity.measure(
            loaded.model, loaded.tokenizer, texts, limit=documents, attrs=provenance(loaded),
            state=unfinished.part(part), processes=unfinished.processes, **options,
        )  # fmt: skip

    if folders:
        result = steps.over_steps(
            {
                step: measured(one, sources.documents(names, field, skipped), f"step-{step}")
                for step, one in folders.items()
            }
        )
    else:
        result = measured(model, texts)
    hand_over(result, output, report, skipped, unfinished)


@app.command()
def inspect(
    text: Annotated[str, typer.Option("--text", "-t", help="The text, at most 256 tokens.")],
    model: Model = None,
    horizons: Horizons = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Losses in one backward pass.  [default: 8]")] = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    seed: Seed = None,
    trust_remote_code: Trust = False,
    output: Output = None,
    report: Page = None,
) -> None:
    """Put one text under the glass.

    Finds, by one backward pass for each loss, which loss pays for the key and value of every position. With --report
    the text can be explored token by token.
    """
    alone()
    import posterity
    from posterity.inputs import model as loading

    check_writable(output, report, reads=[model or ""])
    options = given(batch=batch, seed=seed, horizons=numbers(horizons))
    loaded = loading.load_model(model, dtype, device, revision, trust_remote_code)
    result = posterity.inspect(loaded.model, loaded.tokenizer, text, attrs=provenance(loaded), **options)
    hand_over(result, output, report)


for _command in (train, compare, fold):
    app.command()(_command)


@app.command()
def audit(
    model: Model = None,
    text: Texts = None,
    rows: Annotated[str | None, typer.Option(metavar="N,N,...", help="Clauses by number; all unless given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look: a quarter of the passes or less.")] = False,
    contexts: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Lengths for clause 5.  [default: 64,128,256,512,1024]")
    ] = None,
    context: Annotated[int | None, typer.Option(min=8, help="Tokens in a window.  [default: 512]")] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Windows to measure.  [default: 4]")] = None,
    budget: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of each pass of clauses 6 and 8, in two windows at least.  [default: 256]"),
    ] = None,
    control: Annotated[
        Literal["random"] | None, typer.Option(help="Beside it, a model of the same config with random weights.")
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Another model, side by side; may be repeated.")
    ] = None,
    field: Field = "text",
    skip_broken: SkipBroken = False,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    seed: Seed = None,
    trust_remote_code: Trust = False,
    output: Output = None,
    report: Page = None,
    resume: Resume = False,
) -> None:
    """Ask of a model, clause by clause, whether the idea holds.

    Each clause is measured, set beside what counting or chance predicts, and judged: holds, fails or mixed. Several
    folders of checkpoints in place of MODEL are set side by side.
    """
    import posterity
    from posterity.inputs import model as loading
    from posterity.inputs import text_sources as sources
    from posterity.inputs.checkpoints import checkpoints

    others = beside or []
    if len({model or "default", *others}) <= len(others):
        raise InputError(f"expected other models beside {model or 'the default'}; one came twice")
    check_writable(output, report, reads=[model or "", *(text or []), *others])
    unfinished = Unfinished(output, resume)
    if unfinished.is_done(report):
        return
    options = given(
        contexts=numbers(contexts, "contexts", "64,128,256"), context=context, limit=documents, budget=budget,
        rows=numbers(rows, "rows", "4,8"), seed=seed,
    )  # fmt: skip
    folders, names = checkpoints([model, *(text or [])] if model else [])
    skipped = sources.Skipped() if skip_broken else None
    texts = sources.documents(names if folders else text or [], field, skipped)
    wanted = {f"step {step}": one for step, one in folders.items()} or {"": model}
    loaded = {
        name: loading.load_model(one, dtype, device, revision, trust_remote_code)
        for name, one in [*wanted.items(), *((one, one) for one in others)]
    }
    loaded = {name or one.name: one for name, one in loaded.items()}
    first = next(iter(loaded.values()))
    result = posterity.audit(
        {name: one.model for name, one in loaded.items()}, {name: one.tokenizer for name, one in loaded.items()},
        texts, quick=quick, control=control, attrs=provenance(first), state=unfinished.folder,
        processes=unfinished.processes, **options,
    )  # fmt: skip
    hand_over(result, output, report, skipped, unfinished)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Result files; several are set side by side.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write (HTML).")],
) -> None:
    """Write a page from one or several runs."""
    alone()
    import posterity

    check_writable(None, output, reads=runs)
    posterity.report([posterity.load(run) for run in runs], output)


@app.command()
def check(
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Say whether a model can be measured.

    One line, with the reasons; the exit code is 0 for yes and 2 for no.
    """
    alone()
    import posterity
    from posterity.inputs import model as loading

    answer: Any = posterity.check(loading.load_model(model, dtype, device, revision, trust_remote_code).model)
    typer.echo(str(answer))
    if not answer.ok:
        raise typer.Exit(2)


@app.command()
def summary(run: Run) -> None:
    """Print the table of a run."""
    alone()
    import posterity

    posterity.summary(posterity.load(run))


def _show_version(wanted: bool) -> None:
    if wanted:
        import posterity

        typer.echo(f"posterity {posterity.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; the console script and `python -m posterity` come here."""
    signal.signal(signal.SIGTERM, terminate)
    app(prog_name="posterity")
