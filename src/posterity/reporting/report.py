"""Results as one page of HTML that needs nothing else: no network, no server, no other file."""

import html
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from posterity.atomic_files import check_output_path, write_atomically
from posterity.errors import InputError, readable
from posterity.reporting.audit_page import render_audit
from posterity.reporting.comparison_page import render_comparison
from posterity.reporting.eviction_page import render_eviction
from posterity.reporting.feature_page import render_features
from posterity.reporting.html import without_plotly
from posterity.reporting.notebook import draws_with_other_script
from posterity.reporting.result_page import render_results
from posterity.results.audit_schema import AUDIT
from posterity.results.comparison_schema import COMPARISON
from posterity.results.eviction_schema import EVICTION
from posterity.results.feature_schema import FEATURES
from posterity.results.files import KINDS, load
from posterity.results.kind import kind_name
from posterity.results.schema import RESULT

Source = xr.Dataset | str | os.PathLike[str]
PAGES: dict[str, Callable[[xr.Dataset], str]] = {  # of the kinds that have a page of their own
    AUDIT.name: render_audit,
    COMPARISON.name: render_comparison,
    EVICTION.name: render_eviction,
    FEATURES.name: render_features,
}


@dataclass(frozen=True)
class Page:
    """A page that a notebook shows by itself, also after it was exported; its reports share plotly's script."""

    html: str

    def _repr_html_(self) -> str:
        page = without_plotly(self.html) if draws_with_other_script() else self.html
        style = "width:100%;height:52rem;border:1px solid #8884;border-radius:8px"
        return (
            f'<iframe srcdoc="{html.escape(page, quote=True)}" title="Posterity report" style="{style}" '
            'sandbox="allow-scripts allow-downloads allow-modals"></iframe>'
        )

    def __repr__(self) -> str:
        """Short, so that a notebook's log does not hold the page twice."""
        return f"<Page of {len(self.html) / 1e6:.1f} MB: show it in a notebook or write it with a path>"


def report(
    result: Source | Iterable[Source] | Mapping[str, Source],
    path: str | os.PathLike[str] | None = None,
    *,
    labels: Sequence[str] = (),
) -> Page | Path:
    """Make one page of results side by side, of an audit, a comparison, an eviction or features.

    Args:
        result: One result or several; one audit, comparison, eviction or features. A Dataset or a file of one. Or a
            dict of results by the names that they have in the page.
        path: Where the page is written, whole or not at all; its name ends in .html.
        labels: The names of the results in the page, in place of their models, texts and files.

    Returns:
        The path; without one the page itself, which a notebook shows.

    Raises:
        InputError: A path that cannot be written, ends otherwise or would take the place of a result; what is no
            result; labels that are not as many as the results, or equal.
    """
    target = None if path is None else check_output_path(path, "page")
    sources, labels = _name_sources(result, labels)
    files = [
        os.path.realpath(source)
        for source in sources
        if isinstance(source, (str, os.PathLike)) and "\0" not in os.fspath(source)
    ]
    if path is not None and os.path.realpath(path) in files:
        raise InputError(
            f"the page would take the place of the result {path}: choose another path, such as report.html"
        )
    datasets = [load(source) if isinstance(source, (str, os.PathLike)) else source for source in sources]
    page = _render(datasets, labels, _file_names(sources))
    if target is None or path is None:
        return Page(page)
    write_atomically(target, page.encode())
    return Path(path)


def _name_sources(
    result: Source | Iterable[Source] | Mapping[str, Source], labels: Sequence[str]
) -> tuple[list[Source], list[str]]:
    """Return the results as a list, and their names; no names if none were given."""
    if isinstance(result, (xr.Dataset, str, os.PathLike)):
        sources = [result]
    elif isinstance(result, Mapping):
        sources, labels = list(result.values()), labels or [str(name) for name in result]
    else:
        sources = list(result)
    if not sources:
        raise InputError("expected at least one result for the report, but none came; pass a result or a file")
    labels = [readable(str(label)) for label in ([labels] if isinstance(labels, str) else labels)]
    if labels and (len(labels) != len(sources) or len(set(labels)) < len(labels) or not all(labels)):
        raise InputError(
            f"expected {len(sources)} different labels, one for each result; got {labels}: name every result once"
        )
    return sources, labels


def _file_names(sources: list[Source]) -> list[str]:
    """Return the names of the files without ending, with their folders where names are equal; "" for a Dataset."""
    paths = [Path(source) if isinstance(source, (str, os.PathLike)) else None for source in sources]
    stems = [readable(path.stem) if path else "" for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    return [readable(f"{path.absolute().parent.name}/{path.stem}") if path else "" for path in paths]


def _render(datasets: list[xr.Dataset], labels: Sequence[str], files: Sequence[str]) -> str:
    """Return the page of results, or of one audit or comparison."""
    with_own_page = [dataset for dataset in datasets if kind_name(dataset) in PAGES]
    if not with_own_page:
        return render_results([RESULT.check(dataset) for dataset in datasets], labels, files)
    if len(datasets) > 1:
        raise InputError(
            "expected results, or one audit or comparison, which has a page of its own: audit several models in one "
            "command (--beside) to see them side by side"
        )
    name = kind_name(with_own_page[0])
    return PAGES[name](KINDS[name].check(with_own_page[0]))
