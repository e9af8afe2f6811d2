"""Pages that explain a refusal: every one is led to by a message of the code, and says why and what to do."""

import ast
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posterity.cli.main import app
from posterity.errors import InputError
from posterity.explanations import Explanation, explanations, find_explanation

PACKAGE = Path(__file__).parent.parent / "src" / "posterity"


def code_texts():
    """All texts of the code, those of f-strings with one mark for what they quote."""

    def text(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return str(node.value) if isinstance(node, ast.Constant) else "…"

    nodes = (node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    return "\n".join(text(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant))


def test_every_page_is_led_to_by_messages_of_the_code():
    texts, seen = code_texts(), set()
    assert len(explanations()) >= 15
    for name, page in explanations().items():
        assert page.messages, name
        for words in page.messages:
            assert words in texts, (name, words)
            assert words not in seen, (name, words)
            assert find_explanation(f"a {words} b") == name
            seen.add(words)


@pytest.mark.parametrize("name", explanations())
def test_a_page_says_why_and_what_to_do(name):
    page = explanations()[name]
    assert page.text.startswith(f"# {page.title}\n")
    assert page.text.count("\n## Why\n") == page.text.count("\n## What to do\n") == 1
    assert page.text.index("## Why") < page.text.index("## What to do")
    assert max(map(len, page.text.splitlines())) <= 132
    shown = CliRunner().invoke(app, ["explain", name])
    assert shown.exit_code == 0
    assert page.title in " ".join(shown.output.split())


def test_an_error_names_its_page():
    error = InputError("this needs every path between positions to go through attention, but conv carries more")
    assert error.page == "other-paths"
    assert error.__notes__ == ["why, and what to do: posterity explain other-paths"]
    assert InputError("expected a number").page is None
    assert find_explanation("expected a number") is None


def test_the_command_line_names_the_page_in_its_line(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    answer = CliRunner().invoke(app, ["measure", "default", str(text), "--context", "512"])
    assert answer.exit_code == 2
    assert answer.output.strip().endswith("(why: posterity explain too-little-text)")
    assert len(answer.output.strip().splitlines()) == 1


def test_the_list_of_pages_and_a_wrong_name():
    shown = CliRunner().invoke(app, ["explain"])
    assert all(name in shown.output for name in explanations())
    wrong = CliRunner().invoke(app, ["explain", "nothing"])
    assert wrong.exit_code == 2
    assert "expected one of the pages attention-interface" in " ".join(wrong.output.split())


def test_messages_are_the_list_in_front_of_the_second_heading():
    page = Explanation.parse("# A title\n\nMessages that lead here:\n\n* `one thing`\n* two\n\n## Why\n\n* not this\n")
    assert page.title == "A title"
    assert page.messages == ("one thing", "two")
