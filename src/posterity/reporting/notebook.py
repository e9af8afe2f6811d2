"""Which report of a notebook holds the script that all of its reports draw with."""

import sys
from typing import Any

_runs: dict[str, int] = {}  # cells that have shown a report: the number of their last run


def draws_with_other_script() -> bool:
    """Say whether a report that is shown now may draw with the script of an earlier one, which the notebook shows too.

    True in a cell that shows its first report after other cells have, and for the later reports of one run of a cell.
    A cell that runs again gets the script: what it showed before is gone. False where no notebook names its cells.
    """
    cell, run = _current_cell()
    if cell is None:
        return False
    same_run = _runs.get(cell) == run
    first_of_later_cell = bool(_runs) and cell not in _runs
    _runs[cell] = run
    return same_run or first_of_later_cell


def _current_cell() -> tuple[str | None, int]:
    """Return the id of the running cell, as ipykernel knows it, and the number of the run; None without one."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    try:
        cell = shell.get_parent()["metadata"]["cellId"]
    except (AttributeError, KeyError, TypeError):
        return None, 0
    return (str(cell) if cell else None), int(shell.execution_count)
