"""Pages that explain a refusal, in a terminal."""

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from posterity.errors import InputError
from posterity.explanations import explanations


def print_explanation(name: str | None, console: Console | None = None) -> None:
    """Print a page, or without a name the list of all.

    Raises:
        InputError: There is no such page.
    """
    console = console or Console(highlight=False)
    pages = explanations()
    if name is None:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for page, explanation in pages.items():
            table.add_row(page, explanation.title)
        console.print(table)
        return
    if name not in pages:
        raise InputError(f"expected one of the pages {', '.join(pages)}; got {name}")
    console.print(Markdown(pages[name].text))
