"""Prices: predict what cached keys and values will be worth, from prices that were measured on texts."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterity._version import __version__
from posterity.atomic_files import write_atomically
from posterity.decomposition.accumulator import Accumulator
from posterity.decomposition.projections import plain_tensors
from posterity.errors import InputError
from posterity.inputs.arguments import open_model, split_arguments
from posterity.inputs.named_documents import name_texts, open_files
from posterity.inputs.windows import read_corpus, token_digest
from posterity.measurement.distributed import Processes
from posterity.measurement.price_account import SAMPLES, check_prices
from posterity.measurement.price_calibration import Judgement, calibrate, judge_predictions
from posterity.measurement.price_measurement import PriceMeasurement, solve_head
from posterity.measurement.run_state import RunState, fingerprint
from posterity.models.attach import watch_model
from posterity.models.compressed_cache import cache_windows
from posterity.models.language_model import freeze_parameters, language_model
from posterity.models.observed_attention import OBSERVATIONS
from posterity.models.price_heads import MAPS, OTHERS, PriceHead
from posterity.progress import progress_bar

CONTEXT, LIMIT = 1024, 16  # tokens of a window, and windows, unless said
HORIZON = 256  # queries that prices are for
HELD_OUT = 4  # every so many windows, one judges
WEIGHTS_FILE = "prices.safetensors"
VERSION = 2  # of this file
SAMPLED = 64  # numbers of each parameter that tell a model from another


@dataclass(frozen=True, eq=False)
class Prices:
    """What predicts the price of a cached pair when it is cached, for one model.

    Attributes:
        heads: A linear map for each layer, by number of the attention layer.
        horizon: Later queries that a price is for.
        model_digest: Of the model that the prices are of.
        judgement: On held-out windows; None where the text had too few to hold one out.
        calibration: What predicted logarithms of prices stand for: two rows, predictions and logarithms of means of
            measured prices; both grow. What is between is interpolated.
        attrs: Model, texts and settings.
    """

    heads: tuple[PriceHead, ...]
    horizon: int
    model_digest: str
    judgement: Judgement | None
    calibration: Float[Tensor, "two point"]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        model: Any = "default",
        tokenizer: Any = None,
        documents: Any = None,
        *,
        context: int = CONTEXT,
        limit: int = LIMIT,
        prices: str = SAMPLES,
        horizon: int = HORIZON,
        seed: int = 0,
        progress: bool = True,
        state: str | os.PathLike[str] | None = None,
        attrs: Mapping[str, object] | None = None,
    ) -> "Prices":
        """Measure prices on windows of text, and fit what predicts them from the layers' inputs.

        A window is cut into parts of `horizon` tokens. At each cut, the pairs before it are priced for the queries of
        the next part: at ages from 1 to the window's length. Every fourth window is held out and judges.

        Args:
            model: As in `posterity.measure`: a model, or the name of one.
            tokenizer: As in `posterity.measure`.
            documents: As in `posterity.measure`.
            context: Tokens of a window, two horizons at least.
            limit: The largest number of windows, those that judge among them.
            prices: "samples" or "text", as in `posterity.measure`.
            horizon: Later queries that a price is for.
            seed: Of the drawn labels.
            progress: Whether to show a progress bar on stderr.
            state: A folder that keeps what has been measured; where it holds some, the run goes on from there.
            attrs: Provenance to add.

        Raises:
            InputError: A model that cannot be measured, or whose cache cannot be compressed; too short a context; no
                text.
        """
        if check_prices(prices) is None:
            raise InputError("prices expects 'text' or 'samples'; got None")
        if horizon < 1 or context < 2 * horizon:
            raise InputError(
                f"expected a context of two horizons at least; got {context} tokens and a horizon of {horizon}: raise "
                "`context` (--context) or lower `horizon` (--horizon)"
            )
        tokenizer, documents = split_arguments(tokenizer, documents)
        documents = open_files(documents)
        loaded = open_model(model, tokenizer)
        inner = language_model(loaded.model)
        windows_of_layers = cache_windows(inner)
        corpus = read_corpus(name_texts(documents), loaded.tokenizer, context, limit)
        windows = corpus.windows
        settings = {
            "version": __version__, "kind": "prices", "dtype": str(inner.dtype), "context": context,
            "horizon": horizon, "prices": prices, "seed": seed, "text": token_digest(windows),
            "model": "" if state is None else fingerprint(inner),
        }  # fmt: skip
        held_out = [number for number in range(len(windows)) if number % HELD_OUT == HELD_OUT - 1]
        run_state = RunState.open(state, settings, Processes())
        remaining = [number for number in run_state.remaining_windows(len(windows)) if number not in held_out]
        sums, layers = Accumulator(), len(windows_of_layers)
        with (
            run_state.hold_lock(len(remaining)),
            watch_model(inner) as watch,
            freeze_parameters(inner),
            progress_bar(len(remaining) + len(held_out), progress) as advance,
        ):
            measurement = PriceMeasurement(inner, watch, windows_of_layers, horizon, prices, seed)
            run_state.start(sums)
            for number in remaining:
                measurement.add(sums, windows[number])
                run_state.add_windows(sums, [number])
                advance(1, context)
            run_state.finish(sums)
            heads = tuple(solve_head(sums, number, windows_of_layers[number]) for number in range(layers))
            trials = []
            for number in held_out:
                trials.append(measurement.predict(heads, windows[number]))
                advance(1, context)
        text = {
            "text_digest": settings["text"], "text_name": "; ".join(dict.fromkeys(x.text for x in windows)),
            "windows": len(windows) - len(held_out), "context": context, "prices": prices, "seed": seed,
            "posterity": __version__, **corpus.coverage.attrs(),
        }  # fmt: skip
        return cls(
            heads,
            horizon,
            model_digest(inner),
            judge_predictions(trials),
            calibrate(trials),
            text | loaded.attrs | dict(attrs or {}),
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the prices to a folder: `prices.safetensors`, whole or not at all.

        Raises:
            InputError: It cannot be written.
        """
        tensors = {"calibration": self.calibration.cpu()}
        for layer, head in enumerate(self.heads):
            tensors |= {f"{layer}.{name}": x.cpu() for name, x in head.tensors().items()}
        description = {
            "version": VERSION, "horizon": self.horizon, "model_digest": self.model_digest,
            "windows": [head.window for head in self.heads],
            "judgement": None if self.judgement is None else asdict(self.judgement), "attrs": dict(self.attrs),
        }  # fmt: skip
        data = save({name: x.contiguous() for name, x in tensors.items()}, {"posterity": json.dumps(description)})
        target = check_price_folder(folder)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{folder}: expected a folder that can be made; {error.strerror}: choose another"
            ) from error
        write_atomically(target / WEIGHTS_FILE, data)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Prices":
        """Read the prices of a folder.

        Raises:
            InputError: There are none; they are damaged, or of another version.
        """
        file = Path(folder) / WEIGHTS_FILE
        if not file.is_file():
            raise InputError(
                f"{folder}: expected a folder with {WEIGHTS_FILE}, which posterity prices writes; there is none"
            )
        try:
            with safe_open(file, "pt") as source:
                description = json.loads((source.metadata() or {})["posterity"])
                tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
            version = description["version"]
            prices = cls._restore(tensors, description) if version == VERSION else None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: expected prices, but it is damaged: fit them again") from error
        if prices is None:
            raise InputError(f"{file} is of version {version}; this is posterity for version {VERSION}: fit them again")
        return prices

    @classmethod
    def _restore(cls, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> "Prices":
        """Return the prices of a file. ValueError, KeyError or TypeError for anything that is none."""
        heads = tuple(
            _check_head(PriceHead(window=window, **{name: tensors[f"{layer}.{name}"] for name in MAPS}))
            for layer, window in enumerate(description["windows"])
        )
        judgement = description["judgement"]
        return cls(
            heads, int(description["horizon"]), str(description["model_digest"]),
            None if judgement is None else Judgement(**judgement), _check_calibration(tensors["calibration"]),
            dict(description["attrs"]),
        )  # fmt: skip

    def check_model(self, model: nn.Module) -> None:
        """Raise InputError unless the prices are of this model."""
        inner = language_model(model)
        if model_digest(inner) != self.model_digest:
            name = self.attrs.get("model", "another model")
            raise InputError(
                f"expected the model that the prices were fitted on ({name}); got another, or other weights: fit "
                "prices for it (posterity prices)"
            )

    def __str__(self) -> str:
        """Say what the prices are of, and how well they predict, in lines."""
        groups, attrs = sum(head.groups for head in self.heads), self.attrs
        lines = [
            f"Prices of {groups} key/value heads in {len(self.heads)} layers of {attrs.get('model') or 'a model'}, "
            f"from {attrs.get('windows')} windows of {attrs.get('context')} tokens",
        ]
        if self.judgement is None:
            return "\n".join([*lines, "Too few windows to hold one out: no word on how well they predict"])
        x = self.judgement

        def error(value: float) -> str:
            return "" if math.isnan(value) else f" ± {value:.2f}"

        lines.append(
            f"On {x.windows} held-out windows: rank correlation with measured prices {x.correlation:.2f}"
            f"{error(x.correlation_error)}"
        )
        if not math.isnan(x.cheap_ratio):
            lines[-1] += (
                f"; of the cheapest three quarters, predicted by measured sum {x.cheap_ratio:.2f}"
                f"{error(x.cheap_ratio_error)} (standard errors over windows)"
            )
        return "\n".join(lines)


def check_price_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a folder that prices can be written to.

    Raises:
        InputError: It is a file, or holds something else.
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise InputError(f"{folder}: expected a folder for the prices; it is a file: choose another")
    if target.is_dir() and any(target.iterdir()) and not (target / WEIGHTS_FILE).is_file():
        raise InputError(f"{folder}: expected a new folder, or one with {WEIGHTS_FILE}; it holds something else")
    return target


def _check_calibration(calibration: Tensor) -> Tensor:
    grows = calibration.dim() == 2 and len(calibration) == 2 and bool((calibration.diff() >= 0).all())
    if not grows or not calibration.isfinite().all() or not calibration.shape[1]:
        raise ValueError("no calibration of prices")
    return calibration


def _check_head(head: PriceHead) -> PriceHead:
    observations = (OBSERVATIONS + OTHERS, head.groups)
    shapes = [tuple(x.shape) for x in head.tensors().values()]
    fits = shapes == [(head.width + OTHERS, head.groups), (head.groups,), observations, (head.groups,)]
    if not fits or not all(x.isfinite().all() for x in head.tensors().values()):
        raise ValueError("no weights of prices")
    return head


def model_digest(model: PreTrainedModel) -> str:
    """Return a hash of the names and shapes of a model's parameters, and of some numbers of each, in bfloat16.

    It is the same on every device, and for a model in float32 and in bfloat16.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        for plain in () if parameter.is_meta else plain_tensors(parameter):
            numbers = plain.detach().reshape(-1)
            picked = numbers[:: max(1, len(numbers) // SAMPLED)]
            digest.update(picked.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()
