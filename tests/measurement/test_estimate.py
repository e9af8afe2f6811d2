"""What a run takes, said before it starts, is what it then takes."""

import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import tiny, tokens

from posterity.measurement.account import account
from posterity.measurement.estimate import _extrapolate, estimate
from posterity.measurement.memory_timeline import MemoryTimeline, peak_bytes
from posterity.models.chunked_loss import LMHead
from posterity.models.language_model import freeze_parameters


def trace(length, operate):
    """The timeline of what `operate` does with so many numbers of 4 bytes."""
    with MemoryTimeline([]) as timeline:
        operate(length, timeline)
    return timeline.segments


def kept_then_large(length, timeline):
    """Three rows, then a matrix of a fixed size, then two rows more."""
    rows = [torch.zeros(length) for _ in range(3)]
    matrix = torch.zeros(1000)
    del matrix
    rows += [torch.zeros(length), torch.zeros(length).view(-1)[:2]]


def sums_in_tiles(length, timeline):
    """More operations the longer; a row and a matrix are left."""
    timeline.start_segment()
    row, matrix = torch.zeros(length), torch.zeros(100)
    for _ in range(length // 8):
        torch.zeros(2)
    timeline.start_segment()
    rows = [row, matrix, torch.zeros(length)]
    del rows


def test_the_peak_stands_where_it_is_in_a_long_pass_and_not_in_a_short_one():
    trials = {length: trace(length, kept_then_large) for length in (64, 128)}
    assert [max(map(max, segments)) for segments in trials.values()] == [4 * (3 * 64 + 1000), 4 * (3 * 128 + 1000)]
    for length in (64, 128, 400, 501, 8192):
        assert peak_bytes(trials, length) == 4 * max(3 * length + 1000, 5 * length)
    assert peak_bytes({128: trials[128]}, 256) == 2 * 4 * (3 * 128 + 1000)  # from one trial: in proportion
    tiles = {length: trace(length, sums_in_tiles) for length in (64, 128)}
    assert len(tiles[64][1]) < len(tiles[128][1])
    assert peak_bytes(tiles, 8192) == 4 * (2 * 8192 + 100)


def test_what_was_there_before_and_views_of_it_are_not_counted():
    weight = torch.zeros(1000, 10)
    with MemoryTimeline([weight]) as timeline:
        product = weight.T @ weight.view(1000, 10)
        assert timeline.live == product.nbytes
        timeline.pause()
        product = [product, product + 1]
        timeline.resume()
        assert timeline.live == 2 * product[0].nbytes
        del product
    assert timeline.live == 0
    assert [max(segment) for segment in timeline.segments] == [400, 800]


@given(
    linear=st.floats(1e-6, 1e-2), quadratic=st.floats(0, 1e-5), before=st.integers(16, 2000), extra=st.integers(1, 2000)
)
def test_time_that_grows_with_the_square_of_the_context_is_estimated_from_two_trials(linear, quadratic, before, extra):
    rates = {tokens: linear + quadratic * tokens for tokens in (before, before + extra)}
    assert _extrapolate(rates, 32768) == pytest.approx(linear + quadratic * 32768)
    assert _extrapolate({before: linear}, 32768) == linear
    assert _extrapolate({before: 2 * linear, before + extra: linear}, 32768) == linear  # the first was cold


def test_long_windows_are_tried_twice(monkeypatch):
    tried = []
    monkeypatch.setattr(
        "posterity.measurement.estimate._seconds_per_token", lambda model, ids, *_: tried.append(len(ids)) or len(ids)
    )
    model = tiny("llama", max_position_embeddings=4096)
    with freeze_parameters(model), account(model) as ledger:
        for length in (2047, 2048):
            line = estimate(model, tokens(1, length)[0], 3, 1, LMHead.probe(model), ledger)
    assert tried == [128, 128, 256]
    assert "about 3495 h 15 min" in line  # 3 windows of 2048 tokens, 2048 s each


RUN = """
import resource, torch, posterity
from transformers import LlamaConfig, LlamaForCausalLM
context = 3072
model = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=688, num_hidden_layers=8,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context))
posterity.measure(model, None, torch.randint(512, (1, context)), context=context, {options})
status = open("/proc/self/status").read()  # ru_maxrss of a child begins at that of its parent
print(status[status.index("VmHWM"):].split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(
    "options",
    ["", "losses=True, horizons=(4, 64)", "parameters=True", "losses=True, checkpoint=True"],
)
def test_the_peak_is_the_memory_that_was_said(options):
    process = subprocess.run([sys.executable, "-c", RUN.replace("{options}", options)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    said = float(re.search(r"and ([\d.]+) GB", " ".join(process.stderr.split()))[1])
    peak = int(process.stdout) * 1024 / 1e9
    assert 0.87 * peak < said < 1.15 * peak
