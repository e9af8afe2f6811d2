"""A model that runs folded for good: some heads pass their own value on, the rest attends as usual.

The weights are those of the model, in an ordinary folder of transformers, which plain transformers loads and runs
unfolded. Which heads are folded stands in `folded.json` beside them. `load_folded`, and whatever else of posterity
loads that folder, writes them into the model's config (`posterity_folded`: heads by the `layer_idx` of their module)
and switches its attention to a function that looks them up there. So the fold lives as long as the model, copies
included, and works with a key/value cache: the newest queries get the newest values. The cache still holds the keys
of folded heads, which nobody reads.

Measuring exchanges the attention function; the operator (hook.py) then finds the folded heads in the config too, as
heads whose mask leaves the self edge only.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterity.errors import InputError
from posterity.models.masks import WRITTEN, edges_and_bias
from posterity.models.probe import check, first_device, language_model
from posterity.models.recompute import differ, rounding
from posterity.models.transformers_logging import quiet
from posterity.models.watch import FOLDED, folded_heads, register
from posterity.ops.attention import attention
from posterity.ops.mask import Mask
from posterity.results.schema import write_whole

FILE = "folded.json"
VERSION = 1
Heads = Mapping[int, Sequence[int]]  # query heads by number of the attention layer


def load_folded(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Load a model that `posterity fold` wrote; it runs folded for good, and can be measured as it is.

    Raises:
        InputError: The folder holds no folded model, or one that is damaged.
    """
    from posterity.inputs import model as loading  # which recognises a folded folder by this module

    if not (Path(folder) / FILE).is_file():
        raise InputError(f"expected a folder that `posterity fold` wrote; {folder} has no {FILE}: load it as any model")
    return loading.load_model(os.fspath(folder)).model


def save_folded(model: nn.Module, tokenizer: Any, heads: Heads, folder: Path, known: Mapping[str, Any]) -> None:
    """Write a folder of transformers and `folded.json`, together or not at all.

    Args:
        model: The model; if it runs folded itself, its own folded heads are written too.
        tokenizer: Its tokenizer, or None.
        heads: What is folded.
        folder: A new folder, an empty one, or that of a folded model, whose place is taken.
        known: What else is kept in `folded.json`: losses, budget, text.

    Raises:
        InputError: The folder holds something else; it cannot be written; the model cannot be folded for good.
    """
    inner = language_model(model)
    target = checked_folder(folder)
    every = {number: sorted({*heads.get(number, ()), *own}) for number, own in _own(inner).items()}
    data = {"version": VERSION, "heads": {str(number): some for number, some in every.items() if some}, **known}
    config = inner.config.get_text_config(decoder=True)
    before = getattr(config, FOLDED, None)
    try:
        with quiet(), tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as work:
            made = Path(work) / "model"
            vars(config).pop(FOLDED, None)  # the folder's config is the plain model's
            inner.save_pretrained(made)
            if tokenizer is not None:
                tokenizer.save_pretrained(made)
            write_whole(made / FILE, json.dumps(data, indent=1).encode())
            if target.exists():
                os.rename(target, Path(work) / "old")
            os.rename(made, target)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{folder}: expected to write a model there; {reason}: choose another folder") from error
    finally:
        if before is not None:
            setattr(config, FOLDED, before)


def checked_folder(folder: str | os.PathLike[str]) -> Path:
    """Say before the work whether a folded model can be written to a folder; returns its real path."""
    if "\0" in os.fspath(folder):
        raise InputError(f"{folder}: expected a folder that can be made: a name holds no zero byte; choose another")
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise InputError(f"{folder}: expected a folder for the folded model; it is a file: choose another")
    if target.is_dir() and any(target.iterdir()) and not (target / FILE).is_file():
        raise InputError(f"{folder}: expected a new folder or that of a folded model, but it holds something else")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: expected a folder that can be made, but {target.parent} is none to write in")
    return target


