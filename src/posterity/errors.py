"""The one exception a user is meant to see: what was expected, what came, what to do, in one line."""

LONGEST = 1500  # signs of a message; what is longer quotes something long, and loses its middle


class InputError(ValueError):
    """Raised at the public edge for anything the user can mend; the command line prints it without a traceback.

    The message is one line that any terminal can show, whatever names and values it quotes.
    """

    def __init__(self, message: str):
        """Make the message readable."""
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A message without line ends and control characters, and of a length that can be read."""
    line = " ".join(readable(text).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 2 // 3]} … {line[-LONGEST // 3 :]}"


def readable(text: str) -> str:
    """A text that every file can hold and every terminal can show: no control characters, no lone surrogates.

    Marks that turn the writing direction around count as control characters.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(sign if sign.isprintable() else " " if sign.isspace() else "\ufffd" for sign in text)
