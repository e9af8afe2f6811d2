"""The clauses of the audit, in the order of their numbers. A new clause is one file and one entry here."""

from posterity.clauses.clause import Clause
from posterity.clauses.context_growth import GROWTH
from posterity.clauses.credit_shares import LOOK_AHEAD, LOOK_BACK, WEIGHTS
from posterity.clauses.futures import FUTURES
from posterity.clauses.later_use import LATER_USE
from posterity.clauses.linearity import LINEARITY
from posterity.clauses.pasts import PASTS
from posterity.clauses.readers import READERS
from posterity.clauses.self_default import SELF_DEFAULT

CLAUSES: tuple[Clause, ...] = (
    LOOK_BACK, LOOK_AHEAD, READERS, WEIGHTS, GROWTH, LATER_USE, SELF_DEFAULT, LINEARITY, FUTURES, PASTS,
)  # fmt: skip
