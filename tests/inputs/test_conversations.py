"""Conversations become tokens by the chat template, and the answers are what the template or its beginnings say."""

import json

import datasets
import pytest
from support.texts import PLAIN, WORDS, byte_tokenizer

from posterity.errors import InputError
from posterity.inputs.conversations import Completion, Conversation, answer_tokens
from posterity.inputs.text_sources import SkippedLines, open_documents
from posterity.inputs.windows import cut_windows, read_corpus, token_digest

MARKED = (
    "{% for m in messages %}[{{ m['role'] + ']\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '.' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
BARE = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As some templates of reasoning models do: an answer that is not the last is rendered in another way.
FORGETFUL = BARE.replace("+ '.'", "+ ('!' if loop.last else '.')")
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Roles must alternate\nalways') }}{% endif %}" + BARE

CHAT = [
    {"role": "system", "content": "be a cat"},
    {"role": "user", "content": "where is the mat?"},
    {"role": "assistant", "content": "on the road"},
    {"role": "user", "content": "and the dog"},
    {"role": "assistant", "content": "the end"},
]
RENDERED = (
    "[system]\nbe a cat\n[user]\nwhere is the mat?\n[assistant]\non the road.\n[user]\nand the dog\n"
    "[assistant]\nthe end.\n"
)


def chat_tokenizer(template, **options):
    tokenizer = byte_tokenizer(**options)
    tokenizer.chat_template = template
    return tokenizer


def answer_text(ids, answers, tokenizer):
    return tokenizer.decode([token for token, answer in zip(ids, answers, strict=True) if answer])


def test_the_marks_of_a_template_say_which_tokens_are_answers():
    tokenizer = chat_tokenizer(MARKED)
    ids, answers = answer_tokens(Conversation(CHAT), tokenizer, "here")
    assert tokenizer.decode(ids) == RENDERED
    assert answer_text(ids, answers, tokenizer) == "on the road.the end."


def test_without_marks_an_answer_is_what_a_longer_beginning_adds():
    tokenizer = chat_tokenizer(BARE)
    ids, answers = answer_tokens(Conversation(CHAT), tokenizer, "here")
    assert ids == answer_tokens(Conversation(CHAT), chat_tokenizer(MARKED), "here")[0]
    assert answer_text(ids, answers, tokenizer) == "on the road.\nthe end.\n"


@pytest.mark.parametrize("template", [MARKED, BARE])
def test_a_completion_in_messages_is_all_that_follows_the_prompt(template):
    tokenizer = chat_tokenizer(template)
    ids, answers = answer_tokens(Conversation(CHAT, 4), tokenizer, "here")
    assert ids == answer_tokens(Conversation(CHAT), tokenizer, "here")[0]
    assert answer_text(ids, answers, tokenizer) == "the end.\n"


def test_a_completion_in_text_is_all_that_follows_the_prompt_and_needs_no_template():
    ids, answers = answer_tokens(Completion("the cat sat", " on the mat"), PLAIN, "here")
    assert PLAIN.decode(ids) == "the cat sat on the mat"
    assert answer_text(ids, answers, PLAIN) == " on the mat"


def test_tools_of_a_row_reach_the_template():
    tokenizer = chat_tokenizer("{% for t in tools or [] %}{{ t['name'] + '\n' }}{% endfor %}" + BARE)
    row = {"messages": CHAT, "tools": json.dumps([{"name": "road"}])}
    [window] = read_corpus([row], tokenizer, 200, pack=True, conversations=True).windows
    assert tokenizer.decode(window.ids).startswith("road\n[system]\n")


@pytest.mark.parametrize(
    ("document", "template", "message"),
    [
        (Conversation(CHAT), None, "here: expected a tokenizer with a chat template"),
        (
            Conversation(CHAT),
            FORGETFUL,
            "here: expected the beginning of the conversation, by the chat template, to begin",
        ),
        (Conversation(CHAT), STRICT, "here: the chat template fails: TemplateError: Roles must alternate"),
        (Conversation(CHAT[2:]), BARE, "here: expected a message before the first answer"),
        (Completion("the ca", "t sat"), None, "here: expected the prompt's tokens to begin the tokens of the whole"),
    ],
)
def test_where_the_answers_cannot_be_told_one_line_says_why(document, template, message):
    with pytest.raises(InputError, match=message) as caught:
        answer_tokens(document, chat_tokenizer(template), "here")
    assert str(caught.value).isprintable()


ROWS = [{"messages": CHAT}, {"prompt": CHAT[:4], "completion": CHAT[4:]}, {"prompt": WORDS, "completion": WORDS}]


def test_rows_of_files_and_data_sets_and_python_give_the_same_windows(tmp_path, monkeypatch):
    tokenizer, expected = chat_tokenizer(MARKED), None
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    hub = datasets.IterableDataset.from_generator(lambda: iter(ROWS))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    documents = [
        ROWS, open_documents([str(tmp_path / "a.jsonl")]), open_documents([str(tmp_path / "a.json")]),
        open_documents(["org/name"]),
    ]  # fmt: skip
    for some in documents:
        windows = read_corpus(some, tokenizer, 12, conversations=True).windows
        assert all(window.answers[1:].any() for window in windows)
        expected = expected or token_digest(windows)
        assert token_digest(windows) == expected


def test_a_field_that_is_named_wins_and_so_does_a_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT, "body": WORDS}))
    assert [document for _, document in open_documents([str(path)], "body")] == [WORDS]
    path.write_text(json.dumps({"messages": CHAT, "text": WORDS}))
    assert [document for _, document in open_documents([str(path)])] == [WORDS]
    path.write_text(json.dumps({"turns": CHAT, "text": WORDS}))
    [(_, document)] = open_documents([str(path)], "turns")
    assert document.messages == CHAT
    path.write_text(json.dumps({"messages": None, "prompt": "a", "completion": None, "text": None}))
    with pytest.raises(InputError, match="expected text in the field 'text'; got NoneType"):
        list(open_documents([str(path)]))


