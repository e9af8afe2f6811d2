"""The recorder of a probe: which modules call attention, in order, and what they hand to it."""

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterity.errors import InputError
from posterity.models.interception import AttentionCall, intercept
from posterity.models.watch import Layer
from posterity.ops.block_kernels import refusal
from posterity.ops.scores import Scoring


class Recorder:
    """The attention calls of a model; with `silence`, attention passes nothing on."""

    def __init__(self, model: PreTrainedModel, silence: bool = False):
        self.names = {module: name for name, module in model.named_modules()}
        self.silence = silence
        self.layers: list[Layer] = []  # all calls
        self.differentiable: list[Layer] = []  # those that are not under the model's own torch.no_grad()
        self.refusals: dict[str, list[Layer]] = {}  # of calls that go block by block, by the reason
        self.entries: Counter[str] = Counter()  # how often each module was entered
        # With `silence`, what depends on the first token here reaches later positions past attention:
        self.streams: list[Tensor] = []  # queries, keys and values of all calls, the first position left out
        self.biases: dict[str, Tensor] = {}  # what is added to the scores of later queries

    @contextlib.contextmanager
    def record(self) -> Iterator["Recorder"]:
        """Record the calls of the block."""
        hooks = [module.register_forward_pre_hook(self._count_entry) for module in self.names]
        try:
            with intercept(self.names, self):
                yield self
        finally:
            for hook in hooks:
                hook.remove()

    def attend(self, call: AttentionCall) -> Tensor:
        """Record a call; its output is that of plain attention, or zero."""
        name = self.names[call.module]
        if self.silence:
            _, bias = call.edges
            self.streams += [x[:, :, 1:].detach() for x in (call.query, call.key, call.value)]
            if bias is not None:
                self.biases[name] = bias.detach()[:, :, 1:]
            return call.zero_output()
        _ = call.edges  # a mask that is not known is refused first
        queries, keys = call.query.shape[2], call.key.shape[2]
        if queries != keys:
            raise InputError(
                f"{type(call.module).__name__} ({name}) attends from {queries} positions to {keys} keys: "
                "only attention among the positions of one sequence is measured"
            )
        self.layers.append(Layer(name, sum(layer.name == name for layer in self.layers)))
        scoring = Scoring(scale=call.scale, softcap=call.softcap, mask=call.mask, bias=call.bias)
        if reason := refusal(call.query, call.key, call.value, scoring):
            self.refusals.setdefault(reason, []).append(self.layers[-1])
        if torch.is_grad_enabled():
            self.differentiable.append(self.layers[-1])
        return call.output()

    def _count_entry(self, module: nn.Module, _args: tuple) -> None:
        self.entries[self.names[module]] += 1
