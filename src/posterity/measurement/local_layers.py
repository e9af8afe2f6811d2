"""windows(): which layers may look back less far, by their prices; what that really costs; the model written so."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from posterity.errors import InputError
from posterity.inputs.arguments import open_model, split_arguments
from posterity.inputs.limits_folder import save_local_layers
from posterity.inputs.model import load_model
from posterity.inputs.named_documents import name_texts, open_files
from posterity.inputs.windows import read_corpus
from posterity.measurement.measure import CONTEXT, LIMIT, measure
from posterity.measurement.predictions import Logits, compare_predictions
from posterity.measurement.price_account import SAMPLES, check_prices, window_sizes
from posterity.models.attach import watch_model
from posterity.models.chunked_loss import LMHead
from posterity.models.interception import AttentionCall
from posterity.models.language_model import (
    freeze_parameters,
    input_device,
    language_model,
    max_difference,
    rounding,
)
from posterity.models.watch import Layer
from posterity.models.window_limits import limit_windows
from posterity.progress import progress_bar
from posterity.results.ratios import mean_and_error
from posterity.results.window_plan import (
    BUDGET,
    CHEAPEST,
    RANDOM,
    Estimate,
    LocalLayers,
    Trial,
    WindowPlan,
    local_count,
    other_choices,
    plan_windows,
    pool_trials,
)

Ids = Int64[Tensor, " position"]


def windows(
    model: Any = "default",
    tokenizer: Any = None,
    documents: Any = None,
    *,
    local: float | str | None = None,
    window: int | None = None,
    budget: float = BUDGET,
    verify: bool = False,
    context: int = CONTEXT,
    limit: int = LIMIT,
    prices: str = SAMPLES,
    sinks: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> WindowPlan:
    """Find out which layers may look back less far, and what that costs in nats per token.

    Every layer is priced at every window by `measure(prices=...)`: in one pass over the text, to second order, each
    layer by itself. The proposal are the layers that cost least. With `verify` it is tried on held-out windows of text,
    which decided nothing: these layers are really masked, and the change of the loss and the Kullback-Leibler
    divergence of the model's predictions stand beside the sum of the prices, and beside as many layers that were chosen
    without prices. The model is not changed.

    Args:
        model: As in `posterity.measure`: a model, or the name of one.
        tokenizer: As in `posterity.measure`.
        documents: As in `posterity.measure`.
        local: How many layers may be local: a share of all (0.5, "1/2"), or a whole number of them (12, "12"); None for
            the prices alone.
        window: Tokens that a local layer sees, its own included: a power of two below the context. None for the
            smallest at which the sum of the prices is within the budget.
        budget: Nats per token.
        verify: Whether to try the proposal.
        context: Tokens of a window of text.
        limit: Windows of text that are priced; as many again are held out, if the text has them, else half of all.
        prices: "samples" or "text", as in `posterity.measure`.
        sinks: First keys of a document that a local layer sees all the same. `sliding_window` of transformers keeps
            none.
        seed: Of the drawn labels and of the random layers.
        progress: Whether to show progress on stderr.

    Raises:
        InputError: An argument is none of these; too little text; a model that cannot be measured.
    """
    if check_prices(prices) is None:
        raise InputError("prices expects 'text' or 'samples'; got None")
    if verify and local is None:
        raise InputError("verify=True tries local layers: say how many, such as local='1/2' (--local 1/2)")
    tokenizer, documents = split_arguments(tokenizer, documents)
    documents = open_files(documents)
    loaded = open_model(model, tokenizer)
    inner = language_model(loaded.model)
    corpus = read_corpus(name_texts(documents), loaded.tokenizer, context, 2 * limit if verify else limit)
    number = min(limit, len(corpus.windows) // 2) if verify else len(corpus.windows)
    if not number:
        raise InputError(
            f"verify=True expects two windows of {context} tokens at least, one held out; got 1: give a longer text, "
            "or lower `context` (--context)"
        )
    with watch_model(inner) as watch:
        local_count(len(watch.layers), list(window_sizes(context)), local, window, budget)
        result = measure(
            inner, None, [(part.text, part.ids) for part in corpus.windows[:number]],
            context=context, limit=number, weights=False, sinks=sinks, prices=prices, seed=seed, progress=progress,
            attrs={**corpus.coverage.attrs(), "command": "posterity.windows", **loaded.attrs},
        )  # fmt: skip
        plan = plan_windows(result, local, window, budget)
        if not verify or plan.proposal is None:
            return plan
        held_out = [part.ids for part in corpus.windows[number:]]
        choices = [(CHEAPEST, plan.proposal), *other_choices(result, plan.proposal, seed)]
        with progress_bar(len(choices), progress, "trying", "choices") as advance:
            trials = []
            for choice, layers in choices:
                trials.append(try_layers(inner, held_out, choice, layers, sinks))
                advance(1, sum(map(len, held_out)))
    random = pool_trials([trial for trial in trials if trial.choice == RANDOM])
    trials = [trial for trial in trials if trial.choice != RANDOM]
    return replace(plan, trials=(*trials, random), trial_windows=len(held_out))


def try_layers(model: nn.Module, windows: Sequence[Ids], choice: str, layers: LocalLayers, sinks: int = 0) -> Trial:
    """Measure what local layers cost on windows of text, in nats per token: all of them really masked at once."""
    inner = language_model(model)
    head, changes = LMHead.probe(inner), []
    with watch_model(inner), freeze_parameters(inner), torch.no_grad():
        for ids in windows:
            ids = ids[None].to(input_device(inner))
            full = _run(head, ids)
            with limit_windows(inner, layers.windows, sinks):
                limited = _run(head, ids)
            changes.append(compare_predictions(full, limited, ids[0, 1:], head.chunk_length(1)))
    means, errors = mean_and_error(changes)
    return Trial(choice, layers.layers, layers.predicted, *map(Estimate, means.tolist(), errors.tolist()))


def _run(head: LMHead, ids: Int64[Tensor, "1 position"]) -> Logits:
    """Run the model, and return what gives its logits at some positions."""
    body = head.run_body(head.model, ids)
    if body is None:
        logits = head.model(input_ids=ids, use_cache=False).logits
        return lambda positions: logits[:, positions]
    hidden, outputs = body
    return lambda positions: head.logits(hidden[:, positions], ids, outputs)


def save_model(model: nn.Module, tokenizer: Any, layers: LocalLayers, folder: Path, attrs: dict[str, Any]) -> bool:
    """Write a model whose layers are local, loaded again and compared with the model under masks before it is there.

    Args:
        model: The model.
        tokenizer: Its tokenizer, or None.
        layers: The local layers.
        folder: As in `save_local_layers`.
        attrs: Further entries of `windows.json`.

    Returns:
        Whether the config says the windows, so that any library runs them; else this package does.

    Raises:
        InputError: It cannot be written, or its logits or edges are others after it was loaded again.
    """
    inner = language_model(model)
    generator = torch.Generator().manual_seed(0)
    length = layers.window + min(layers.window, 64)
    ids = torch.randint(inner.config.get_text_config().vocab_size, (1, length), generator=generator)
    ids = ids.to(input_device(inner))
    reaches = [min(reach, layers.windows.get(layer, reach)) for layer, reach in enumerate(layer_reaches(inner, ids))]
    with limit_windows(inner, layers.windows):
        logits = _logits(inner, ids)

    def verify(source: Path) -> bool:
        again = load_model(source, inner.dtype, ids.device).model
        close = max_difference(logits, _logits(again, ids)) <= rounding(logits.dtype) * logits.abs().max().item()
        return close and layer_reaches(again, ids) == reaches

    return save_local_layers(model, tokenizer, layers.windows, folder, attrs, verify)


def layer_reaches(model: nn.Module, ids: Int64[Tensor, "1 position"]) -> list[int]:
    """Return how many positions back any query of each layer sees on these tokens, its own included."""
    reaches = []

    def note(layer: Layer, call: AttentionCall) -> None:
        edges = call.mask.edges(ids.shape[1], ids.device)
        reaches.append(int(edges.sum(0).nonzero().max()) + 1)

    with watch_model(model) as watch, watch.replace_outputs(note):
        _logits(model, ids)
    return reaches


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    inner = language_model(model)
    with freeze_parameters(inner), torch.no_grad():
        return inner(input_ids=ids, use_cache=False).logits
