"""The command line: every command is one call of the library, and every mistake of the user's is one line.

torch and transformers are imported inside the commands, so that `--help` answers at once.
"""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from posterity.edge import edge, rank, terminate
from posterity.errors import InputError, one_line
from posterity.outputs import Unfinished, alone, check_writable, hand_over, provenance, real_path, told_of

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
    from posterity import loading, sources, steps

    check_writable(output, report, reads=[model or "", *(text or [])])
    folders, names = steps.checkpoints([model, *(text or [])] if model else [])
    names = names if folders else text or []
    if len(folders) > 1 and "-" in names:
        raise InputError("standard input can be read for one model only; write it to a file for several checkpoints")
    skipped = sources.Skipped() if skip_broken else None
    texts = sources.documents(names, field, skipped)
    unfinished = Unfinished(output, resume)
    if unfinished.is_done(report):
        return
    given = _given(
        context=context, lags=lags, weights=weights, losses=losses, parameters=parameters, batch=batch, seed=seed,
        horizons=_numbers(horizons),
    )  # fmt: skip

    def measured(name: str | None, texts: Any, part: str = "") -> Any:
        loaded = loading.load_model(name, dtype, device, revision, trust_remote_code)
        return posterity.measure(
            loaded.model, loaded.tokenizer, texts, limit=documents, attrs=provenance(loaded),
            state=unfinished.part(part), processes=unfinished.processes, **given,
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
    from posterity import loading

    check_writable(output, report, reads=[model or ""])
    given = _given(batch=batch, seed=seed, horizons=_numbers(horizons))
    loaded = loading.load_model(model, dtype, device, revision, trust_remote_code)
    result = posterity.inspect(loaded.model, loaded.tokenizer, text, attrs=provenance(loaded), **given)
    hand_over(result, output, report)


def _given(**options: Any) -> dict[str, Any]:
    """Only what was given is passed on: the defaults are those of the library's functions."""
    return {name: value for name, value in options.items() if value is not None}


def _numbers(text: str | None, option: str = "horizons", such: str = "1,2,4,8") -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError:
        raise InputError(f"--{option} expects whole numbers with commas, such as {such}; got {text!r}") from None


def _assigned(given: list[str] | None) -> dict[str, float] | None:
    """Numbers by name from NAME=NUMBER; whole ones stay whole."""
    found: dict[str, float] = {}
    for one in given or ():
        name, _, number = one.partition("=")
        try:
            found[name.strip()] = int(number) if number.strip().lstrip("-").isdecimal() else float(number)
        except ValueError:
            raise InputError(f"--task expects NAME=NUMBER, such as chance=0.1; got {one!r}") from None
    return found or None


@app.command()
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
    from posterity import runs

    settings = runs.Settings(
        **_given(
            model=model, data=None if data is None else tuple(data), horizon=horizon, cut=cut, steps=steps, batch=batch,
            streams=None if streams is None else tuple(one.strip() for one in streams.split(",")),
            layers=_numbers(layers, "layers", "0,1,-1"), context=context, rate=rate, warmup=warmup, width=width,
            depth=depth, heads=heads, seed=seed, task=_assigned(task), skip_broken=skip_broken or None,
        )
    )  # fmt: skip
    folder = runs.train(output, settings, monitor=monitor, **_given(save_every=save_every, keep=keep))
    if rank() == "0":
        typer.echo(one_line(f"trained: {folder}"))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of finished runs of `train`.")],
    output: Output = None,
    report: Page = None,
) -> None:
    """Show what horizons cost.

    Prints the held-out loss of every run and its gap to the plain run (horizon full) of the same seed.
    """
    from posterity import comparison

    check_writable(output, report, reads=folders)
    compared = comparison.compare(folders)
    if output is not None:
        comparison.save(compared, output)
    if report is not None:
        comparison.page(compared, report)
    comparison.table(compared)


@app.command()
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
    from posterity import folded, loading, sources

    if model is not None and real_path(output) == real_path(model):
        raise InputError(f"cannot write {output}: it is read here; choose another folder for the output")
    folded.checked_folder(output)
    skipped = sources.Skipped() if skip_broken else None
    loaded = loading.load_model(model, dtype, device, revision, trust_remote_code)
    found = posterity.fold(
        loaded.model, loaded.tokenizer, sources.documents(text or [], field, skipped),
        **_given(budget=budget, context=context, limit=documents, batch=batch),
    )  # fmt: skip
    known = {**found.record(), **provenance(loaded), **told_of(skipped)}
    folded.save_folded(loaded.model, loaded.tokenizer, found.by_layer, output, known)
    typer.echo(str(found))
    again = loading.load_model(str(output), dtype, device)
    typer.echo(one_line(f"written and loaded again: {output}, loss {found.verify(again.model):.4f} as measured"))


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
    from posterity import loading, sources, steps

    others = beside or []
    if len({model or "default", *others}) <= len(others):
        raise InputError(f"expected other models beside {model or 'the default'}; one came twice")
    check_writable(output, report, reads=[model or "", *(text or []), *others])
    unfinished = Unfinished(output, resume)
    if unfinished.is_done(report):
        return
    given = _given(
        contexts=_numbers(contexts, "contexts", "64,128,256"), context=context, limit=documents, budget=budget,
        rows=_numbers(rows, "rows", "4,8"), seed=seed,
    )  # fmt: skip
    folders, names = steps.checkpoints([model, *(text or [])] if model else [])
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
        processes=unfinished.processes, **given,
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
    from posterity import loading

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
