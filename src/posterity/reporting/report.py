"""Results as one page of HTML that needs nothing else: no network, no server, no other file."""

import html
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from posterity.atomic_files import writable, write_whole
from posterity.errors import InputError
from posterity.reporting import audit_page, comparison_page, result_page
from posterity.results.audit_schema import AUDIT
from posterity.results.comparison_schema import COMPARISON
from posterity.results.files import load
from posterity.results.kind import kind_name
from posterity.results.schema import RESULT

Source = xr.Dataset | str | os.PathLike[str]


@dataclass(frozen=True)
class Page:
    """A page that a notebook shows by itself, also after it was exported."""

    html: str

    def _repr_html_(self) -> str:
        style = "width:100%;height:52rem;border:1px solid #8884;border-radius:8px"
        return (
            f'<iframe srcdoc="{html.escape(self.html, quote=True)}" title="Posterity report" style="{style}" '
            'sandbox="allow-scripts allow-downloads allow-modals"></iframe>'
        )

    def __repr__(self) -> str:
        """Short, so that a notebook's log does not hold the page twice."""
        return f"<Page of {len(self.html) / 1e6:.1f} MB: show it in a notebook or write it with a path>"


def report(result: Source | Iterable[Source], path: str | os.PathLike[str] | None = None) -> Page | Path:
    """Show one or more results (or files of results) side by side.

    With a path the page is written there, whole or not at all, and the path is returned; without one the page itself is
    returned, which a notebook shows. Raises InputError for a path that cannot be written or what is not a result.
    """
    target = None if path is None else writable(path)
    sources = [result] if isinstance(result, (xr.Dataset, str, os.PathLike)) else list(result)
    if not sources:
        raise InputError("expected at least one result for the report, but none came; pass a result or a file")
    files = [
        os.path.realpath(one) for one in sources if isinstance(one, (str, os.PathLike)) and "\0" not in os.fspath(one)
    ]
    if path is not None and os.path.realpath(path) in files:
        raise InputError(
            f"the page would take the place of the result {path}: choose another path, such as report.html"
        )
    loaded = [load(one) if isinstance(one, (str, os.PathLike)) else one for one in sources]
    page = _rendered(loaded)
    if target is None or path is None:
        return Page(page)
    write_whole(target, page.encode())
    return Path(path)


def _rendered(loaded: list[xr.Dataset]) -> str:
    """The page of results, or of one audit or comparison."""
    kinds = {kind_name(dataset) for dataset in loaded} - {RESULT.name}
    if not kinds:
        return result_page.render([RESULT.check(dataset) for dataset in loaded])
    if len(loaded) > 1:
        raise InputError(
            "expected results, or one audit or comparison, which has a page of its own: audit several models in one "
            "command (--beside) to see them side by side"
        )
    if kinds == {COMPARISON.name}:
        return comparison_page.render(COMPARISON.check(loaded[0]))
    return audit_page.render(AUDIT.check(loaded[0]))
