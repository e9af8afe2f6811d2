"""evict(): what it costs to drop cached keys and values, by what scores choose them."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from posterity._version import __version__
from posterity.atomic_files import write_atomically
from posterity.decomposition.accumulator import Accumulator
from posterity.decomposition.first_keys import FirstKeys
from posterity.decomposition.prices import pass_prices
from posterity.decomposition.sweep import Scratch
from posterity.errors import InputError
from posterity.inputs.arguments import open_model, split_arguments
from posterity.inputs.named_documents import name_texts, open_files
from posterity.inputs.windows import Window, read_corpus, token_digest
from posterity.measurement.cache_scorers import ORACLES, USUAL, PredictedPrice, Scorer, ScoresOfFile
from posterity.measurement.distributed import Processes
from posterity.measurement.eviction_texts import TEXT, counted_targets, task_windows
from posterity.measurement.measure import check_tokens
from posterity.measurement.predictions import compare_predictions
from posterity.measurement.price_calibration import rank_correlation
from posterity.measurement.price_fit import Prices
from posterity.measurement.prompt_layer import PromptLayer
from posterity.measurement.provenance import provenance
from posterity.measurement.run_state import RunState, fingerprint
from posterity.measurement.window_batch import uniform_draws
from posterity.models.attach import refuse_other_paths, watch_model
from posterity.models.chunked_loss import NO_TARGET, ChunkedLoss, LMHead
from posterity.models.compressed_cache import CompressedCache, attach_cache, cache_windows
from posterity.models.language_model import evaluation_mode, freeze_parameters, input_device, language_model
from posterity.models.price_heads import OTHERS, PriceHead, module_input
from posterity.models.probe import check
from posterity.models.watch import Layer
from posterity.ops.attention import Backward
from posterity.ops.horizon_rules import Full
from posterity.progress import progress_bar
from posterity.results.eviction_schema import BUDGETS, EQUAL, EVICTION, KIND, LAYER, MODEL

KEPT = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8), Fraction(1, 16))
PREFIX, CONTINUATION, LIMIT = 512, 256, 16  # tokens, tokens, windows
SAFEGUARD = 0.2  # of an equal budget that each head has for sure, where heads of a layer share one
Masks = list[Bool[Tensor, " pair"]]  # of each key/value head of all layers in order


def evict(
    model: Any = "default",
    tokenizer: Any = None,
    documents: Any = None,
    *,
    prices: "Prices | str | os.PathLike[str] | None" = None,
    kept: Sequence[float | str | Fraction] = KEPT,
    scorers: Sequence[Scorer | str] | None = None,
    scores: Sequence[str | os.PathLike[str]] = (),
    budgets: Sequence[str] = (MODEL, EQUAL),
    prefix: int = PREFIX,
    continuation: int = CONTINUATION,
    task: str = TEXT,
    limit: int = LIMIT,
    save_windows: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    state: str | os.PathLike[str] | None = None,
    attrs: dict[str, Any] | None = None,
) -> xr.Dataset:
    """Drop cached keys and values after a prompt by different scores, and measure what the model then predicts.

    The prompt runs with all pairs. Those that a score ranks lowest are then really dropped (`posterity.compress`), and
    the tokens behind the prompt are predicted without them: the Kullback-Leibler divergence of the predictions from
    those of the full cache, and the change of the loss, means over these tokens.

    Args:
        model: As in `posterity.measure`: a model, or the name of one.
        tokenizer: As in `posterity.measure`.
        documents: As in `posterity.measure`; None, and not read, for another task than "text".
        prices: What predicts prices for this model, or the folder of it; None for none.
        kept: Shares of the pairs that are kept, above 0, at most 1.
        scorers: What ranks pairs (`posterity.measurement.cache_scorers`), or their names in small letters with hyphens,
            such as "snapkv" or "predicted-price"; None for oracles, `prices` and the usual ones.
        scores: Files with scores of these windows, see `cache_scorers.ScoresOfFile`.
        budgets: "one threshold" for all layers and heads; "by layer", one for the heads of a layer, each of which keeps
            a fifth of an equal budget for sure (Feng et al. 2024, Ada-KV, arXiv 2407.11550); "equal" in every head.
        prefix: Tokens of the prompt.
        continuation: Tokens behind it.
        task: "text"; or "copy" and "retrieval", which are written with the tokenizer (`eviction_texts`).
        limit: Windows of text.
        save_windows: A file for the windows, which other libraries score (`bench/peers/kvpress_scores.py`).
        seed: Of drawn labels and of tasks.
        progress: Whether to show progress on stderr.
        state: A folder that keeps what has been measured; where it holds some, the run goes on from there.
        attrs: Provenance to add.

    Returns:
        The divergence and the change of the loss by window, scorer, budget and share; dims and units in
        `posterity.results.eviction_schema`.

    Raises:
        InputError: A model whose cache cannot be compressed; prices of another model; an argument out of its range;
            too little text.
    """
    shares, budgets = parse_shares(kept), _check_budgets(budgets)
    if prefix < 2 or continuation < 2:
        raise InputError(f"expected a prompt and a continuation of 2 tokens at least; got {prefix} and {continuation}")
    tokenizer, documents = split_arguments(tokenizer, documents)
    if task != TEXT and documents is not None:
        raise InputError(f"the task {task!r} is written, not read: leave the documents out")
    documents = open_files(documents) if task == TEXT else None
    loaded = open_model(model, tokenizer)
    inner, tokenizer = language_model(loaded.model), loaded.tokenizer
    if prices is not None and not isinstance(prices, Prices):
        prices = Prices.load(prices)
    if prices is not None:
        prices.check_model(inner)
    coverage = {}
    if task == TEXT:
        corpus = read_corpus(name_texts(documents), tokenizer, prefix + continuation, limit)
        windows, coverage = list(corpus.windows), corpus.coverage.attrs()
    else:
        windows = task_windows(task, tokenizer, limit, prefix, continuation, seed)
    check_tokens(inner, windows)
    if save_windows is not None:
        _save_windows(windows, prefix, Path(save_windows))
    all_scorers = [*_choose_scorers(scorers, prices), *map(ScoresOfFile.open, map(Path, scores))]
    if not all_scorers:
        raise InputError("expected a scorer at least, of `scorers` or a file of `scores`; got none")
    names = [scorer.name for scorer in all_scorers]
    if len({*names}) < len(names):
        raise InputError(f"expected scorers with names of their own; got {', '.join(names)}")
    settings = {
        "version": __version__, "kind": KIND, "dtype": str(inner.dtype), "prefix": prefix, "task": task, "seed": seed,
        "kept": [*map(str, shares)], "budgets": [*budgets], "scorers": [*map(_scorer_key, all_scorers)],
        "text": token_digest(windows), "model": "" if state is None else fingerprint(inner),
    }  # fmt: skip
    run_state, sums = RunState.open(state, settings, Processes()), Accumulator()
    remaining = run_state.remaining_windows(len(windows))
    trial = _Trial(inner, prefix, all_scorers, shares, budgets, seed)
    with (
        run_state.hold_lock(len(remaining)),
        progress_bar(len(remaining), progress, "evicting") as advance,
        evaluation_mode(inner),
    ):
        run_state.start(sums)
        for number in remaining:
            trial.add(sums, number, windows[number])
            run_state.add_windows(sums, [number])
            advance(1, windows[number].size)
        run_state.finish(sums)
    text = {
        "prefix": prefix, "continuation": continuation, "task": task, "seed": seed,
        "text_digest": token_digest(windows), "command": "posterity.evict", **coverage,
    }  # fmt: skip
    return trial.result(sums, windows, {**text, **provenance(inner), **loaded.attrs, **(attrs or {})})


def parse_shares(kept: Sequence[float | str | Fraction]) -> list[Fraction]:
    """Return shares that fall, from numbers or texts such as "1/4".

    Raises:
        InputError: One is none, or not above 0 and at most 1.
    """
    shares = []
    for share in [kept] if isinstance(kept, str | float | Fraction) else kept:
        try:
            shares.append(Fraction(share))
        except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
            raise InputError(f"expected shares of the cache such as 1/4 or 0.25; got {share!r}") from error
        if not 0 < shares[-1] <= 1:
            raise InputError(f"expected shares of the cache above 0, at most 1; got {share}")
    if not shares:
        raise InputError("expected shares of the cache such as 1/4; got none")
    return sorted({*shares}, reverse=True)


def _check_budgets(budgets: Sequence[str]) -> list[str]:
    names = [budgets] if isinstance(budgets, str) else [*budgets]
    if not names or any(name not in BUDGETS for name in names) or len({*names}) < len(names):
        raise InputError(f"expected budgets among {', '.join(map(repr, BUDGETS))}; got {budgets!r}")
    return names


def _save_windows(windows: Sequence[Window], prefix: int, path: Path) -> None:
    tokens = torch.stack([window.ids for window in windows])
    write_atomically(path, save({"tokens": tokens}, {"prefix": str(prefix)}))


def _choose_scorers(scorers: Sequence[Scorer | str] | None, prices: Prices | None) -> list[Scorer]:
    """Return scorers, some of which are named.

    Raises:
        InputError: A name is none, or that of predicted prices without prices.
    """
    all_scorers = [*ORACLES, *(() if prices is None else (PredictedPrice(prices),)), *USUAL]
    by_name = {re.sub(r"[^a-z0-9]+", "-", scorer.name.lower()).strip("-"): scorer for scorer in all_scorers}
    chosen: list[Scorer] = []
    for scorer in all_scorers if scorers is None else scorers:
        if isinstance(scorer, str) and scorer not in by_name:
            advice = "; predicted-price needs prices (--prices)" if scorer == "predicted-price" else ""
            raise InputError(f"expected scorers among {', '.join(by_name)}; got {scorer!r}{advice}")
        chosen.append(by_name[scorer] if isinstance(scorer, str) else scorer)
    return chosen


def _scorer_key(scorer: Scorer) -> str:
    """Return what tells a scorer from another one of the same name: its arguments, and the sum of what it learned."""
    learned = ()
    if isinstance(scorer, PredictedPrice):
        learned = [float(head.weight.double().sum()) for head in scorer.prices.heads]
    elif isinstance(scorer, ScoresOfFile):
        learned = [float(scorer.scores.double().sum())]
    return f"{scorer!r} {[*learned]}" if is_dataclass(scorer) else scorer.name


class _Trial:
    """Scores the pairs of a window, then measures what the model predicts without those that a score ranks lowest."""

    def __init__(
        self,
        model: PreTrainedModel,
        prefix: int,
        scorers: Sequence[Scorer],
        shares: Sequence[Fraction],
        budgets: Sequence[str],
        seed: int,
    ):
        self.model, self.prefix, self.scorers, self.shares = model, prefix, scorers, shares
        self.budgets, self.seed = budgets, seed
        self.check, self.windows, self.head = check(model), cache_windows(model), LMHead.probe(model)
        self.visible: list[Tensor] = []  # pairs of each layer that the query behind the prompt sees
        self._scratch = Scratch()

    def add(self, sums: Accumulator, number: int, window: Window) -> None:
        """Measure a window, and append its rows."""
        loss, prompt_layers = self._prompt_layers(number, window)
        self.visible = [x.visible.cpu() for x in prompt_layers]
        prices = self._pool([x.price for x in prompt_layers])
        by_scorer, correlation = [], []
        with watch_model(self.model):
            for scorer in self.scorers:
                by_share = [[scorer(x, float(share)).float().cpu() for x in prompt_layers] for share in self.shares]
                by_scorer.append(by_share)
                correlation.append(round(rank_correlation(self._pool(by_share[0]), prices), 9))  # 1, not 1 - 1e-14
        widths = [x.hidden.shape[1] for x in prompt_layers]
        results = self._evaluate(window, by_scorer, widths)
        rows = {"divergence": results[..., 0], "change": results[..., 1], "correlation": correlation, "loss": loss}
        for name, row in rows.items():
            sums.append_rows((None, name), [torch.as_tensor(row, dtype=torch.float64)])

    def _pool(self, scores: Sequence[Tensor]) -> Float[Tensor, " pair"]:
        """Return what a query behind the prompt sees, of all layers and heads."""
        parts = [x.cpu().double()[:, seen].flatten() for x, seen in zip(scores, self.visible, strict=True)]
        return torch.cat(parts)

    def _prompt_layers(self, number: int, window: Window) -> tuple[float, list[PromptLayer]]:
        """Run a window forward, and the losses of drawn labels behind the prompt backward; return the loss too."""
        size, prompt_layers = window.size, {}
        targets = counted_targets(window, self.prefix)
        draws = uniform_draws(window.ids, self.seed)[None]
        with freeze_parameters(self.model), watch_model(self.model) as watch:
            refuse_other_paths(watch, "the price of a pair")
            numbers = {layer: index for index, layer in enumerate(watch.layers)}

            def observe(layer: Layer, back: Backward, projections: object) -> None:
                index, module = numbers[layer], self.model.get_submodule(layer.name)
                price = pass_prices(back, FirstKeys.of(back, 0), (self.prefix, size), self._scratch).pairs[0, :, 1]
                inputs = watch.inputs[module]
                prompt_layers[index] = PromptLayer(
                    index, number, self.prefix, back, module, inputs, module_input(*inputs)[0],
                    price[:, : self.prefix], self.windows[index],
                )  # fmt: skip

            loss = ChunkedLoss.run(self.model, window.ids[None], self.head, targets[None], draws=draws)
            assert loss.drawn is not None
            with watch.override_rules((Full(), Full()), observe):
                loss.drawn.backward()
        text_loss = float(loss.losses[0]) / int((targets != NO_TARGET).sum())
        return text_loss, [prompt_layers[index] for index in sorted(prompt_layers)]

    @torch.no_grad()
    def _evaluate(
        self, window: Window, by_scorer: Sequence[Sequence[Sequence[Tensor]]], widths: Sequence[int]
    ) -> np.ndarray:
        """Predict what is behind a prompt by all scorers, budgets and shares: divergence and change of the loss.

        Args:
            window: The prompt and what is behind it.
            by_scorer: Scores by scorer, share and layer.
            widths: Of the input of each layer.
        """
        heads = [
            PriceHead(torch.zeros(width + OTHERS, len(scores)), torch.zeros(len(scores)), seen)
            for width, scores, seen in zip(widths, by_scorer[0][0], self.windows, strict=True)
        ]
        ids = window.ids[None].to(input_device(self.model))
        targets = counted_targets(window, self.prefix)[self.prefix :]
        results = np.empty((len(self.scorers), len(self.budgets), len(self.shares), 2))
        with attach_cache(self.model, self.check, heads) as cache:
            self.model(input_ids=ids[:, : self.prefix], past_key_values=cache, use_cache=True)
            restore = cache.snapshot()
            full = self._continue(cache, ids)
            for row, by_share in enumerate(by_scorer):
                for column, budget in enumerate(self.budgets):
                    for place, (scores, share) in enumerate(zip(by_share, self.shares, strict=True)):
                        restore()
                        masks = choose_pairs(scores, self.visible, share, budget)
                        counts = [len(index) for layer in cache.layers for index, _ in layer.candidates(0)]
                        cache.drop([[mask[-count:] for mask, count in zip(masks, counts, strict=True)]])
                        results[row, column, place] = self._compare(full, self._continue(cache, ids), targets)
        return results

    def result(self, sums: Accumulator, windows: Sequence[Window], attrs: Mapping[str, Any]) -> xr.Dataset:
        """Return the Dataset of all windows."""
        dims = ("document", "scorer", "budget", "kept")

        def number(name: str, long_name: str, dims: Sequence[str], units: str = "nats per token") -> Any:
            rows = torch.stack(sums.rows[None, name]).numpy()
            return xr.Variable(dims, rows, {"units": units, "long_name": long_name})

        variables = {
            "divergence": number("divergence", "divergence from the predictions with all pairs", dims),
            "loss_change": number("change", "change of the loss", dims),
            "correlation": number("correlation", "rank correlation with the measured price", dims[:2], "1"),
            "loss": number("loss", "loss with all pairs", dims[:1]),
        }
        coords = {
            "document": np.arange(len(windows)),
            "text": ("document", np.array([window.text for window in windows], dtype=str)),
            "scorer": np.array([scorer.name for scorer in self.scorers], dtype=str),
            "budget": np.array(self.budgets, dtype=str),
            "kept": np.array([float(share) for share in self.shares]),
        }
        return EVICTION.check(xr.Dataset(variables, coords, {"kind": KIND, **attrs}))

    def _continue(self, cache: CompressedCache, ids: Tensor) -> Float[Tensor, "1 position vocabulary"]:
        return self.model(input_ids=ids[:, self.prefix :], past_key_values=cache, use_cache=True).logits

    def _compare(self, full: Tensor, other: Tensor, targets: Tensor) -> tuple[float, float]:
        return compare_predictions(
            lambda positions: full[:, positions], lambda positions: other[:, positions], targets,
            self.head.chunk_length(1),
        )  # fmt: skip


def choose_pairs(
    scores: Sequence[Float[Tensor, "group key"]],
    visible: Sequence[Bool[Tensor, " key"]],
    share: Fraction,
    budget: str,
) -> Masks:
    """Return which pairs of each key/value head of all layers to keep: the highest scores of a share of those in sight.

    Args:
        scores: Of each layer.
        visible: Pairs that the next query sees, of each layer.
        share: Of the pairs that it sees.
        budget: One of `BUDGETS`.
    """
    hidden = [score.masked_fill(~seen, -torch.inf) for score, seen in zip(scores, visible, strict=True)]
    counts = [int(share * int(seen.sum())) for seen in visible]  # of each head, in equal parts
    if budget == MODEL:
        number = int(share * sum(len(score) * int(seen.sum()) for score, seen in zip(scores, visible, strict=True)))
        flat = torch.cat([score.flatten() for score in hidden])
        masks = _highest(flat, number).split([score.numel() for score in hidden])
        masks = [mask.view_as(score) for mask, score in zip(masks, hidden, strict=True)]
    elif budget == LAYER:
        masks = []
        for score, count in zip(hidden, counts, strict=True):
            sure = torch.stack([_highest(row, int(SAFEGUARD * count)) for row in score])
            raised = score.masked_fill(sure, torch.inf)
            masks.append(_highest(raised.flatten(), len(score) * count).view_as(score))
    else:
        assert budget == EQUAL
        masks = [
            torch.stack([_highest(row, count) for row in score]) for score, count in zip(hidden, counts, strict=True)
        ]
    return [row & seen for mask, seen in zip(masks, visible, strict=True) for row in mask]


def _highest(scores: Float[Tensor, " pair"], number: int) -> Bool[Tensor, " pair"]:
    """Return which are the highest of some scores."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, scores.topk(number).indices, True)
