"""Attention calls that read the same queries, keys or values, as layers do that borrow the keys of an earlier layer.

The gradient of a shared tensor is the sum over all calls that read it. It is complete when the backward pass reaches
the first of these calls, the owner, for whose layer the tensor was made: calls that borrow come later in the forward
pass and earlier in the backward pass. Until then their finished backward passes wait.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from weakref import ref

import torch
from torch import Tensor

from posterity.errors import InputError
from posterity.ops.attention import Backward, SharedStream

Flags = tuple[bool, bool, bool]  # of query, key and value
Report = Callable[[Backward], None]
# Nodes of the graph that hand a tensor on unchanged, as a copy to another device does.
_COPIES = frozenset(("ToCopyBackward0", "CloneBackward0", "AliasBackward0"))


@dataclass(eq=False)
class SharingCalls:
    """The calls of one forward pass that read tensors of the first of them, the owner."""

    owner: Hashable
    borrowed: dict[Hashable, Flags] = field(default_factory=dict)  # by call
    _waiting: dict[Hashable, tuple[Backward, Report]] = field(default_factory=dict)

    def finish(self, call: Hashable, back: Backward, report: Report) -> None:
        """Take the finished backward pass of one call; when the owner's comes, report those of all calls."""
        self._waiting[call] = back, report
        if call != self.owner:
            return
        waiting, self._waiting = self._waiting, {}
        shared = [self._sum_stream(stream, waiting) for stream in range(3)]
        for other, (other_back, report_other) in waiting.items():
            borrowed = self.borrowed.get(other, (False,) * 3)
            streams = [
                stream and (replace(stream, borrowers=None) if borrows else stream if other == self.owner else None)
                for stream, borrows in zip(shared, borrowed, strict=True)
            ]
            report_other(replace(other_back, shared=tuple(streams)))

    def _sum_stream(self, stream: int, waiting: dict[Hashable, tuple[Backward, Report]]) -> SharedStream | None:
        """Add up the gradients of a tensor of the owner; None if no call borrows it."""
        borrowers = tuple(back for call, (back, _) in waiting.items() if self.borrowed.get(call, (False,) * 3)[stream])
        if not borrowers:
            return None
        own, _ = waiting[self.owner]
        total = own.call_gradient(stream)
        for back in borrowers:
            total = total + back.call_gradient(stream).to(total.device)
        return SharedStream(total, borrowers)


class StreamOwners:
    """The queries, keys and values of the present forward pass, and the call that each was made for."""

    def __init__(self):
        """Start with no call."""
        self._calls: list[tuple[list[ref[Tensor]], Callable[[], SharingCalls]]] = []

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()

    def register(
        self, call: Hashable, streams: Sequence[Tensor], open_sharing: Callable[[], SharingCalls]
    ) -> SharingCalls | None:
        """Note the tensors of a call; return the calls that it shares tensors with, if an earlier call owns some.

        `open_sharing` returns what this call shares with later ones, made when the first of them comes.

        Raises:
            InputError: Tensors of several earlier calls come together in this call.
        """
        self._calls = [entry for entry in self._calls if any(x() is not None for x in entry[0])]
        sharings = []
        for tensors, open_owner in self._calls:
            borrowed = tuple(_is_same(x, tensor()) for x, tensor in zip(streams, tensors, strict=True))
            if any(borrowed):
                sharings.append(open_owner())
                sharings[-1].borrowed[call] = borrowed
        if len(sharings) > 1:
            owners = " and ".join(str(sharing.owner) for sharing in sharings)
            raise InputError(f"{call} reads queries, keys or values of {owners}: only those of one layer are measured")
        if sharings:
            return sharings[0]
        self._calls.append(([ref(x) for x in streams], open_sharing))
        return None


def _is_same(x: Tensor, y: Tensor | None) -> bool:
    """Return whether two tensors are one and get one gradient, or one is a copy of the other."""
    if y is None or not (x.requires_grad and y.requires_grad):
        return False
    return x is y or _origin(x) == _origin(y)


def _origin(x: Tensor) -> tuple[object, int]:
    """Return the node of the graph that computed a tensor, behind copies, and which of its outputs it is."""
    node, number, *_ = torch.autograd.graph.get_gradient_edge(x)
    while node.name() in _COPIES and (source := node.next_functions[0][0]) is not None:
        node, number = source, node.next_functions[0][1]
    return node, number
