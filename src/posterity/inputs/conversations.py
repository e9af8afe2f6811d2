"""Conversations and prompts with a completion, as tokens of which the answers are known.

Rows have the fields of TRL's data sets: `messages`, or `prompt` and `completion`, which are messages or texts. Messages
become tokens by the tokenizer's chat template.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posterity.errors import InputError, first_line
from posterity.inputs.tokenization import encode_text

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # where a chat template says which text is the assistant's
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Conversation:
    """Messages, of which all answers count: every turn of the assistant, or all from message `prompt` on."""

    messages: Messages
    prompt: int | None = None
    tools: Any = None


@dataclass(frozen=True, eq=False)
class Completion:
    """A text whose end is the answer to its beginning."""

    prompt: str
    completion: str


def find_conversation(row: Mapping[str, Any], place: str) -> Conversation | Completion | None:
    """Return the conversation or the completion that a row holds; None if it has no such fields.

    Raises:
        InputError: It has the fields, but they hold something else; the message begins with `place`.
    """
    messages, prompt, completion = (row.get(name) for name in ("messages", "prompt", "completion"))
    if messages is not None:
        return Conversation(_check_messages(messages, place, "messages"), None, _read_tools(row, place))
    if prompt is None or completion is None:
        return None
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion)
    prompt, completion = (
        _check_messages(part, place, name) for part, name in ((prompt, "prompt"), (completion, "completion"))
    )
    return Conversation([*prompt, *completion], len(prompt), _read_tools(row, place))


def answer_tokens(document: Conversation | Completion, tokenizer: Any, place: str) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation, and for each whether it belongs to an answer.

    The template's own marks say so where it has some (`{% generation %}`); for other templates, and for a prompt with
    its completion, the tokens of the beginnings of the conversation.

    Raises:
        InputError: There is no template, it fails, or it renders a beginning in another way than the whole.
    """
    if isinstance(document, Completion):
        begin, tokens = (
            encode_text(tokenizer, text) for text in (document.prompt, document.prompt + document.completion)
        )
        return tokens, _mark_answers(tokens, [(begin, tokens)], place, "the prompt's tokens")
    chat = _Chat(document, tokenizer, place)
    if document.prompt is None and chat.marks_answers:
        return chat.marked_tokens()
    tokens, spans = chat.tokens(len(document.messages)), []
    for first, stop in _answers(document):
        if first == 0:
            raise InputError(
                f"{place}: expected a message before the first answer, where the chat template does not mark answers "
                "by {% generation %}: leave that answer out"
            )
        begin = chat.tokens(first, answer_follows=document.messages[first].get("role") == "assistant")
        spans.append((begin, chat.tokens(stop) if stop < len(document.messages) else tokens))
    return tokens, _mark_answers(tokens, spans, place, "the beginning of the conversation, by the chat template,")


def _answers(conversation: Conversation) -> list[tuple[int, int]]:
    """Return the first message of each answer, and the first after it."""
    if conversation.prompt is not None:
        return [(conversation.prompt, len(conversation.messages))]
    roles = [message.get("role") for message in conversation.messages]
    return [(number, number + 1) for number, role in enumerate(roles) if role == "assistant"]


def _mark_answers(tokens: list[int], spans: Sequence[tuple[list[int], list[int]]], place: str, what: str) -> list[bool]:
    """Mark the tokens between two beginnings of the whole."""
    answers = [False] * len(tokens)
    for begin, end in spans:
        if tokens[: len(begin)] != begin or tokens[: len(end)] != end:
            raise InputError(
                f"{place}: expected {what} to begin the tokens of the whole, to tell the answer's; they differ: "
                "use a chat template with {% generation %}, or --field for a text"
            )
        answers[len(begin) : len(end)] = [True] * (len(end) - len(begin))
    return answers


class _Chat:
    """A conversation under the tokenizer's chat template."""

    def __init__(self, conversation: Conversation, tokenizer: Any, place: str):
        self.conversation, self.tokenizer, self.place = conversation, tokenizer, place
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"{place}: expected a tokenizer with a chat template, for a conversation; this one has none: use the "
                "tokenizer of a chat model, or name a text with --field"
            )

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks the assistant's text, and the tokenizer can follow marks."""
        template = self._call("get_chat_template", tools=self.conversation.tools)
        return bool(GENERATION.search(template)) and getattr(self.tokenizer, "is_fast", False)

    def tokens(self, count: int, answer_follows: bool = False) -> list[int]:
        """Return the tokens of the first `count` messages, and of what begins an answer if one follows."""
        return self._render(count, add_generation_prompt=answer_follows)["input_ids"]

    def marked_tokens(self) -> tuple[list[int], list[bool]]:
        """Return all tokens, and which of them the template marks."""
        rendered = self._render(len(self.conversation.messages), return_assistant_tokens_mask=True)
        return rendered["input_ids"], [bool(mark) for mark in rendered["assistant_masks"]]

    def _render(self, count: int, **options: Any) -> Mapping[str, Any]:
        messages = [dict(message) for message in self.conversation.messages[:count]]
        return self._call(
            "apply_chat_template", messages, tools=self.conversation.tools, return_dict=True,
            tokenizer_kwargs={"verbose": False}, **options,
        )  # fmt: skip

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        try:
            return getattr(self.tokenizer, name)(*args, **options)
        except Exception as error:  # a template is a program of its own
            raise InputError(f"{self.place}: the chat template fails: {first_line(error, typed=True)}") from error


def _check_messages(value: Any, place: str, field: str) -> Messages:
    """Return messages, or raise InputError unless there is at least one and each has a role."""
    messages = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if messages and all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages):
        return messages
    raise InputError(
        f"{place}: expected messages with role and content in the field {field!r}; got something else: choose another "
        "with --field"
    )


def _read_tools(row: Mapping[str, Any], place: str) -> Any:
    """Return the tools of a row, for its template; some data sets hold them as JSON."""
    tools = row.get("tools") or None
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools) or None
    except ValueError as error:
        raise InputError(f"{place}: expected JSON in the field 'tools'; {error}: mend it") from None
