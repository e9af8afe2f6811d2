"""score(): each document by itself, against one backward pass per position and the profile of dense attention."""

import numpy as np
import pandas as pd
import pytest
import torch
from support.spy import spy_on
from support.tiny import summed_loss, tiny, tokens
from typer.testing import CliRunner

import posterity
from posterity.cli.main import app
from posterity.errors import InputError
from posterity.measurement import document_scores

OPTIONS = {"beyond": (16, 32), "progress": False}
SINKS = 4


def dense_share(model, row, stream, distance):
    """Return the norm over edges to all keys but the first, and the share of it at lags from a distance on."""
    with spy_on(model) as spy:
        summed_loss(model, row[None]).backward()
    credit = 0.0
    for edges, *_ in spy.accounts():
        pairs = edges[stream, 0].sum(0)  # over heads: (query, key)
        pairs[:, :SINKS] = 0
        credit = credit + pairs
    lags = torch.arange(len(row))[:, None] - torch.arange(len(row))
    return float(credit.sum()), float(credit[lags >= distance].sum() / credit.sum())


def test_each_document_is_scored_by_itself():
    model, ids = tiny("llama"), tokens(3, 60)
    documents = {"long": ids[0], "short": ids[1, :20], "middle": ids[2, :40]}
    frame = posterity.score(model, None, documents, **OPTIONS)
    assert frame.document.tolist() == ["long", "short", "middle"]
    assert frame.tokens.tolist() == [60, 20, 40]
    assert frame.tokens_left_out.tolist() == [0, 0, 0]
    for stream, name in ((1, "key"), (2, "value")):
        for row, (_, document) in zip(frame.itertuples(), documents.items(), strict=True):
            for distance in (16, 32):
                norm, share = dense_share(model, document, stream, distance)
                assert getattr(row, f"{name}_norm") == pytest.approx(norm, rel=1e-6)
                assert getattr(row, f"{name}_credit_beyond_{distance}") == pytest.approx(share, rel=1e-6, abs=1e-9)
    assert frame.key_credit_beyond_32[1] == 0


def test_scores_by_losses_are_those_of_measure():
    model, ids = tiny("llama"), tokens(2, 40)
    frame = posterity.score(model, None, ids, **OPTIONS)
    for number, row in frame.iterrows():
        result = posterity.measure(model, None, ids[number : number + 1], context=40, weights=False,
                                   horizons=OPTIONS["beyond"], progress=False)  # fmt: skip
        assert row.loss == pytest.approx(float(result.loss[0]))
        rest = result.sel(reader_of="rest", stream="value")
        whole = float(rest.credit_by_document.sum())
        kept = rest.horizon_by_document.sum(["document", "layer", "head"])
        assert [row.value_losses_beyond_16, row.value_losses_beyond_32] == pytest.approx([*(1 - kept / whole).values])
    alone = posterity.score(model, None, ids, losses=False, **OPTIONS)
    pd.testing.assert_frame_equal(alone, frame[alone.columns], rtol=1e-9)


def test_a_long_document_is_cut_and_its_rest_is_counted():
    model, ids = tiny("llama"), tokens(1, 50)
    frame = posterity.score(model, None, ids, context=20, **OPTIONS)
    assert (frame.tokens[0], frame.tokens_left_out[0]) == (40, 10)
    parts = posterity.score(model, None, {"a": ids[0, :20], "b": ids[0, 20:40]}, **OPTIONS)
    assert frame.key_norm[0] == pytest.approx(parts.key_norm.sum())
    weighted = (parts.key_credit_beyond_16 * parts.key_norm).sum() / parts.key_norm.sum()
    assert frame.key_credit_beyond_16[0] == pytest.approx(weighted)


def test_an_interrupted_run_goes_on_with_the_same_numbers(tmp_path, monkeypatch):
    model, ids = tiny("llama"), tokens(4, 30)
    whole = posterity.score(model, None, ids, **OPTIONS)
    score_document, count = document_scores._score_document, iter(range(9))

    def interrupted(*args):
        if next(count) == 2:
            raise KeyboardInterrupt
        return score_document(*args)

    monkeypatch.setattr(document_scores, "_score_document", interrupted)
    with pytest.raises(KeyboardInterrupt):
        posterity.score(model, None, ids, state=tmp_path / "state", **OPTIONS)
    scored = []
    monkeypatch.setattr(document_scores, "_score_document", lambda *args: scored.append(args) or score_document(*args))
    again = posterity.score(model, None, ids, state=tmp_path / "state", **OPTIONS)
    assert 2 <= len(scored) < 4  # a state is written as often as it takes little time
    pd.testing.assert_frame_equal(again, whole, check_exact=True)


@pytest.mark.parametrize("beyond", [(), (15,), (8,), (32, 16), (16, 16)])
def test_distances_that_are_no_growing_powers_of_two_are_refused(beyond):
    with pytest.raises(InputError, match="powers of two from 16 on that grow"):
        posterity.score(tiny("llama"), None, tokens(1, 20), beyond=beyond, progress=False)


def test_documents_without_a_loss_are_refused():
    with pytest.raises(InputError, match="expected a document of at least 2 tokens"):
        posterity.score(tiny("llama"), None, {"a": tokens(1, 8)[0, :1]}, **OPTIONS)


def test_the_command_writes_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(posterity, "score", lambda *args, **options: pd.DataFrame({"document": ["a"], "loss": [np.pi]}))
    monkeypatch.setattr("posterity.inputs.model.load_model", lambda *args: None)
    text = tmp_path / "a.txt"
    text.write_text("a text")
    tables = (("s.parquet", pd.read_parquet), ("s.csv", pd.read_csv))
    for name, read in (*tables, *tables):  # the second time in place of the first
        run = CliRunner().invoke(app, ["score", "model", str(text), "-o", str(tmp_path / name)])
        assert run.exit_code == 0, run.output
        assert "1 documents" in run.output
        assert read(tmp_path / name).loss[0] == np.pi
    run = CliRunner().invoke(app, ["score", "model", str(text), "-o", str(tmp_path / "s.txt")])
    assert run.exit_code == 2
    assert "expected a table that ends in .csv, .parquet" in " ".join(run.output.split())
