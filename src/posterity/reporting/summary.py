"""`posterity.summary`: the table of a result, an audit or a comparison, in a terminal or a notebook."""

from collections.abc import Callable

import xarray as xr
from rich.console import Console

from posterity.reporting.audit_table import print_audit
from posterity.reporting.comparison_table import print_comparison
from posterity.reporting.result_table import print_result
from posterity.results.audit_schema import AUDIT
from posterity.results.comparison_schema import COMPARISON
from posterity.results.kind import kind_name
from posterity.results.schema import RESULT

PRINTERS: dict[str, Callable[[xr.Dataset, Console], None]] = {  # by the name of a kind
    RESULT.name: print_result,
    AUDIT.name: print_audit,
    COMPARISON.name: print_comparison,
}


def summary(result: xr.Dataset, console: Console | None = None) -> None:
    """Print table and sentence, in a terminal (from 80 columns) or a notebook; of several steps, those of the last.

    Of an audit, the table of its clauses; of a comparison, that of its arms.

    Raises:
        InputError: It is no result.
    """
    print_kind = PRINTERS.get(kind_name(result), print_result)
    print_kind(result, console or Console(highlight=False))
