"""Directions of the residual stream that a user names: probes, decoder rows of a sparse autoencoder, a lens."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from posterity.errors import InputError

_NUMBER = re.compile(r"(?<![^\W_])\d+(?![^\W_])")  # a word of a name: layers.5.probe, probe_5


@dataclass(frozen=True, eq=False)
class Directions:
    """Unit vectors of the residual stream in front of layers.

    Attributes:
        names: Of each direction: that of its tensor, with the row where a tensor has several.
        layers: The number of the layer whose input each is read from.
        vectors: Each of length 1, in float32.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]
    vectors: tuple[Float[Tensor, " width"], ...]

    @classmethod
    def read(cls, source: Any, layers: Sequence[int] | None = None) -> "Directions":
        """Read directions.

        Args:
            source: A safetensors file; or a mapping of names or layer numbers to tensors, (width) or (direction,
                width); None for none. The number in a name, such as `layers.5`, is that of the layer.
            layers: The layers for a tensor whose name has no number.

        Raises:
            InputError: A file that cannot be read; a tensor that is no list of vectors, holds what is not finite or
                only zeros, or does not say its layer.
        """
        names: list[str] = []
        numbers: list[int] = []
        vectors: list[Tensor] = []
        for name, tensor in () if source is None else _tensors(source):
            tensor = _check_tensor(name, tensor)
            for layer in _layers_of(name, layers):
                for row, vector in enumerate(tensor):
                    place = "" if _number(name) is not None else f" at {layer}"
                    names.append(f"{name}{place}" + (f"[{row}]" if len(tensor) > 1 else ""))
                    numbers.append(layer)
                    vectors.append(vector / vector.norm())
        if source is not None and not names:
            raise InputError(f"expected directions; {source} holds none")
        return cls(tuple(names), tuple(numbers), tuple(vectors))

    def of_layer(self, layer: int) -> list[int]:
        """Return which of the directions are read in front of a layer."""
        return [index for index, number in enumerate(self.layers) if number == layer]


def _tensors(source: Any) -> Iterator[tuple[str, Any]]:
    """Yield names and tensors, of a file in the order of its names."""
    if isinstance(source, Mapping):
        yield from ((str(name), tensor) for name, tensor in source.items())
        return
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"directions expects a safetensors file or a dict of tensors by layer; got {type(source).__name__}"
        )
    try:
        with safe_open(Path(source), "pt") as file:
            yield from ((name, file.get_tensor(name)) for name in sorted(file.keys()))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{source}: expected a safetensors file with directions; {error}") from error


def _check_tensor(name: str, tensor: Any) -> Float[Tensor, "direction width"]:
    if not isinstance(tensor, Tensor):
        raise InputError(f"directions: {name!r} is no tensor but a {type(tensor).__name__}")
    if tensor.dim() not in (1, 2) or not tensor.numel() or not tensor.is_floating_point():
        raise InputError(
            f"directions: {name!r} is {tensor.dtype} of the shape {[*tensor.shape]}; expected real numbers, (width) or "
            "(direction, width)"
        )
    rows = tensor.detach().float().cpu().reshape(-1, tensor.shape[-1])
    if not rows.isfinite().all():
        raise InputError(f"directions: {name!r} holds what is not finite")
    if (empty := (rows == 0).all(1)).any():
        raise InputError(f"directions: row {int(empty.nonzero()[0])} of {name!r} is zero")
    return rows


def _number(name: str) -> int | None:
    """Return the number of the layer that a name says; None if it says none.

    Raises:
        InputError: It says several.
    """
    numbers = _NUMBER.findall(name)
    if len(numbers) > 1:
        raise InputError(f"directions: {name!r} has several numbers; expected that of a layer alone, as in 'layers.5'")
    return int(numbers[0]) if numbers else None


def _layers_of(name: str, layers: Sequence[int] | None) -> Sequence[int]:
    number = _number(name)
    if number is not None:
        return [number]
    if not layers:
        raise InputError(
            f"directions: {name!r} names no layer; call it such as 'layers.5', or say which with layers=[5] "
            "(--layers 5)"
        )
    return layers
