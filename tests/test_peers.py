"""The page of peers from canned cells, what is compared in it, and the dense account that the peers' hooks feed."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.reference import allowed_pairs, by_lag, dense_account, dense_attention

BENCH = Path(__file__).parent.parent / "bench"
CELL = {"seconds": 2.5, "estimated": False, "peak": 3e9, "loaded": 1e9, "threads": 2, "versions": {"torch": "2.13.0"}}
CELL |= {"load": 0.5, "date": "2026-11-25", "machine": "a processor, 2 cores"}


def module(file, monkeypatch):
    """A file of bench/, which is no package; under a name of its own, with its folder's other files in reach."""
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"bench_{file.stem}", file)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def peers(monkeypatch):
    return module(BENCH / "peers.py", monkeypatch)


def rows(lines, name):
    """The cells of every row of that name with a column for each context."""
    table = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines if line.startswith(f"| {name} |")]
    return [row for row in table if len(row) > 1]


def test_the_page_shows_every_cell_in_its_row_and_column(peers):
    cells = {
        ("captum", "default", 128): CELL,
        ("captum", "default", 256): CELL | {"seconds": 7300, "estimated": True},
        ("transformer-lens", "default", 2048): {"failed": "out of memory (6 GB)"} | {"date": "", "machine": ""},
    }
    disagreements = {("captum", "default", 128): 2e-7, ("captum", "default", 256): 3e-6}
    lines = list(peers.page(cells, disagreements))
    tiny, default = rows(lines, "Captum")
    assert tiny == [*["not run"] * 5, "", ""]
    assert default == ["2.5 s · 3.0 GB", "≈ 2.0 h · 3.0 GB", *["not run"] * 3, "1.0 GB", "3e-06"]
    _, lens = rows(lines, "TransformerLens")
    assert lens[4] == "out of memory (6 GB)"
    assert any("torch 2.13.0" in line for line in lines)
    assert any("a processor, 2 cores" in line for line in lines)
    assert "load average of the machine before a cell at most 0.5" in lines


def test_the_page_names_every_peer_with_what_it_measures(peers):
    lines = list(peers.page({("autograd", "tiny", 128): CELL}, {}))
    for peer in peers.PEERS:
        assert f"| {peer.name} | {peer.what} |" in lines
        assert (BENCH / "peers" / peer.script).exists()
    assert len({peer.label for peer in peers.PEERS}) == len(peers.PEERS)


def test_disagreement_is_relative_to_the_largest_credit_of_its_own_layer(peers):
    ours = np.array([[100.0, 1.0], [0.5, 0.1], [0.0, 0.0]])
    theirs = ours + np.array([[1.0, 0.0], [0.0, 0.1], [0.0, 0.0]])
    assert peers.disagreement(theirs, ours) == pytest.approx(0.2)
    assert peers.disagreement(theirs[..., [1]], ours, [1]) == pytest.approx(0.2)  # also at the timed positions alone


def test_single_losses_are_compared_at_the_positions_that_were_timed(peers):
    own = np.arange(1.0, 9).reshape(1, 2, 4)
    whole = own + 1
    theirs = {
        "positions": np.array([1, 3]),
        "own": own[..., [1, 3]],
        "whole": whole[..., [1, 3]],
        "rows": np.zeros((2, 1, 2, 4)),
    }
    assert peers.arrays_disagreement(theirs, {"own": own, "whole": whole}, None) == 0
    theirs["own"] = theirs["own"] + [[[0, 0.4], [0, 0]]]
    # of the later part, which is 1 everywhere
    assert peers.arrays_disagreement(theirs, {"own": own, "whole": whole}, None) == pytest.approx(0.4)
    assert peers.arrays_disagreement(theirs, None, None) is None


def test_the_page_of_costs_quotes_the_page_of_peers():
    costs, page = ((BENCH.parent / name).read_text().splitlines() for name in ("docs/cost.md", "docs/peers.md"))
    quoted = [line for line in costs if "| TransformerLens |" in line or "| Captum |" in line or "| autograd |" in line]
    assert len(quoted) == 3
    for line in quoted:
        assert line in page


def test_requirements_are_pinned_exactly_and_torch_stands_first(peers):
    for peer in peers.PEERS:
        if peer.environment is None:
            continue
        lines = (BENCH / "peers" / f"requirements-{peer.environment}.txt").read_text().splitlines()
        pinned = [line for line in lines if not line.startswith("#")]
        assert re.fullmatch(r"torch==[\d.]+", pinned[0])
        assert any(line.startswith(f"{peer.environment}==") for line in pinned)
        for line in pinned:
            assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!]+", line), line


def test_the_dense_credit_by_lag_is_the_references(monkeypatch):
    dense = module(BENCH / "peers" / "dense.py", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 7, 5, dtype=torch.float64, generator=generator).requires_grad_() for heads in (4, 2, 2)
    )
    output, _, weight = dense_attention(query, key, value, 0.7, allowed_pairs(7))
    weight.retain_grad()
    grad = torch.randn(output.shape, dtype=torch.float64, generator=generator)
    output.backward(grad)
    grads = {"query": query.grad, "key": key.grad, "value": value.grad, "pattern": weight.grad, "output": grad}
    ours = dense.credit_by_lag(*(x.detach() for x in (query, key, value, weight)), grads, 0.7)
    credit = dense_account(query, key, value, grad, 0.7, allowed_pairs(7))[0]
    torch.testing.assert_close(ours, by_lag(credit).sum((1, 2)))


def test_rows_of_single_losses_add_up_to_the_whole(monkeypatch):
    cell = module(BENCH / "peers" / "cell.py", monkeypatch)
    torch.manual_seed(0)
    length = 20
    single = torch.randn(length - 1, 2, length, 3) * torch.tril(torch.ones(length - 1, length))[:, None, :, None]

    def prepare():
        return list(single.sum(0)), lambda t: list(single[t, :, : t + 1])

    every, _, estimated = cell.split_losses(prepare, length, budget=60)
    assert not estimated
    assert list(every["positions"]) == list(range(length - 1))
    whole = single.sum(0).square().sum(-1)[None, :, :-1].numpy()
    np.testing.assert_allclose(every["whole"], whole, rtol=1e-5)
    np.testing.assert_allclose(every["rows"].sum(0)[..., :-1], whole, rtol=1e-4, atol=1e-5)
    own = np.stack([every["rows"][t, ..., t] for t in range(length - 1)], -1)
    np.testing.assert_array_equal(every["own"], own)
    few, _, estimated = cell.split_losses(prepare, length, budget=0)
    assert estimated
    assert len(few["positions"]) == cell.SAMPLE
    assert few["positions"][0] < length / cell.SAMPLE  # over the whole window: later losses cost more
    assert few["positions"][-1] > length - 1 - length / cell.SAMPLE
    np.testing.assert_array_equal(few["rows"], every["rows"][few["positions"]])
