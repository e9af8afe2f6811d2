"""The exception that a user is meant to see: what was expected, what came, what to do, in one line."""

import logging
from functools import cache

from posterity.explanations import find_explanation

LONGEST = 1500  # characters of a message; a longer one quotes something long, and loses its middle


class InputError(ValueError):
    """Raised at the public edge for anything the user can mend; the command line prints it without a traceback.

    The message is one line that any terminal can show, whatever names and values it quotes.

    Attributes:
        page: The name of the page that says why, which `posterity explain` shows; None if there is none.
    """

    def __init__(self, message: str):
        """Reduce the message to one readable line; a traceback names the page behind it."""
        super().__init__(one_line(message))
        self.page = find_explanation(str(self))
        if self.page is not None:
            self.add_note(f"why, and what to do: posterity explain {self.page}")


class NotFiniteError(InputError):
    """Raised for a loss or a gradient with entries that are not finite; `place` says where it was measured."""

    def __init__(self, quantity: str, place: str = ""):
        """Name the quantity, such as "the gradient of layer 3"."""
        super().__init__(f"{quantity} is not finite{place}: check the model, or use float32")
        self.quantity = quantity


def one_line(text: str) -> str:
    """Return a message without line ends and control characters, its middle left out if it is very long."""
    line = " ".join(readable(text).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 2 // 3]} … {line[-LONGEST // 3 :]}"


def readable(text: str) -> str:
    """Replace what a file cannot hold or a terminal cannot show: control characters and lone surrogates.

    Marks that reverse the writing direction count as control characters.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(char if char.isprintable() else " " if char.isspace() else "\ufffd" for char in text)


def first_line(error: BaseException, typed: bool = False) -> str:
    """Return the first line of an exception's message, fit for the middle of a sentence.

    An empty message gives the name of the exception's type; `typed` puts that name before any message.
    """
    name, line = type(error).__name__, str(error).strip().partition("\n")[0].rstrip(" :.\r")
    return f"{name}: {line}" if typed and line else line or name


def warn(message: str) -> None:
    """Log a warning of one line, under the name of the package."""
    logging.getLogger("posterity").warning("%s", one_line(message))


warn_once = cache(warn)  # the same one only once