def test_broken_messages_are_named_or_skipped(tmp_path):
    path, skipped = tmp_path / "a.jsonl", SkippedLines()
    for broken in (
        {"messages": "a"},
        {"messages": []},
        {"messages": [{"content": "a"}]},
        {"prompt": "a", "completion": CHAT},
    ):
        path.write_text("\n".join(map(json.dumps, [{"messages": CHAT}, broken])))
        with pytest.raises(InputError, match="line 2: expected messages with role and content"):
            list(open_documents([str(path)]))
        assert len(list(open_documents([str(path)], skipped=skipped))) == 1
    assert skipped.total == 4


def test_windows_without_an_answer_are_left_out_and_counted():
    tokenizer = chat_tokenizer(MARKED)
    ids, answers = answer_tokens(Conversation(CHAT), tokenizer, "here")
    corpus = read_corpus([{"messages": CHAT}], tokenizer, 8, conversations=True)
    parts = [slice(start, start + 8) for start in range(0, len(ids) - 7, 8)]
    kept = [part for part in parts if any(answers[part][1:])]
    assert 0 < len(kept) < len(parts)
    assert [window.ids.tolist() for window in corpus.windows] == [ids[part] for part in kept]
    assert [window.answers.tolist() for window in corpus.windows] == [answers[part] for part in kept]
    assert corpus.coverage.windows_without_answers == len(parts) - len(kept)
    assert corpus.coverage.tokens_left_out == len(ids) - 8 * len(kept)
    assert "without an answer among them" in str(corpus.coverage)
    with pytest.raises(InputError, match="expected an answer in at least one window of 8 tokens; the 1 conversations"):
        read_corpus([{"messages": CHAT[:2]}], tokenizer, 8, conversations=True)


@pytest.mark.parametrize("begins", [True, False])
def test_a_template_decides_on_the_bos_and_a_cut_conversation_goes_on_as_it_began(begins):
    tokenizer = chat_tokenizer("{{ bos_token }}" * begins + MARKED, begin=True)
    windows = read_corpus([{"messages": CHAT}], tokenizer, 10, conversations=True).windows
    ids, _ = answer_tokens(Conversation(CHAT), tokenizer, "here")
    assert (ids[0] == 0) is begins
    assert [window.ids[0] == 0 for window in windows] == [begins] * len(windows)
    completions = read_corpus(
        [{"prompt": "the cat", "completion": " sat on the mat " * 5}], tokenizer, 6, conversations=True
    )
    assert all(window.ids[0] == 0 and not window.answers[0] for window in completions.windows)


def test_only_measure_takes_conversations():
    with pytest.raises(InputError, match="document 0: expected text or token ids; got a conversation"):
        cut_windows([{"messages": CHAT}], chat_tokenizer(MARKED), 8)
