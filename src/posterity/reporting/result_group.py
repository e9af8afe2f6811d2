"""The results of one page: a name and a colour for each, and which of them measured a variable."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr

from posterity.palette import SERIES
from posterity.reporting.panel_grid import shorten
from posterity.reporting.result_words import lead_reader, model_name, sink_number, text_name
from posterity.results import stats
from posterity.results.formatting import first_positions_text
from posterity.results.steps import latest_step


@dataclass(frozen=True)
class NamedResult:
    """A result with its name in the page; of several steps, the last, and all of them."""

    number: int
    name: str
    result: xr.Dataset
    over_steps: xr.Dataset

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self.result.sizes["layer"]

    def uncertainty(self, error: Any) -> Any:
        """Return what is drawn and written behind the ± of numbers with a standard error over the windows."""
        return stats.uncertainty(error, self.result.sizes["document"])


@dataclass(frozen=True)
class ResultGroup:
    """Results side by side."""

    members: list[NamedResult]

    @classmethod
    def of(cls, results: Sequence[xr.Dataset], names: Sequence[str] = (), files: Sequence[str] = ()) -> "ResultGroup":
        """Name the results, by names that a user gave or else by what tells them apart (`result_names`)."""
        last = [latest_step(result) for result in results]
        parts = zip(names or result_names(last, files), last, results, strict=True)
        return cls([NamedResult(number, *part) for number, part in enumerate(parts)])

    @property
    def readers(self) -> tuple[str, ...]:
        """The edges that the page shows, by their key, those that it begins with first (`reader_of` of the stats)."""
        apart = all(lead_reader(member.result) == "rest" for member in self.members)
        return ("rest", "all") if apart else ("all",)

    @property
    def first_positions(self) -> str:
        """The first positions that `reader_of` tells from the rest: "the first 4 positions"; "" for none."""
        names = {first_positions_text(sink_number(member.result)) for member in self.members}
        return names.pop() if len(names) == 1 else "the first few positions"

    @property
    def single(self) -> bool:
        """True if the page shows one result only."""
        return len(self.members) == 1

    def having(self, variable: str) -> list[NamedResult]:
        """Return the results that hold numbers of a variable."""
        results = [(member, member.result.get(variable)) for member in self.members]
        return [member for member, values in results if values is not None and bool(values.notnull().any())]

    def over_training(self, variable: str) -> list[NamedResult]:
        """Return the results of several steps that hold a variable."""
        return [member for member in self.having(variable) if "step" in member.over_steps.dims]

    def colour(self, member: NamedResult, role: str) -> str:
        """Return the colour of a single result's role, or that of one result among several."""
        return role if self.single else SERIES[member.number % len(SERIES)]

    def label(self, member: NamedResult, name: str, length: int = 40) -> str:
        """Return the name of a line: `name` for a single result, else the result's, cut to a length.

        Where the cut names of two results are equal, each begins with its number.
        """
        if self.single:
            return name
        short = [shorten(other.name, length) for other in self.members]
        if short.count(short[member.number]) == 1:
            return short[member.number]
        return f"{member.number + 1}: {shorten(member.name, length - 3)}"

    def panel_title(self, name: str, member: NamedResult) -> str:
        """Return the title of a panel that shows one result."""
        return name if self.single else f"{name} · {self.label(member, name, 26)}"


def result_names(results: Sequence[xr.Dataset], files: Sequence[str] = ()) -> list[str]:
    """Name each result by what tells it from the others: the model, then the text, then the file, then a number.

    Args:
        results: The results.
        files: Names of their files; "" for a result that is of no file.
    """
    names = [model_name(result) for result in results]
    if len(set(names)) < len(names):
        names = [f"{name}, {text_name(result)}" for name, result in zip(names, results, strict=True)]
    if len(set(names)) < len(names) and all(files) and len(set(files)) == len(names):
        names = [f"{file} · {model_name(result)}" for file, result in zip(files, results, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return names
