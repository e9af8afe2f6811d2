"""Documents packed into one window have the numbers that each of them has alone, in a row of its own."""

import json

import numpy as np
import pytest
import torch
import xarray as xr
from support.families import build
from support.loss_oracles import close
from support.reference import by_reader_and_lag
from support.spy import spy_on
from support.texts import PLAIN
from support.tiny import summed_loss, tiny, tokens
from typer.testing import CliRunner

import posterity
from posterity.cli.main import app
from posterity.errors import InputError
from posterity.inputs.model import LoadedModel
from posterity.inputs.windows import read_corpus, token_digest

LENGTHS = (5, 4, 12, 3, 4, 2, 7, 6, 1, 5)  # 12 is the context; one token alone has no loss
PACKED = [[5, 4, 3], [12], [4, 2, 6], [7, 5]]
CONTEXT = 12


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("falcon_h1", "bart", "deepseek_v32")]


def documents():
    return [tokens(1, length, seed)[0] for seed, length in enumerate(LENGTHS)]


def with_a_loss():
    return [ids for ids in documents() if len(ids) > 1]


def pad_to(x, shape):
    return np.pad(x, [(0, want - have) for want, have in zip(shape, np.shape(x), strict=True)])


def test_documents_go_into_the_first_window_with_room_in_reading_order():
    corpus = read_corpus(documents(), None, CONTEXT, pack=True)
    assert [list(window.lengths) or [window.size] for window in corpus.windows] == PACKED
    names = ["document 0 and 2 more", "document 2", "document 4 and 2 more", "document 6 and 1 more"]
    assert [window.text for window in corpus.windows] == names
    assert str(corpus.coverage) == "left out: 1 of 10 documents, 1 of 49 tokens"
    parts = torch.cat([window.ids for window in corpus.windows]).split([n for row in PACKED for n in row])
    order = (0, 1, 3, 2, 4, 5, 7, 6, 9)
    assert [x.tolist() for x in parts] == [documents()[n].tolist() for n in order]


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("llama", 4),
        ("gemma2", 1),
        *(pytest.param(name, batch, marks=pytest.mark.slow)
          for name in ("llama", "gpt2", "mistral", "gemma2", "deepseek_v3")
          for batch in (1, 4) if (name, batch) not in (("llama", 4), ("gemma2", 1))),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("small_blocks")
def test_every_number_is_the_sum_of_those_that_autograd_gives_for_each_document_alone(name, batch):
    model = tiny(name)
    ours = posterity.measure(
        model, None, documents(), context=CONTEXT, pack=True, lags="all", batch=batch, progress=False
    )
    sums, losses = None, []
    for ids in with_a_loss():
        with spy_on(model) as spy:
            loss = summed_loss(model, ids[None])
            loss.backward()
        losses.append(loss.item())
        dense = spy.accounts()
        self_edge = torch.eye(len(ids), dtype=torch.bool)
        at_query, at_key = (
            torch.stack([torch.stack((x[0].where(self_edge, 0), x[0].where(~self_edge, 0)), 3).sum(dim) for x in dense])
            for dim in (-1, -2)
        )  # layer, stream, document, head, side, position
        by_position = torch.cat((at_query[:, :1], at_key[:, 1:]), 1).squeeze(2).movedim(1, 2)
        one = {
            "credit": np.stack([by_reader_and_lag(x[0], [0]).sum(1).movedim(0, 1) for x in dense]),
            "mass": np.stack([by_reader_and_lag(x[1], [0]).sum(1).movedim(0, 1) for x in dense]),
            "attention": np.stack([by_reader_and_lag(x[2], [0]).sum(0) for x in dense]),
            "edges": np.stack([by_reader_and_lag(x[3][:, :1].long(), [0])[0, 0] for x in dense]),
            "credit_by_position": by_position.numpy(),
            "attention_first": np.stack([x[2][0, :, :, 0].sum(-1) for x in dense]),
        }
        padded = {key: pad_to(x, ours[key].shape) for key, x in one.items()}
        sums = padded if sums is None else {key: sums[key] + x for key, x in padded.items()}
    for key, expected in sums.items():
        close(ours[key], expected)
    order = iter((0, 1, 3, 2, 4, 5, 7, 6, 8))
    expected = [sum(losses[next(order)] for _ in row) for row in PACKED]
    np.testing.assert_array_equal(ours.tokens, [sum(row) - len(row) for row in PACKED])
    close(ours.loss * ours.tokens, expected)
    assert ours.attrs["tokens"] == sum(map(sum, PACKED))


