"""The accumulator: names in a state file, and rows and sums that come back from one."""

import torch
from support.tiny import tiny, tokens

from posterity.decomposition.accumulator import Accumulator
from posterity.measurement.account import account


def test_the_names_in_a_state_file_stay_what_they_were():
    """Files of unfinished runs, written by an earlier version, still load."""
    sums = Accumulator()
    layer = "model.layers.0.self_attn#1"
    sums.add((layer, "credit"), torch.ones(2))
    sums.add((None, "hidden"), torch.ones(3))
    sums.add_weight((layer, 2, "other", 17), torch.ones(4))
    sums.append_rows((None, "loss"), torch.ones(5))
    sums.append_rows((layer, "weight_by_document"), torch.ones(6, 3, 3))
    tensors = sums.tensors()
    assert {name: x.shape[0] for name, x in tensors.items()} == {
        f"total:{layer}/credit": 2,
        "total:hidden": 3,
        f"total:{layer}/weight/2/other/0017": 4,
        "rows:loss": 5,
        f"rows:{layer}/weight_by_document": 6,
    }
    restored = Accumulator.from_tensors(tensors)
    assert restored.total.keys() == sums.total.keys()
    assert restored.weight_total.keys() == sums.weight_total.keys()
    assert restored.rows.keys() == sums.rows.keys()


def test_a_ledger_comes_back_from_its_tensors_bit_for_bit():
    model, ids = tiny("llama"), tokens(2, 9)
    with account(model) as ledger:
        for row in ids:
            model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        result = ledger.result()
        restored = Accumulator.from_tensors(ledger.sums.tensors())
        ledger.sums.clear()
        ledger.sums.merge(restored)
        assert ledger.result().drop_attrs().identical(result.drop_attrs())
