"""`posterity.summary`: the table of a result or of another kind of Dataset, in a terminal or a notebook."""

from collections.abc import Callable, Mapping

import xarray as xr
from rich.console import Console
from rich.text import Text

from posterity.reporting.audit_table import print_audit
from posterity.reporting.comparison_table import print_comparison
from posterity.reporting.eviction_table import print_eviction
from posterity.reporting.feature_table import print_features
from posterity.reporting.result_table import print_result
from posterity.reporting.window_table import print_windows
from posterity.results.audit_schema import AUDIT
from posterity.results.comparison_schema import COMPARISON
from posterity.results.eviction_schema import EVICTION
from posterity.results.feature_schema import FEATURES
from posterity.results.kind import kind_name
from posterity.results.schema import RESULT
from posterity.results.window_plan import WindowPlan

PRINTERS: dict[str, Callable[[xr.Dataset, Console], None]] = {  # by the name of a kind
    RESULT.name: print_result,
    AUDIT.name: print_audit,
    COMPARISON.name: print_comparison,
    EVICTION.name: print_eviction,
    FEATURES.name: print_features,
}


def summary(result: xr.Dataset | WindowPlan | Mapping[str, xr.Dataset], console: Console | None = None) -> None:
    """Print table and sentence, in a terminal (from 80 columns) or a notebook; of several steps, those of the last.

    Of an audit, the table of its clauses; of a comparison, that of its arms; of an eviction, that of its scorers; of
    features, those of layers and directions; of what `posterity.windows` returns, the prices of windows and the
    proposal; of a dict of results by name, one after the other under their names.

    Raises:
        InputError: It is no result.
    """
    console = console or Console(highlight=False)
    if isinstance(result, Mapping) and not isinstance(result, xr.Dataset):
        for name, member in result.items():
            console.rule(Text(str(name), style="bold"), align="left")
            summary(member, console)
        return
    if isinstance(result, WindowPlan):
        print_windows(result, console)
        return
    print_kind = PRINTERS.get(kind_name(result), print_result)
    print_kind(result, console)
