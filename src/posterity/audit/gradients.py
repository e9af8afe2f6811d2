"""To be written."""

from posterity.audit.clause import Clause

CLAUSES: tuple[Clause, ...] = ()
