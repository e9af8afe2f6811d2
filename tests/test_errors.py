"""Errors are one line, whatever they quote."""

import pytest

from posterity.errors import InputError, first_line


@pytest.mark.parametrize(
    ("error", "line", "typed"),
    [
        (ValueError("\n it is wrong:\r\nbecause"), "it is wrong", "ValueError: it is wrong"),
        (KeyError("name"), "'name'", "KeyError: 'name'"),
        (OSError(), "OSError", "OSError"),
        (RuntimeError("  \n"), "RuntimeError", "RuntimeError"),
        (RuntimeError("..."), "RuntimeError", "RuntimeError"),
    ],
    ids=str,
)
def test_the_first_line_of_an_error_fits_into_a_sentence(error, line, typed):
    assert first_line(error) == line
    assert first_line(error, typed=True) == typed


def test_a_message_is_one_readable_line_of_bounded_length():
    message = str(InputError("a\n b\x1b[31m\ud800" + "c" * 5000))
    assert message.startswith("a b\ufffd[31m?ccc")
    assert len(message) < 1600