@pytest.mark.usefixtures("small_blocks")
def test_who_pays_is_the_sum_over_the_documents_alone():
    model = tiny("gpt2")
    options = {"lags": "all", "losses": True, "horizons": (1, 4), "weights": False, "progress": False}
    ours = posterity.measure(model, None, documents(), context=CONTEXT, pack=True, **options)
    alone = [posterity.measure(model, None, ids, context=len(ids), **options) for ids in with_a_loss()]
    for key in ("loss_credit", "loss_gram", "hidden"):
        close(ours[key], sum(pad_to(result[key].values, ours[key].shape) for result in alone))
    order = iter((0, 1, 3, 2, 4, 5, 7, 6, 8))
    for window, row in enumerate(PACKED):
        parts = [alone[next(order)] for _ in row]
        keys = (
            "credit_by_document",
            "first_by_document",
            "horizon_by_document",
            "hidden_by_document",
            "loss_credit_by_document",
        )
        for key in keys:
            close(ours[key].isel(document=window), sum(result[key].values[0] for result in parts))
        shape = ours.profile_by_document.shape[1:]
        profile = sum(pad_to(result.profile_by_document.values[0], shape) for result in parts)
        close(ours.profile_by_document.isel(document=window), profile)


def test_the_gradient_of_the_weights_is_that_of_the_summed_losses_of_a_window():
    model = tiny("gpt2")
    ours = posterity.measure(model, None, documents(), context=CONTEXT, pack=True, batch=2, progress=False)
    order = iter((0, 1, 3, 2, 4, 5, 7, 6, 8))
    for window, row in enumerate(PACKED):
        model.zero_grad()
        for _ in row:
            summed_loss(model, with_a_loss()[next(order)][None]).backward()
        terms = ours.weight_by_document.isel(document=window)
        whole = terms.sel(term="self") + terms.sel(term="other") + 2 * terms.sel(term="inner")
        for layer in range(3):
            module = model.transformer.h[layer].attn.c_attn
            for number, stream in enumerate(ours.stream.values):
                columns = slice(24 * number, 24 * number + 24)
                expected = module.weight.grad[:, columns].square().sum() + module.bias.grad[columns].square().sum()
                assert whole.sel(stream=stream, layer=layer).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["gpt_oss", "opt", *SLOW])
def test_a_model_in_which_packed_documents_see_each_other_is_refused(name):
    model = tiny(name) if name == "gpt_oss" else build(name)
    posterity.measure(model, None, tokens(1), context=CONTEXT, weights=False, lags="self", pack=True, progress=False)
    reason = "only attention mixes positions," if name == "falcon_h1" else r"packed .* not see each other; in this one"
    with pytest.raises(InputError, match=rf"{reason} .* leave --pack out") as caught:
        posterity.measure(model, None, documents(), context=CONTEXT, weights=False, pack=True, progress=False)
    assert str(caught.value).isprintable()


@pytest.mark.slow
def test_a_chunk_that_the_second_document_would_cross_is_seen_at_the_length_of_the_window():
    """transformers counts chunks from each document's first token, so that llama4 can be packed."""
    model = build("llama4_text")
    ours = posterity.measure(
        model, None, [[1, 2, 3], [4, 5, 6, 7, 8, 9]], context=12, pack=True, lags="all", progress=False
    )
    alone = [posterity.measure(model, None, [ids], context=len(ids), lags="all", progress=False)
             for ids in ([1, 2, 3], [4, 5, 6, 7, 8, 9])]  # fmt: skip
    close(ours.edges, sum(pad_to(result.edges.values, ours.edges.shape) for result in alone))


def test_a_limit_keeps_the_first_windows_also_when_documents_are_packed():
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 14, (300,), generator=generator).tolist()
    many = [list(range(1, length + 1)) for length in lengths]
    whole = read_corpus(many, None, 12, pack=True)
    for limit in (1, 2, 7, 40):
        read = []
        part = read_corpus((read.append(0) or ids for ids in many), None, 12, limit, pack=True)
        assert token_digest(part.windows) == token_digest(whole.windows[:limit])
        assert len(read) < 4 * (limit + 17)  # a stream is read only as far as it must
        assert part.coverage.limit == limit
        measured = sum(window.size for window in part.windows)
        assert part.coverage.tokens_read - part.coverage.tokens_left_out == measured
    assert whole.coverage.tokens_read == sum(lengths)
    assert whole.coverage.tokens_left_out == sum(n for n in lengths if n == 1) + sum(n - 12 for n in lengths if n > 12)
    assert whole.coverage.documents_left_out == lengths.count(1)


