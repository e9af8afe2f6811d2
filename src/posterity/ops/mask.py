"""Which (query, key) pairs are edges, asked one block at a time, so that no N x N mask is ever made.

A mask knows its empty blocks (outside a sliding window, in another packed document): they cost nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posterity.errors import InputError
from posterity.ops.intervals import Span

# Rows and columns of a block. On a CPU the block must fit the caches; elsewhere few large operations win.
BLOCK = {"cpu": (128, 512)}
LARGE = (512, 2048)


@dataclass(frozen=True)
class Tile:
    """A block of pairs: rows of queries, columns of keys; `offset` is the position of query 0."""

    rows: slice
    columns: slice
    offset: int
    whole: bool  # every pair of the tile with key <= query is an edge

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def lag(self) -> int:
        """Lag of the tile's upper left pair."""
        return self.offset + self.rows.start - self.columns.start


class Mask:
    """The edges of one attention call; plain causal without arguments.

    Args:
        allowed: `allowed(query, key)` gets positions that broadcast to (rows, columns) and returns bools that
            broadcast to (batch, head, rows, columns).
        padding: True at real tokens. Padding positions are never counted as readers.
    """

    def __init__(
        self,
        allowed: Callable[[Int[Tensor, "rows 1"], Int[Tensor, "1 columns"]], Bool[Tensor, "..."]] | None = None,
        padding: Bool[Tensor, "batch position"] | None = None,
    ):
        """Keep the rule; nothing is evaluated yet."""
        if allowed is None and padding is not None:
            allowed = _unpadded(padding)
        self.allowed = allowed
        self.padding = padding
        self._edges: Tensor | None = None
        self._counted: Mask | None = None  # whose edges are counted, where they are not those of `allowed`
        self._tiles: dict[tuple, list[tuple[slice, list[Tile]]]] = {}
        self._first_columns: dict[int, list[int]] = {}

    @property
    def plain(self) -> bool:
        """Whether the edges are all pairs with key <= query."""
        return self.allowed is None

    def __getitem__(self, index: Any) -> "Mask":
        """All of it, as models write `mask[:, :, first:]` with `first` 0.

        Raises:
            TypeError: Only a part is wanted, which a rule cannot give.
        """
        parts = index if isinstance(index, tuple) else (index,)
        if any(not isinstance(part, slice) or part.start or (part.stop, part.step) != (None, None) for part in parts):
            raise TypeError(f"a mask that is a rule has no part {index}; with logits_to_keep=0 none is needed")
        return self

    def tiles(self, queries: int, keys: int, device: torch.device) -> list[tuple[slice, list[Tile]]]:
        """The blocks that hold edges, row by row: (rows, tiles of these rows), in order; a row block may have none.

        Raises:
            InputError: The mask lets a query see a later key.
        """
        wanted = (queries, keys, device)
        if wanted not in self._tiles:
            height = BLOCK.get(device.type, LARGE)[0]
            blocks = [slice(top, min(top + height, queries)) for top in range(0, queries, height)]
            possible = None if self.plain else self._possible(blocks, keys - queries, keys, device)
            found = [
                (rows, self._row(rows, keys - queries, keys, device, None if possible is None else possible[at]))
                for at, rows in enumerate(blocks)
            ]
            self._tiles[wanted] = found if self.plain else self._with_edges(found, keys, device)
        return self._tiles[wanted]

    def _possible(self, blocks: list[slice], offset: int, keys: int, device: torch.device) -> list[list[bool]] | None:
        """For each row of blocks, which of its blocks may hold edges by the bounds of the rule; None if not known."""
        width = BLOCK.get(device.type, LARGE)[1]
        tops = torch.tensor([[rows.start] for rows in blocks], device=device) + offset
        bottoms = torch.tensor([[rows.stop - 1] for rows in blocks], device=device) + offset
        lefts = torch.arange(0, keys, width, device=device)[None]
        try:
            edges = self.allowed(Span(tops, bottoms), Span(lefts, (lefts + width - 1).clamp(max=keys - 1)))  # type: ignore[misc]
        except Exception:  # the rule does what has no bounds: every block is evaluated
            return None
        if not isinstance(edges, Span):
            return None
        return _four(edges.high, len(blocks), lefts.shape[1]).flatten(0, 1).any(0).tolist()

    def _row(
        self, rows: slice, offset: int, keys: int, device: torch.device, possible: list[bool] | None
    ) -> list[Tile]:
        width = BLOCK.get(device.type, LARGE)[1]
        last = offset + rows.stop  # keys from here on are later than every query of these rows
        lefts = range(0, last if self.plain else keys, width)
        columns = [slice(left, min(left + width, last if left < last else keys)) for left in lefts]
        return [
            Tile(rows, some, offset, self.plain) for at, some in enumerate(columns) if possible is None or possible[at]
        ]

    def _with_edges(
        self, rows: list[tuple[slice, list[Tile]]], keys: int, device: torch.device
    ) -> list[tuple[slice, list[Tile]]]:
        """Leave out the blocks without edges. The answers come together: a GPU is waited for once."""
        width, answers = BLOCK.get(device.type, LARGE)[1], []
        for tile in (tile for _, tiles in rows for tile in tiles):
            left = tile.columns.start
            full = replace(tile, columns=slice(left, min(left + width, keys)))  # with the later keys, for `ahead`
            allowed, causal = self._evaluate(full, device), _causal(full, device)
            answers.append(torch.stack(((allowed & ~causal).any(), allowed.any(), (allowed == causal).all())))
        answer = iter(torch.stack(answers).tolist()) if answers else iter([])
        found = []
        for some, tiles in rows:
            kept = []
            for tile, (ahead, edges, whole) in zip(tiles, answer, strict=False):
                if ahead:
                    raise InputError("the mask lets a query see later keys: only causal attention can be accounted for")
                if edges:
                    kept.append(replace(tile, whole=whole))
            found.append((some, kept))
        return found

    def fill_(
        self,
        block: Float[Tensor, "*batch_head rows columns"],
        tile: Tile,
        value: float,
        document: int | None = None,
        heads: slice | None = None,
    ):
        """Write `value` over the pairs of a block that are no edges, in place; return the block.

        `block` is (batch, head, rows, columns), or (head, rows, columns) of some `heads` of the one `document`.
        """
        if tile.whole:
            first = max(tile.lag + 1, 0)  # columns from here on hold pairs with key > query
            if first < block.shape[-1]:
                rows, columns = tile.shape
                late = _late(rows, columns - first, tile.lag - first, block.device)
                block[..., first:].masked_fill_(late, value)
            return block
        allowed = self._evaluate(tile, block.device)
        if document is not None:
            allowed = allowed[document if len(allowed) > 1 else 0]
            allowed = allowed if heads is None or len(allowed) == 1 else allowed[heads]
        return block.masked_fill_(~allowed, value)

    def diagonal(self, queries: int, keys: int, device: torch.device) -> Bool[Tensor, "#batch #head query"] | None:
        """Whether each query may see its own key; None if all may."""
        if self.allowed is None:
            return None
        at = torch.arange(keys - queries, keys, device=device)
        allowed = self.allowed(at[:, None], at[:, None])
        return _four(allowed, queries, 1).squeeze(-1)

    def self_only(self, heads: Sequence[int], of: int) -> "Mask":
        """The same for all heads but these, of so many, which see their own position only.

        What counting predicts stays what it was: `edges` are those of the mask without this limit.
        """
        return Mask(partial(_self_only, self.allowed, tuple(heads), of), self.padding).counting(self)

    def counting(self, other: "Mask") -> "Mask":
        """Let `edges` be those of another mask; return this one."""
        self._counted = other
        return self

    def among(self, chosen: Int[Tensor, "batch group query number"], heads: int, size: int = 1) -> "Mask":
        """The same, but each query sees only keys that were chosen for it, by number of a block of `size` keys.

        Groups of the `heads` query heads share a choice; numbers below 0 choose nothing. What counting predicts stays
        what it was: `edges` are those of the mask without the choice.
        """
        return Mask(partial(_among, self.allowed, chosen, heads, size), self.padding).counting(self)

    def blind(self, queries: int, keys: int, device: torch.device) -> bool:
        """Whether a query that is not padding sees no key at all."""
        seen = torch.zeros(1, 1, queries, dtype=torch.bool, device=device)
        for rows, tiles in self.tiles(queries, keys, device):
            for tile in tiles:
                some = self._evaluate(tile, device).any(-1)
                seen = seen.repeat(len(some) // len(seen) or 1, some.shape[1] // seen.shape[1] or 1, 1)
                seen[:, :, rows] |= some
        readers = self.readers(queries)
        return not bool((seen if readers is None else seen | ~readers[:, None]).all())

    def readers(self, queries: int) -> Bool[Tensor, "batch query"] | None:
        """The queries that count as readers: not padding; None if all do."""
        return None if self.padding is None else self.padding[:, -queries:]

    def starts(self, queries: int) -> Int[Tensor, " batch"] | None:
        """Index of each document's first real token; None without padding."""
        readers = self.readers(queries)
        return None if readers is None else readers.int().argmax(1)

    def first_columns(self, queries: int) -> list[int] | None:
        """`starts` as numbers; a GPU is waited for once."""
        starts = self.starts(queries)
        if starts is None:
            return None
        if queries not in self._first_columns:
            self._first_columns[queries] = starts.tolist()
        return self._first_columns[queries]

    def edges(self, length: int, device: torch.device) -> Int[Tensor, "#batch lag"]:
        """How many pairs of each lag are edges with a reader, per head; computed once.

        Raises:
            InputError: The heads have different masks.
        """
        if self._counted is not None:
            return self._counted.edges(length, device)
        if self._edges is None or self._edges.shape[-1] != length:
            if self.plain:
                self._edges = torch.arange(length, 0, -1, device=device)[None]
            else:
                self._edges = self._count(length, device)
        return self._edges

    def _count(self, length: int, device: torch.device) -> Int[Tensor, "batch lag"]:
        readers = self.readers(length)
        count = None
        for _, tiles in self.tiles(length, length, device):
            for tile in tiles:
                allowed = self._evaluate(tile, device)
                if allowed.shape[1] > 1:
                    raise InputError("the mask differs between heads, which no count of edges by lag can express")
                if readers is not None:
                    allowed = allowed & readers[:, None, tile.rows, None]
                if count is None:
                    count = torch.zeros(max(len(allowed), 1), length, dtype=torch.long, device=device)
                rows = torch.arange(tile.rows.start, tile.rows.stop, device=device)[:, None]
                lag = rows - torch.arange(tile.columns.start, tile.columns.stop, device=device)
                for document, pairs in zip(count, allowed[:, 0], strict=True):
                    document += torch.bincount(lag[pairs], minlength=length)
        return torch.zeros(1, length, dtype=torch.long, device=device) if count is None else count

    def _evaluate(self, tile: Tile, device: torch.device) -> Bool[Tensor, "#batch #head rows columns"]:
        rows = torch.arange(tile.rows.start, tile.rows.stop, device=device)[:, None] + tile.offset
        columns = torch.arange(tile.columns.start, tile.columns.stop, device=device)[None, :]
        return _four(self.allowed(rows, columns), len(rows), columns.shape[1])  # type: ignore[misc]


@lru_cache(maxsize=16)
def _late(rows: int, columns: int, lag: int, device: torch.device) -> Bool[Tensor, "rows columns"]:
    """The pairs with key > query, in a block whose upper left pair has this lag."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).triu(lag + 1)


def _causal(tile: Tile, device: torch.device) -> Bool[Tensor, "rows columns"]:
    return torch.ones(tile.shape, dtype=torch.bool, device=device).tril(tile.lag)


def _unpadded(padding: Bool[Tensor, "batch position"]) -> Callable[[Tensor, Tensor], Tensor]:
    documents = torch.arange(len(padding), device=padding.device)[:, None, None, None]
    return lambda query, key: (key <= query) & padding[documents, key]


def _self_only(
    allowed: Callable[[Tensor, Tensor], Tensor] | None, heads: tuple[int, ...], of: int, query: Tensor, key: Tensor
) -> Tensor:
    """The rule of `Mask.self_only`."""
    free = torch.ones(of, 1, 1, dtype=torch.bool, device=query.device)
    free[list(heads)] = False
    edges = key <= query if allowed is None else allowed(query, key)
    return edges & (free | (query == key))


def _among(
    allowed: Callable[[Tensor, Tensor], Tensor] | None,
    chosen: Int[Tensor, "batch group query number"],
    heads: int,
    size: int,
    query: Int[Tensor, "rows 1"],
    key: Int[Tensor, "#rows columns"],
) -> Bool[Tensor, "batch head rows columns"]:
    """The rule of `Mask.among`: one row of flags for each query of a block, never all of them."""
    edges = key <= query if allowed is None else allowed(query, key)
    some = chosen[:, :, query.flatten()].long()
    flags = torch.zeros(*some.shape[:3], int(max(key.max(), key.new_tensor(0))) // size + 2, dtype=torch.bool)
    flags = flags.to(some.device)
    none = flags.shape[-1] - 1
    flags = flags.scatter(-1, some.where((some >= 0) & (some < none), none), True)
    rows = torch.arange(len(query), device=some.device)[:, None]
    seen = flags[:, :, rows, key // size]
    return edges & (seen if len(seen[0]) == 1 else seen.repeat_interleave(heads // seen.shape[1], 1))


def _four(allowed: Tensor, rows: int, columns: int) -> Tensor:
    allowed = allowed.reshape((1,) * (4 - allowed.dim()) + allowed.shape)
    return allowed.expand(*allowed.shape[:2], rows, columns)
