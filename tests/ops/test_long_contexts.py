"""Long contexts: memory linear in the length, and blocks without edges cost nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support.tiny import summed_loss, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    packed_sequence_mask_function,
    padding_mask_function,
    sliding_window_overlay,
)

import posterity
from posterity import Discount, InputError, Myopic
from posterity.ops.intervals import Interval
from posterity.ops.mask import Mask

LENGTH = 2048
PACKED = torch.arange(LENGTH)[None] % 700  # positions that begin anew with every document


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for x in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return output


def long_model(name, **changes):
    """Narrow, so that nothing linear in the length is as large as the square of the length."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 61}
    return tiny(name, torch.float32, max_position_embeddings=LENGTH, **sizes, **changes)


def padding(length=LENGTH):
    return (torch.arange(length) >= 300)[None].long()


def measure(model, ids, **options):
    posterity.measure(model, None, ids, context=LENGTH, progress=False, **options)


def account(model, ids, rule=None, **inputs):
    with posterity.account(model):
        if rule is None:
            return summed_loss(model, ids, **inputs).backward()
        with posterity.horizon(model, rule):
            return summed_loss(model, ids, **inputs).backward()


CASES = {
    "plain": ("llama", measure, {}),
    "plain, all lags": ("llama", measure, {"lags": "all"}),
    "plain, who pays": ("llama", measure, {"losses": True, "horizons": (1, 8)}),
    "sliding": ("mistral", measure, {}),
    "sliding, who pays": ("mistral", measure, {"losses": True, "horizons": (1, 8)}),
    "soft-cap and sliding": ("gemma2", measure, {}),
    "sinks": ("gpt_oss", measure, {}),
    "packed": ("llama", account, {"position_ids": PACKED}),
    "packed and sliding": ("mistral", account, {"position_ids": PACKED}),
    "packed under a horizon": ("llama", account, {"position_ids": PACKED, "rule": Discount(0.9)}),
    "padded": ("llama", account, {"attention_mask": padding()}),
    "padded, sliding, under a horizon": ("mistral", account, {"attention_mask": padding(), "rule": Myopic()}),
}


@pytest.mark.parametrize("kind", CASES)
def test_nothing_of_the_square_of_the_length_is_ever_made(kind):
    name, run, options = CASES[kind]
    model, ids = long_model(name), torch.randint(1, 61, (1, LENGTH))
    with LargestTensor() as largest:
        run(model, ids, **options)
    assert largest.numbers < LENGTH**2 / 4


def test_the_guard_of_sizes_sees_a_square():
    model, ids = long_model("llama"), torch.randint(1, 61, (1, LENGTH))
    with LargestTensor() as largest:
        model(input_ids=ids, position_ids=PACKED, use_cache=False)  # transformers' own mask
    assert largest.numbers >= LENGTH**2
    with LargestTensor() as largest:
        torch.nn.functional.linear(torch.zeros(LENGTH, 8), torch.zeros(LENGTH, 8))
    assert largest.numbers == LENGTH**2


def rule_of(function, batch=1):
    """A rule as the attention hook hands it to a mask."""
    documents = torch.arange(batch)[:, None, None, None]
    return lambda query, key: function(documents, documents[:1], query, key)


