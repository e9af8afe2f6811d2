"""Which (query, key) pairs are edges, evaluated one block at a time, so that no N x N mask is ever made.

As in FlexAttention, a rule says which pairs are edges (mask_mods.py), and blocks are empty, partial or full. Empty ones
(outside a sliding window, in another packed document) cost nothing; most are not even evaluated (intervals.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posterity.errors import InputError
from posterity.ops.intervals import Interval
from posterity.ops.mask_mods import (
    MaskMod,
    padding_mask_mod,
    selected_keys_mask_mod,
    self_only_mask_mod,
    window_mask_mod,
)

# Rows and columns of a block. On a CPU the block must fit the caches; elsewhere few large operations win.
BLOCK = {"cpu": (128, 512)}
LARGE = (512, 2048)


@dataclass(frozen=True)
class Tile:
    """A block of pairs: rows of queries, columns of keys; `offset` is the position of query 0."""

    rows: slice
    columns: slice
    offset: int
    full: bool  # every pair of the tile with key <= query is an edge

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def lag(self) -> int:
        """Lag of the tile's upper left pair."""
        return self.offset + self.rows.start - self.columns.start


TileRow = tuple[slice, list[Tile]]  # rows of queries, and their tiles in order


class Mask:
    """The edges of one attention call; plain causal without arguments.

    Args:
        allowed: `allowed(query, key)` gets positions that broadcast to (rows, columns) and returns bools that
            broadcast to (batch, head, rows, columns).
        padding: True at real tokens. Padding positions are never counted as readers.
    """

    def __init__(self, allowed: MaskMod | None = None, padding: Bool[Tensor, "batch position"] | None = None):
        """Keep the rule; nothing is evaluated yet."""
        if allowed is None and padding is not None:
            allowed = padding_mask_mod(padding)
        self.allowed = allowed
        self.padding = padding
        self.tables: dict[tuple, Any] = {}  # of block_table.py
        self._edges: Tensor | None = None
        self._counted: Mask | None = None  # whose edges are counted, where they are not those of `allowed`
        self._tiles: dict[tuple, list[TileRow]] = {}
        self._first_columns: dict[int, list[int]] = {}
        self._edges_into: dict[tuple, Tensor] = {}

    @property
    def plain(self) -> bool:
        """True if the edges are all pairs with key <= query."""
        return self.allowed is None

    def __getitem__(self, index: Any) -> "Mask":
        """Return the mask itself, for models that write `mask[:, :, first:]` with `first` 0.

        Raises:
            TypeError: The index selects a part, which a rule cannot give.
        """
        parts = index if isinstance(index, tuple) else (index,)
        if any(not isinstance(part, slice) or part.start or (part.stop, part.step) != (None, None) for part in parts):
            raise TypeError(f"a mask that is a rule has no part {index}; with logits_to_keep=0 none is needed")
        return self

    def contiguous(self) -> NoReturn:
        """Refuse what only generation with a static cache asks of a mask: it must be a tensor there.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "generation with a static cache needs masks written out, which a watched model has not: leave "
            "cache_implementation out, or generate outside the `with`"
        )

    def tiles(self, queries: int, keys: int, device: torch.device) -> list[TileRow]:
        """Return the blocks that hold edges, row by row: (rows, tiles of these rows); a row may have no tile.

        Raises:
            InputError: The mask lets a query see a later key.
        """
        call = (queries, keys, device)
        if call not in self._tiles:
            height = BLOCK.get(device.type, LARGE)[0]
            blocks = [slice(top, min(top + height, queries)) for top in range(0, queries, height)]
            candidates = None if self.plain else self._candidates(blocks, keys - queries, keys, device)
            tile_rows = [
                (rows, self._row_tiles(rows, keys - queries, keys, device, candidates[number] if candidates else None))
                for number, rows in enumerate(blocks)
            ]
            self._tiles[call] = tile_rows if self.plain else self._without_empty(tile_rows, keys, device)
        return self._tiles[call]

    def _candidates(self, blocks: list[slice], offset: int, keys: int, device: torch.device) -> list[list[bool]] | None:
        """Return for each row of blocks which of them may hold edges, by the bounds of the rule; None if unknown."""
        width = BLOCK.get(device.type, LARGE)[1]
        tops = torch.tensor([[rows.start] for rows in blocks], device=device) + offset
        bottoms = torch.tensor([[rows.stop - 1] for rows in blocks], device=device) + offset
        lefts = torch.arange(0, keys, width, device=device)[None]
        queries, columns = Interval(tops, bottoms), Interval(lefts, (lefts + width - 1).clamp(max=keys - 1))
        try:
            edges = self.allowed(queries, columns)  # type: ignore[misc]
        except Exception:  # the rule does what has no bounds: every block is evaluated
            return None
        if not isinstance(edges, Interval):
            return None
        return _as_4d(edges.high, len(blocks), lefts.shape[1]).flatten(0, 1).any(0).tolist()

    def _row_tiles(
        self, rows: slice, offset: int, keys: int, device: torch.device, candidates: list[bool] | None
    ) -> list[Tile]:
        width = BLOCK.get(device.type, LARGE)[1]
        end = offset + rows.stop  # keys from here on are later than every query of these rows
        lefts = range(0, end if self.plain else keys, width)
        columns = [slice(left, min(left + width, end if left < end else keys)) for left in lefts]
        return [
            Tile(rows, block, offset, self.plain)
            for number, block in enumerate(columns)
            if candidates is None or candidates[number]
        ]

    def _without_empty(self, tile_rows: list[TileRow], keys: int, device: torch.device) -> list[TileRow]:
        """Leave out the blocks without edges. The answers come together: a GPU is waited for once."""
        width, answers = BLOCK.get(device.type, LARGE)[1], []
        for tile in (tile for _, tiles in tile_rows for tile in tiles):
            left = tile.columns.start
            wide = replace(tile, columns=slice(left, min(left + width, keys)))  # with the later keys, for `ahead`
            allowed, causal = self._evaluate(wide, device), _causal(wide, device)
            answers.append(torch.stack(((allowed & ~causal).any(), allowed.any(), (allowed == causal).all())))
        answer = iter(torch.stack(answers).tolist()) if answers else iter([])
        nonempty = []
        for rows, tiles in tile_rows:
            nonempty.append((rows, []))
            for tile, (ahead, edges, full) in zip(tiles, answer, strict=False):
                if ahead:
                    raise InputError("the mask lets a query see later keys: only causal attention can be accounted for")
                if edges:
                    nonempty[-1][1].append(replace(tile, full=full))
        return nonempty

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
        if tile.full:
            first = max(tile.lag + 1, 0)  # columns from here on hold pairs with key > query
            if first < block.shape[-1]:
                rows, columns = tile.shape
                later = _later_keys(rows, columns - first, tile.lag - first, block.device)
                block[..., first:].masked_fill_(later, value)
            return block
        allowed = self._evaluate(tile, block.device)
        if document is not None:
            allowed = allowed[document if len(allowed) > 1 else 0]
            allowed = allowed if heads is None or len(allowed) == 1 else allowed[heads]
        return block.masked_fill_(~allowed, value)

    def diagonal(self, queries: int, keys: int, device: torch.device) -> Bool[Tensor, "#batch #head query"] | None:
        """Return for each query whether it may see its own key; None if all may."""
        if self.allowed is None:
            return None
        positions = torch.arange(keys - queries, keys, device=device)[:, None]
        return _as_4d(self.allowed(positions, positions), queries, 1).squeeze(-1)

    def restrict_to_self(self, heads: Sequence[int], head_count: int) -> "Mask":
        """Return the mask under which these heads, of `head_count`, see their own position only.

        What counting predicts stays what it was: `edges` are those of the mask without this limit.
        """
        allowed = partial(self_only_mask_mod, self.allowed, tuple(heads), head_count)
        return Mask(allowed, self.padding).count_edges_of(self)

    def limit_window(self, window: int, sinks: int = 0) -> "Mask":
        """Return the mask under which a query sees its own position, the `window` - 1 before it, and the first keys.

        Args:
            window: Positions that a query sees, its own included, at least 1.
            sinks: First keys that it sees besides, counted from the first token that is no padding.
        """
        starts = None if sinks == 0 or self.padding is None else self.padding.int().argmax(1)
        return Mask(partial(window_mask_mod, self.allowed, window, sinks, starts), self.padding)

    def select_keys(self, selection: Int[Tensor, "batch group query number"], heads: int, size: int = 1) -> "Mask":
        """Return the mask under which each query sees only keys selected for it, by number of a block of `size` keys.

        Groups of the `heads` query heads share a selection; numbers below 0 select nothing. What counting predicts
        stays what it was: `edges` are those of the mask without the selection.
        """
        allowed = partial(selected_keys_mask_mod, self.allowed, selection, heads, size)
        return Mask(allowed, self.padding).count_edges_of(self)

    def count_edges_of(self, other: "Mask") -> "Mask":
        """Let `edges` be those of another mask; return this one."""
        self._counted = other
        return self

    def has_blind_query(self, queries: int, keys: int, device: torch.device) -> bool:
        """Return whether a query that is not padding sees no key at all."""
        seeing = torch.zeros(1, 1, queries, dtype=torch.bool, device=device)
        for rows, tiles in self.tiles(queries, keys, device):
            for tile in tiles:
                edges = self._evaluate(tile, device).any(-1)
                seeing = seeing.repeat(len(edges) // len(seeing) or 1, edges.shape[1] // seeing.shape[1] or 1, 1)
                seeing[:, :, rows] |= edges
        readers = self.readers(queries)
        return not bool((seeing if readers is None else seeing | ~readers[:, None]).all())

    def readers(self, queries: int) -> Bool[Tensor, "batch query"] | None:
        """Return the queries that count as readers: not padding; None if all do."""
        return None if self.padding is None else self.padding[:, -queries:]

    def starts(self, queries: int) -> Int[Tensor, " batch"] | None:
        """Return the index of each document's first real token; None without padding."""
        readers = self.readers(queries)
        return None if readers is None else readers.int().argmax(1)

    def first_columns(self, queries: int) -> list[int] | None:
        """Return `starts` as numbers; a GPU is waited for once."""
        starts = self.starts(queries)
        if starts is None:
            return None
        if queries not in self._first_columns:
            self._first_columns[queries] = starts.tolist()
        return self._first_columns[queries]

    def edges(self, length: int, device: torch.device) -> Int[Tensor, "#batch lag"]:
        """Count the edges of each lag that have a reader, per head; counted once.

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

    def edges_into(
        self, length: int, device: torch.device, keys: int, documents: tuple[tuple[tuple[int, int], ...], ...]
    ) -> Int[Tensor, "#batch lag"]:
        """Count those of `edges` that end in the first `keys` keys of a document.

        `documents`: for each row the first query of each document, and its end.

        Raises:
            InputError: The heads have different masks.
        """
        if self._counted is not None:
            return self._counted.edges_into(length, device, keys, documents)
        call = (length, device, keys, documents)
        if call not in self._edges_into:
            count = torch.zeros(len(documents), length, dtype=torch.long, device=device)
            for row, spans in enumerate(documents):
                for start, stop in spans:
                    if self.plain:
                        count[row] += (stop - start - torch.arange(length, device=device)).clamp(0, keys)
                    else:
                        tile = Tile(slice(start, stop), slice(start, min(start + keys, stop)), 0, False)
                        pairs = self._pairs(tile, length, device)
                        count[row] += _count_by_lag(pairs[row if len(pairs) > 1 else 0, 0], tile, length)
            self._edges_into[call] = count
        return self._edges_into[call]

    def _count(self, length: int, device: torch.device) -> Int[Tensor, "batch lag"]:
        count = None
        for _, tiles in self.tiles(length, length, device):
            for tile in tiles:
                allowed = self._pairs(tile, length, device)
                if count is None:
                    count = torch.zeros(max(len(allowed), 1), length, dtype=torch.long, device=device)
                for document, pairs in zip(count, allowed[:, 0], strict=True):
                    document += _count_by_lag(pairs, tile, length)
        return torch.zeros(1, length, dtype=torch.long, device=device) if count is None else count

    def _pairs(self, tile: Tile, length: int, device: torch.device) -> Bool[Tensor, "#batch 1 rows columns"]:
        """Return the edges of a block that have a reader."""
        allowed, readers = self._evaluate(tile, device), self.readers(length)
        if allowed.shape[1] > 1:
            raise InputError("the mask differs between heads, which no count of edges by lag can express")
        return allowed if readers is None else allowed & readers[:, None, tile.rows, None]

    def _evaluate(self, tile: Tile, device: torch.device) -> Bool[Tensor, "#batch #head rows columns"]:
        rows = torch.arange(tile.rows.start, tile.rows.stop, device=device)[:, None] + tile.offset
        columns = torch.arange(tile.columns.start, tile.columns.stop, device=device)[None, :]
        return _as_4d(self.allowed(rows, columns), len(rows), columns.shape[1])  # type: ignore[misc]


@lru_cache(maxsize=16)
def _later_keys(rows: int, columns: int, lag: int, device: torch.device) -> Bool[Tensor, "rows columns"]:
    """Mark the pairs with key > query, in a block whose upper left pair has this lag."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).triu(lag + 1)


def _count_by_lag(pairs: Bool[Tensor, "rows columns"], tile: Tile, length: int) -> Int[Tensor, " lag"]:
    """Count the pairs of a block by lag."""
    rows = torch.arange(tile.rows.start, tile.rows.stop, device=pairs.device)[:, None]
    lag = rows - torch.arange(tile.columns.start, tile.columns.stop, device=pairs.device)
    return torch.bincount(lag[pairs], minlength=length)


def _causal(tile: Tile, device: torch.device) -> Bool[Tensor, "rows columns"]:
    return torch.ones(tile.shape, dtype=torch.bool, device=device).tril(tile.lag)


def _as_4d(allowed: Tensor, rows: int, columns: int) -> Tensor:
    allowed = allowed.reshape((1,) * (4 - allowed.dim()) + allowed.shape)
    return allowed.expand(*allowed.shape[:2], rows, columns)
