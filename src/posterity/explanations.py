"""Pages that say why something is refused, and what to do: `posterity explain`, and a page of the site for each.

A page of `explanation_pages` lists the messages that lead to it: words that stand in the message of an InputError.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "explanation_pages"
_MESSAGE = re.compile(r"^\* `?(.*?)`?$", re.MULTILINE)


@dataclass(frozen=True)
class Explanation:
    """A page.

    Attributes:
        title: What is refused.
        messages: Words of the messages that lead here.
        text: The page, in Markdown.
    """

    title: str
    messages: tuple[str, ...]
    text: str

    @classmethod
    def parse(cls, text: str) -> "Explanation":
        """Read a page: its title, and the list in front of its second heading."""
        title, _, rest = text.partition("\n")
        return cls(title.removeprefix("# "), tuple(_MESSAGE.findall(rest.partition("\n## ")[0])), text)


@cache
def explanations() -> dict[str, Explanation]:
    """Return all pages by name, in the order of their names."""
    return {path.stem: Explanation.parse(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.md"))}


def find_explanation(message: str) -> str | None:
    """Return the name of the page that a message leads to; None if the message says all there is."""
    pages = explanations().items()
    return next((name for name, page in pages if any(words in message for words in page.messages)), None)