DOCUMENTS = torch.tensor([[0] * 9 + [1] * 21 + [2] * 3 + [3] * 30, [0] * 40 + [1] * 23])
PADDED = torch.arange(63) >= torch.tensor([[0], [22]])
RULES = {
    "causal": causal_mask_function,
    "sliding": and_masks(sliding_window_overlay(7), causal_mask_function),
    "chunked": and_masks(chunked_overlay(10, torch.tensor([0, 5])), causal_mask_function),
    "packed": and_masks(causal_mask_function, packed_sequence_mask_function(DOCUMENTS)),
    "padded": and_masks(causal_mask_function, padding_mask_function(PADDED)),
    "sliding, packed, padded": and_masks(
        sliding_window_overlay(5),
        causal_mask_function,
        packed_sequence_mask_function(DOCUMENTS),
        padding_mask_function(PADDED),
    ),
    "one of two": and_masks(
        causal_mask_function, or_masks(sliding_window_overlay(3), lambda b, h, query, key: (key < 4) | ~(query != 50))
    ),
    "strided": lambda b, h, query, key: (key <= query) & ((query - key) % 8 == 0),  # `%` has no bounds here
    "by control flow": lambda b, h, query, key: key <= query if query.max() > key.min() else key == query,
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.usefixtures("small_blocks")
def test_blocks_that_the_bounds_leave_out_hold_no_edges(name, monkeypatch):
    rule, device = rule_of(RULES[name], 2), torch.device("cpu")
    if name not in ("strided", "by control flow"):
        assert isinstance(rule(Interval(*bounds(4, 7)), Interval(*bounds(0, 7).mT)), Interval)
    tiles = Mask(rule).tiles(63, 63, device)
    monkeypatch.setattr(Mask, "_candidates", lambda *_: None)
    assert tiles == Mask(rule).tiles(63, 63, device)


def bounds(low, high):
    return torch.tensor([[[low]], [[high]]])


@pytest.mark.usefixtures("small_blocks")
def test_bounds_hold_for_fewer_queries_than_keys_and_for_heads_that_see_themselves_only(monkeypatch):
    device = torch.device("cpu")
    masks = [Mask(rule_of(RULES["sliding"], 2)), Mask().restrict_to_self([1], 3), Mask(padding=PADDED)]
    tiles = [mask.tiles(20, 63, device) for mask in masks]
    monkeypatch.setattr(Mask, "_candidates", lambda *_: None)
    again = [Mask(rule_of(RULES["sliding"], 2)), Mask().restrict_to_self([1], 3), Mask(padding=PADDED)]
    assert tiles == [mask.tiles(20, 63, device) for mask in again]


@pytest.mark.usefixtures("small_blocks")
def test_a_later_key_in_a_far_block_is_still_refused():
    rule = rule_of(lambda b, h, query, key: (key <= query) | ((query == 3) & (key == 60)))
    with pytest.raises(InputError, match="lets a query see later keys"):
        Mask(rule).tiles(63, 63, torch.device("cpu"))


@pytest.mark.parametrize("name", ["sliding", "packed"])
def test_blocks_that_are_evaluated_grow_with_the_length_not_with_its_square(name, monkeypatch):
    evaluated = []
    evaluate = Mask._evaluate
    monkeypatch.setattr(Mask, "_evaluate", lambda mask, *args: evaluated.append(1) or evaluate(mask, *args))

    def count(length):
        evaluated.clear()
        rules = {
            "sliding": and_masks(sliding_window_overlay(512), causal_mask_function),
            "packed": and_masks(
                causal_mask_function, packed_sequence_mask_function(torch.arange(length)[None] // 1000)
            ),
        }
        Mask(rule_of(rules[name])).tiles(length, length, torch.device("cpu"))
        return len(evaluated)

    assert count(16384) <= 2.1 * count(8192)
    monkeypatch.setattr(Mask, "_candidates", lambda *_: None)
    assert count(4096) > 3 * count(2048)  # what the bounds save


LONG = """
import json, sys, torch
from transformers import LlamaConfig, MistralConfig, LlamaForCausalLM, MistralForCausalLM
import posterity
from posterity.results import stats

kind, length = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
config = dict(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=length)
if kind == "sliding":
    model = MistralForCausalLM(MistralConfig(**config, sliding_window=512))
else:
    model = LlamaForCausalLM(LlamaConfig(**config))
ids = torch.randint(256, (1, length))
if kind == "packed":
    with posterity.account(model) as ledger:
        inputs = dict(input_ids=ids, position_ids=torch.arange(length)[None] % 3000, use_cache=False)
        logits = model(**inputs).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        result = ledger.result()
else:
    options = dict(losses=True, horizons=(8,)) if kind == "plain" else {}
    result = posterity.measure(model, None, ids, context=length, progress=False, **options)
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps({"peak": peak, "balance": float(stats.balance(result).max()),
                  "edges": int(result.edges.isel(layer=0).sum())}))
"""


def edges_of(kind, length):
    if kind == "plain":
        return length * (length + 1) // 2
    if kind == "sliding":
        return 512 * 513 // 2 + (length - 512) * 512
    documents, rest = divmod(length, 3000)
    return documents * 3000 * 3001 // 2 + rest * (rest + 1) // 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ["plain", "sliding", "packed"])
def test_memory_is_linear_up_to_16384_tokens_and_the_ledger_balances(kind):
    def run(length):
        command = [sys.executable, "-c", LONG, kind, str(length)]
        # memory that is freed goes back to the system, so that the peak is of what is used, not of malloc's habits
        freed = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        process = subprocess.run(command, capture_output=True, text=True, check=False, env=freed)
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    reports = {length: run(length) for length in (4096, 8192, 16384)}
    for length, report in reports.items():
        assert report["balance"] < 1e-5
        assert report["edges"] == edges_of(kind, length)
    first, second = (reports[2 * n]["peak"] - reports[n]["peak"] for n in (4096, 8192))
    assert second < 3 * first  # growth over twice as many tokens: twice if linear, four times if quadratic
    assert second < 0.5 * 16384**2  # a single N x N tensor of bools would add 0.75 times that square to it