def test_an_endless_text_and_a_limit_end_while_a_window_has_room():
    def pieces():
        while True:
            yield "the cat sat on the mat "

    from posterity.inputs.documents import TextStream

    corpus = read_corpus([("short", "the cat"), ("long", TextStream(pieces))], PLAIN, 8, 3, pack=True)
    assert [window.size for window in corpus.windows][1:] == [8, 8]
    assert corpus.windows[0].text == "short"


def test_packing_is_told_by_the_digest_and_another_packing_goes_on_with_no_run(tmp_path):
    rows = [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11, 12]]
    packed = read_corpus(rows, None, 6, pack=True).windows
    joined = read_corpus([[*rows[0], *rows[1]], rows[2]], None, 6).windows
    assert [x.ids.tolist() for x in packed] == [x.ids.tolist() for x in joined]
    assert token_digest(packed) != token_digest(joined)
    model = tiny("llama", num_hidden_layers=1)
    posterity.measure(model, None, rows, context=6, pack=True, state=tmp_path, progress=False)
    with pytest.raises(InputError, match=r"other settings \(pack True there, False here\)"):
        posterity.measure(model, None, rows, context=6, state=tmp_path, progress=False)
    with pytest.raises(InputError, match=r"other settings \(another text\)"):
        posterity.measure(
            model, None, [[1, 2], [3, 4, 5, 6], rows[2]], context=6, pack=True, state=tmp_path, progress=False
        )


def test_windows_of_different_lengths_go_through_a_state(tmp_path):
    """Their rows by lag differ in length."""
    model, texts = tiny("llama"), [tokens(1, length, length)[0] for length in (60, 20, 20, 23)]
    plain, saved = (
        posterity.measure(model, None, texts, context=64, pack=True, state=state, progress=False)
        for state in (None, tmp_path / "state")
    )
    assert plain.sizes["document"] == 2
    xr.testing.assert_equal(plain.drop_attrs(), saved.drop_attrs())
    again = posterity.measure(model, None, texts, context=64, pack=True, state=tmp_path / "state", progress=False)
    xr.testing.assert_equal(again.drop_attrs(), plain.drop_attrs())


def test_a_weak_path_between_packed_documents_is_refused_too():
    model = build("lfm2")
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "conv.conv" in name:
                x.mul_(1e-3)
    with pytest.raises(InputError, match=r"in which only attention mixes positions.*Lfm2ShortConv"):
        posterity.measure(model, None, [[1, 2, 3], [4, 5, 6]], context=8, pack=True, weights=False, progress=False)


def test_answers_and_whole_texts_are_packed_together():
    answer = {"prompt": "the cat sat", "completion": " on the mat"}
    [window] = read_corpus([answer, "the dog ran"], PLAIN, 40, pack=True, conversations=True).windows
    prompt, whole, text = (PLAIN(x).input_ids for x in ("the cat sat", "the cat sat on the mat", "the dog ran"))
    assert window.ids.tolist() == whole + text
    assert window.answers.tolist() == [n >= len(prompt) for n in range(len(whole) + len(text))]
    model = tiny("llama", num_hidden_layers=1, vocab_size=len(PLAIN))
    result = posterity.measure(
        model, PLAIN, [answer, "the dog ran"], context=40, pack=True, lags="self", progress=False
    )
    assert result.tokens.values.tolist() == [len(whole) - len(prompt) + len(text) - 1]


def test_the_command_packs_and_the_table_says_so(tmp_path, monkeypatch):
    model = tiny("llama", num_hidden_layers=1, vocab_size=len(PLAIN))
    monkeypatch.setattr("posterity.inputs.model.load_model", lambda *_: LoadedModel(model, PLAIN, "tiny", ""))
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "the cat sat on the mat"}) for _ in range(5)))
    size = len(PLAIN("the cat sat on the mat").input_ids)
    command = ["measure", "tiny", str(path), "--context", str(2 * size + 1)]
    out = CliRunner().invoke(app, command)
    assert out.exit_code == 2
    assert "pack them: pack=True (--pack)" in " ".join(out.stderr.split())
    out = CliRunner().invoke(app, [*command, "--pack"])
    assert out.exit_code == 0, out.stderr
    text = " ".join(out.stdout.split())
    assert f"3 windows of at most {2 * size} tokens" in text
    assert "packed: documents in one window do not see each other" in text
    assert "left out" not in text