def run_as_saved(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Let a model that was just loaded run folded, if its folder says so.

    Raises:
        InputError: `folded.json` is damaged or of another version; the heads do not fit the model.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        config = model.config.get_text_config(decoder=True)
        if given := vars(config).pop(FOLDED, None):  # saved again by transformers; it does not run folded yet
            try:
                numbers = {module.layer_idx: number for number, module in enumerate(attention_modules(model))}
                keep_folded(model, {numbers[layer]: some for layer, some in _listed(given).items()})
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{folder}: its {FOLDED} in config.json is damaged: fold it again") from error
        return
    try:
        data = json.loads(file.read_text())
        version = data["version"]
        heads = _listed(data["heads"]) if version == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: expected the heads of a folded model, but it is damaged: fold it again") from error
    if version != VERSION:
        raise InputError(f"{file} is of version {version}; this is posterity for version {VERSION}: fold it again")
    keep_folded(model, heads)


def _listed(named: Any) -> dict[int, list[int]]:
    """Heads by number of the layer, as JSON holds them. ValueError or TypeError for anything else."""
    if not isinstance(named, dict):
        raise TypeError("expected heads by layer")
    heads = {int(number): list(some) for number, some in named.items()}
    every = [*heads, *(head for some in heads.values() for head in some)]
    if len(heads) < len(named) or any(type(one) is not int or one < 0 for one in every):
        raise ValueError("expected whole numbers of layers and heads")
    return heads


def keep_folded(model: PreTrainedModel, heads: Heads) -> None:
    """Let a model run folded from now on.

    Raises:
        InputError: The model cannot be measured; its modules cannot be told apart by `layer_idx`; no such head.
    """
    from posterity.measurement.head_folding import folding  # which imports this module

    if check(model).name == WRITTEN:
        raise InputError(f"{type(model).__name__} computes with its mask: fold it inside a `with` of folding")
    modules, ids = attention_modules(model), torch.arange(1, 9, device=first_device(model))[None]
    ids %= model.config.get_text_config().vocab_size
    with torch.no_grad(), folding(model, heads):
        wanted = model(input_ids=ids, use_cache=False).logits
    _switch(model, {str(modules[number].layer_idx): sorted(some) for number, some in heads.items() if len(some)})
    with torch.no_grad():
        given = model(input_ids=ids, use_cache=False).logits
    if differ(wanted, given) > rounding(given.dtype) * wanted.abs().max().item():
        raise InputError(f"{type(model).__name__} cannot run folded: its logits are not those of its folded heads")


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """The attention modules in order, if each can be found by its `layer_idx` in the text model's config.

    Raises:
        InputError: They cannot; the model cannot be measured.
    """
    found = check(model)
    if not found.ok:
        raise InputError(f"this model {found}")
    modules = [model.get_submodule(layer.name) for layer in found.layers]
    numbers = [getattr(module, "layer_idx", None) for module in modules]
    config = model.config.get_text_config(decoder=True)
    if None in numbers or len({*numbers}) < len(numbers) or any(one.config is not config for one in modules):
        raise InputError(
            f"{type(model).__name__} cannot run folded for good: its attention modules have no layer_idx of their own; "
            "use posterity.measurement.head_folding.folding inside a `with`"
        )
    return modules


def pass_own_values(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Sequence[int],
    attend: Callable[[Tensor, Tensor, Tensor, list[int]], Tensor],
) -> Tensor:
    """(batch, head, query, dim_v): the own value for these heads; the rest attends, and only the rest is computed.

    Queries stand at the last positions. `attend(query, key, value, rest)` gets the rest's, one key and value a head.
    """
    of, newest = query.shape[1], value[:, :, value.shape[2] - query.shape[2] :]
    output = newest.repeat_interleave(of // value.shape[1], 1)
    rest = [head for head in range(of) if head not in heads]
    if rest:
        shared = [head // (of // value.shape[1]) for head in rest]
        output[:, rest] = attend(query[:, rest], key[:, shared], value[:, shared], rest).to(output.dtype)
    return output


def mask_of(mask: Mask, heads: Sequence[int]) -> Mask:
    """The mask of some heads of a call."""
    rule = mask.allowed
    if rule is None:
        return mask

    def allowed(query: Tensor, key: Tensor) -> Tensor:
        edges = rule(query, key)
        return edges[..., list(heads), :, :] if edges.dim() > 2 and edges.shape[-3] > 1 else edges

    return Mask(allowed, mask.padding)


def _own(model: PreTrainedModel) -> dict[int, list[int]]:
    """The heads that a model passes on already, by number of the attention layer."""
    return {number: folded_heads(module) for number, module in enumerate(attention_modules(model))}


def _switch(model: PreTrainedModel, heads: Mapping[str, Sequence[int]]) -> None:
    register(FOLDED, _folded_attention)
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    setattr(text, FOLDED, {key: list(some) for key, some in heads.items()})
    names = [name for name in config.sub_configs if getattr(config, name, None) is text]
    model.set_attn_implementation({"": config._attn_implementation, names[0]: FOLDED} if names else FOLDED)


@torch.compiler.disable
def _folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers: (batch, head, position, dim) in, (batch, position, head, dim) out."""
    if dropout:
        raise InputError("a folded model attends without dropout: set attention_dropout to 0, or call model.eval()")
    mask, bias = edges_and_bias(module, query, key, attention_mask, is_causal, kwargs)
    if bias is not None:
        raise InputError("its attention adds a bias to the scores, which a folded model does not know")

    def attend(query: Tensor, key: Tensor, value: Tensor, rest: list[int]) -> Tensor:
        return attention(query, key, value, scaling, mask=mask_of(mask, rest), softcap=softcap)

    output = pass_own_values(query, key, value, folded_heads(module), attend)
    return output.transpose(1, 2).contiguous(), None
