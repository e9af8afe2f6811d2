"""Laws of the windows: what comes out is what went in, cut, in order, and no more is read than needed."""

import io
import json
import re
import sys
import types

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.texts import LONG, PLAIN, WORDS, byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from posterity.errors import InputError
from posterity.inputs import text_files
from posterity.inputs.documents import TextStream, default_text, document_ids
from posterity.inputs.text_sources import open_documents
from posterity.inputs.windows import Window, cut_windows, read_corpus, token_digest


def unigram_tokenizer():
    """Like sentencepiece: no split into words before the model, white space is a sign of the vocabulary."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    core.train_from_iterator([WORDS + " ".join(LONG)] * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


TOKENIZERS = {"plain": PLAIN, "begin and end": byte_tokenizer(True, True), "unigram": unigram_tokenizer()}

ids_lists = st.lists(st.lists(st.integers(0, 50), max_size=30), min_size=1, max_size=6)
texts = st.builds(
    lambda words, gap, repeat: gap.join(words * repeat),
    st.lists(st.sampled_from([*LONG, "é", "漢", "🙂", "<s>", " ", "\n\n"]), min_size=1, max_size=8),
    st.sampled_from(["", " ", "\n", "\t"]),
    st.integers(1, 200),
)


def joined(windows, name=None):
    ids = [window.ids for window in windows if name is None or window.text == name]
    return torch.cat(ids).tolist() if ids else []


@given(ids_lists, st.integers(2, 12))
def test_windows_of_a_document_joined_are_its_beginning_and_the_rest_is_shorter_than_a_window(documents, context):
    if all(len(document) < context for document in documents):
        with pytest.raises(InputError, match=f"the longest of {len(documents)} given has {max(map(len, documents))}"):
            cut_windows(documents, None, context)
        return
    windows = cut_windows(documents, None, context)
    assert {len(window.ids) for window in windows} == {context}
    for number, document in enumerate(documents):
        assert joined(windows, f"document {number}") == document[: len(document) // context * context]
        indices = [window.index for window in windows if window.text == f"document {number}"]
        assert indices == list(range(len(document) // context))


@given(ids_lists, st.integers(2, 6), st.integers(1, 9))
def test_a_limit_keeps_the_first_windows_and_changes_none(documents, context, limit):
    try:
        whole = cut_windows(documents, None, context)
    except InputError:
        return
    assert token_digest(cut_windows(documents, None, context, limit)) == token_digest(whole[:limit])


@settings(deadline=None, max_examples=50)
@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=texts, limit=st.integers(1, 12), piece=st.integers(1, 700))
def test_reading_only_as_far_as_needed_gives_the_windows_of_the_whole_text(kind, text, limit, piece):
    pieces = TextStream(lambda: (text[start : start + piece] for start in range(0, len(text), piece)))
    try:
        whole = cut_windows(text, TOKENIZERS[kind], 8)
    except InputError:
        return
    assert token_digest(cut_windows(text, TOKENIZERS[kind], 8, limit)) == token_digest(whole[:limit])
    assert token_digest(cut_windows(pieces, TOKENIZERS[kind], 8, limit)) == token_digest(whole[:limit])
    assert token_digest(cut_windows(pieces, TOKENIZERS[kind], 8)) == token_digest(whole)


@pytest.mark.parametrize("gap", ["", " "])
@pytest.mark.parametrize("kind", ["plain", "begin and end"])
def test_tokens_much_longer_than_expected_and_cuts_inside_a_word_change_no_window(kind, gap):
    for start in ["", "a", "ab", "abc"]:
        text = start + gap.join([LONG[-1]] * 400)
        whole = cut_windows(text, TOKENIZERS[kind], 8)
        for limit in range(1, 13):
            assert token_digest(cut_windows(text, TOKENIZERS[kind], 8, limit)) == token_digest(whole[:limit])


@given(ids_lists, st.integers(2, 12), st.one_of(st.none(), st.integers(1, 9)))
def test_every_token_that_was_read_is_in_a_window_or_counted_as_left_out(documents, context, limit):
    try:
        corpus = read_corpus(documents, None, context, limit)
    except InputError:
        return
    windows, coverage = corpus.windows, corpus.coverage
    whole = [len(document) // context for document in documents]
    taken = len(windows)
    last = next((n for n in range(len(whole)) if sum(whole[: n + 1]) >= taken), None) if taken == limit else len(whole)
    rests = [len(document) % context for document in documents[:last]]
    assert coverage.tokens_left_out == sum(rests)
    assert coverage.tokens_read == taken * context + sum(rests)
    assert coverage.documents_read == min(last + 1, len(documents))
    assert coverage.documents_left_out == sum(number == 0 for number in whole[:last])
    assert coverage.limit == (limit if taken == limit else None)


def test_what_is_left_out_is_said_in_one_line():
    short, full = [list(range(1, 21))] * 200, list(range(1, 65))
    assert str(read_corpus([*short, full], None, 64).coverage) == (
        "left out: 200 of 201 documents, 4,000 of 4,064 tokens"
    )
    assert str(read_corpus([*short, full, full], None, 64, 1).coverage) == (
        "left out: 200 of 201 documents, 4,000 of 4,064 tokens; reading ended at the limit of 1 window"
    )
    assert str(read_corpus([full * 2], None, 64).coverage) == ""
    assert str(read_corpus([[*full, 1, 2]], None, 64).coverage) == "left out: 0 of 1 documents, 2 of 66 tokens"


BOS = byte_tokenizer(begin=True)


def test_a_text_that_begins_with_the_tokenizers_prefix_has_it_once():
    """As when a chat template was rendered to text: the windows are those of the text without it."""
    for text in (WORDS * 5, WORDS, "the"):
        alone = read_corpus([text, WORDS * 3], BOS, 6)
        behind = read_corpus(["<s>" + text, WORDS * 3], BOS, 6)
        assert token_digest(behind.windows) == token_digest(alone.windows)
        assert joined(behind.windows).count(0) == len(behind.windows)
    assert document_ids("<s>" + WORDS, BOS).tolist() == document_ids(WORDS, BOS).tolist()
    assert BOS(WORDS).input_ids == document_ids(WORDS, BOS).tolist()


def test_a_window_in_the_middle_of_a_text_that_begins_with_the_prefix_has_it_once():
    text = "<s>" + "cat" * 3 + "<s>" + "cat" * 3
    ids = BOS(text, add_special_tokens=False).input_ids
    half = len(ids) // 2
    assert ids[half] == 0
    assert [window.ids.tolist() for window in cut_windows(text, BOS, half)] == [ids[:half], ids[half:]]


def test_a_tokenizer_without_a_prefix_keeps_every_token_of_a_text():
    text = "<s>" + WORDS * 4
    windows = cut_windows(text, PLAIN, 6)
    assert joined(windows) == PLAIN(text, add_special_tokens=False, verbose=False).input_ids[: 6 * len(windows)]
    assert windows[0].ids[0] == 0


@given(ids_lists, ids_lists)
def test_the_digest_is_the_same_exactly_when_tokens_and_boundaries_are(left, right):
    def windows(rows, text):
        return [Window(torch.tensor(row, dtype=torch.int64), text, 0) for row in rows]

    assert token_digest(windows(left, "a")) == token_digest(windows(left, "b"))
    assert (token_digest(windows(left, "a")) == token_digest(windows(right, "a"))) == (left == right)
    flat = [[token for row in left for token in row]]
    assert (token_digest(windows(left, "a")) == token_digest(windows(flat, "a"))) == (left == flat)


def test_every_form_of_token_ids_gives_the_same_windows():
    rows = [[5, 1, 4, 2], [9, 8, 7, 3]]
    forms = [rows, np.array(rows), np.array(rows, np.uint16), torch.tensor(rows), torch.tensor(rows, dtype=torch.int32)]
    forms += [(torch.tensor(row) for row in rows), [np.array(row) for row in rows], [("a", rows[0]), ("b", rows[1])]]
    assert len({token_digest(cut_windows(form, None, 4)) for form in forms}) == 1
    flat = [[5, 1, 4, 2, 9, 8, 7, 3], range(8), np.arange(8), torch.arange(8)]
    assert [len(cut_windows(form, None, 4)) for form in flat] == [2, 2, 2, 2]
    assert joined(cut_windows(flat[0], None, 4)) == flat[0]


def test_every_window_begins_with_what_the_tokenizer_puts_in_front_of_a_text_and_nothing_is_put_behind():
    tokenizer = byte_tokenizer(begin=True, end=True)
    windows = cut_windows(WORDS * 5, tokenizer, 6)
    assert len(windows) > 5
    assert all(window.ids[0] == 0 and not (window.ids == 1).any() for window in windows)
    text = torch.cat([window.ids[1:] for window in windows]).tolist()
    whole = tokenizer(WORDS * 5, add_special_tokens=False, verbose=False).input_ids
    assert text == whole[: len(text)]
    assert len(whole) - len(text) < 5


def test_token_ids_are_taken_as_they_are_also_when_the_tokenizer_has_a_prefix():
    assert joined(cut_windows([3, 4, 5, 6], byte_tokenizer(begin=True), 2)) == [3, 4, 5, 6]


@pytest.fixture
def loud():
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_propagation()
    yield
    logging.disable_propagation()
    logging.set_verbosity(before)


def test_a_text_longer_than_the_tokenizer_likes_brings_no_warning(loud, caplog):
    tokenizer = byte_tokenizer()
    cut_windows(WORDS * 3, tokenizer, 4)
    assert not caplog.records
    tokenizer(WORDS * 3)  # the same without our care: the test can fail
    assert "longer than the specified maximum" in caplog.text


def test_names_of_documents_are_kept():
    pairs = [("one.txt", WORDS), ("two.txt", WORDS * 2)]
    assert list(dict.fromkeys(window.text for window in cut_windows(pairs, PLAIN, 4))) == ["one.txt", "two.txt"]
    assert {window.text for window in cut_windows(WORDS, PLAIN, 4)} == {"text"}


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (b"bytes", "got bytes"),
        (3, "got int"),
        ({3: "a"}, "expected labels with documents; got a dict with the fields 3"),
        ({}, "expected labels with documents"),
        ({"a": 3}, "a: expected text or token ids; got int"),
        ({"a": []}, "a: expected at least one document"),
        ([{"body": "a", "label": 1}], "fields body, label"),
        ([], "got none"),
        ([None], "document 0: expected text or token ids; got NoneType"),
        ([1.5, 2.5], "whole numbers"),
        ([True, False], "whole numbers"),
        (torch.rand(4), "whole numbers"),
        ([[1, 2, [3]], [4]], "whole numbers"),
        ([[[1, 2], [3, 4]]], "one dimension"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), r"one dimension; got the shape \(2, 2\)"),
        ([1, 2, -100], "got -100"),
        ("\ud800 half", "half of a pair"),
        ("short", "the longest of 1 given has 5"),
        ("", "the longest of 1 given has 0"),
    ],
)
def test_what_is_neither_text_nor_token_ids_is_refused_in_one_line(documents, message):
    with pytest.raises(InputError, match=message) as caught:
        cut_windows(documents, PLAIN, 1000)
    assert "\n" not in str(caught.value)


def test_sizes_and_tokenizer_are_checked():
    with pytest.raises(InputError, match="context to be a whole number of at least 2; got 1"):
        cut_windows("text", PLAIN, 1)
    with pytest.raises(InputError, match="limit to be a whole number of at least 1; got 0"):
        cut_windows("text", PLAIN, 4, limit=0)
    with pytest.raises(InputError, match="expected a tokenizer"):
        cut_windows("text", None, 4)
    wide = byte_tokenizer(begin=True)
    wide.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", special_tokens=[("<s>", 0)]
    )
    with pytest.raises(InputError, match="above the 2 tokens that begin every text; got 2"):
        cut_windows("text", wide, 2)


# Sources of the command line


def test_a_file_is_its_text_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + WORDS.encode())
    [(name, stream)] = open_documents([str(path)])
    assert name == str(path)
    assert "".join(stream.pieces()) == WORDS == "".join(stream.pieces())


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40), st.integers(1, 5))
def test_characters_survive_every_size_of_the_chunks_that_are_read(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "CHUNK_BYTES", size)
        assert "".join(text_files.decode_text(io.BytesIO(text.encode()), "name")) == re.sub(
            "\r\n?", "\n", text.removeprefix("\ufeff")
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"abc\0def", "is binary, byte 3 is zero"),
        (b"good \xc3\xa9 bad \xe9 end", "another encoding at byte 12"),
        (b"cut off \xe2\x82", "another encoding at byte 8"),
        ("utf-16".encode("utf-16"), "binary|another encoding at byte 0"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 4, 1 << 20])
def test_files_that_are_no_text_are_refused_with_the_byte(tmp_path, monkeypatch, data, message, chunk):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", chunk)
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        cut_windows(open_documents([str(path)]), PLAIN, 4)


def test_wrong_arguments_are_found_before_anything_is_read(tmp_path):
    good = tmp_path / "good.txt"
    good.write_text(WORDS)
    for bad, message in [
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "none.txt"), "there is no file"),
        ("none.txt", "there is no file none.txt"),
        ("none.jsonl", "there is no file none.jsonl"),
        ("not a name", "there is no file not a name"),
    ]:
        with pytest.raises(InputError, match=message):
            open_documents([str(good), bad])


def test_a_file_without_permission_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text(WORDS)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(InputError, match=r"secret\.txt: Permission denied"):
        open_documents([str(path)])


def test_a_long_file_is_read_only_as_far_as_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 1000)
    path = tmp_path / "long.txt"
    path.write_bytes(WORDS.encode() * 1000 + b"\xff")
    assert len(cut_windows(open_documents([str(path)]), PLAIN, 8, limit=3)) == 3
    with pytest.raises(InputError, match="another encoding"):
        cut_windows(open_documents([str(path)]), PLAIN, 8)


def test_standard_input_is_a_text(monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(WORDS.encode() * 4)))
    windows = cut_windows(open_documents(["-"]), PLAIN, 4)
    assert joined(windows) == joined(cut_windows(WORDS * 4, PLAIN, 4))
    assert windows[0].text == "standard input"


def test_each_line_of_a_jsonl_file_is_a_document(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps({"body": WORDS}), "", json.dumps({"body": WORDS * 2})]))
    assert list(open_documents([str(path)], "body")) == [(f"{path}:1", WORDS), (f"{path}:3", WORDS * 2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 2: expected one JSON object"),
        ("[" * 100_000, "line 2: expected one JSON object"),
        ("[1]", "line 2: expected a JSON object with the field 'text'; got list"),
        ('{"body": "a", "id": 1}', "line 2: expected the field 'text'; got body, id: choose with --field"),
        ('{"text": 3}', "line 2: expected text in the field 'text'; got int"),
    ],
)
def test_a_broken_line_is_named_and_only_when_it_is_reached(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": WORDS}) + "\n" + line)
    assert len(cut_windows(open_documents([str(path)]), PLAIN, 4, limit=2)) == 2
    with pytest.raises(InputError, match=message):
        cut_windows(open_documents([str(path)]), PLAIN, 4)


def test_a_dataset_is_streamed_with_its_name_configuration_and_split(monkeypatch):
    read = []

    def rows():
        for number in range(1000):
            read.append(number)
            yield {"text": f"{number} " + WORDS}

    def load(name, config, *, split, streaming):
        assert (name, streaming) == ("org/name", True)
        calls.append((config, split))
        return datasets.IterableDataset.from_generator(rows)

    calls = []
    monkeypatch.setattr(datasets, "load_dataset", load)
    for arg in ["org/name", "org/name:small", "org/name:small:test", "org/name::test"]:
        windows = cut_windows(open_documents([arg]), PLAIN, 8, limit=4)
        assert windows[0].text == f"{arg}#0"
        assert joined(windows) == joined(cut_windows([f"{number} " + WORDS for number in range(4)], PLAIN, 8, limit=4))
    assert calls == [(None, "train"), ("small", "train"), ("small", "test"), (None, "test")]
    assert max(read) < 10
    with pytest.raises(InputError, match=r"org/name, row 0: expected the field 'body'; got text"):
        cut_windows(open_documents(["org/name"], "body"), PLAIN, 8)


def test_a_dataset_that_cannot_be_reached_is_one_line(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"nobody/nothing is no file, and as a dataset: .*nobody/nothing") as caught:
        open_documents(["nobody/nothing"])
    assert "\n" not in str(caught.value)


def test_the_default_text_holds_every_topic_whole_and_names_the_python():
    from pydoc_data.topics import topics

    [(name, text)] = open_documents([])
    assert (name, text) == default_text()
    assert sys.version.split()[0] in name
    assert all(topic in text for topic in topics.values())
