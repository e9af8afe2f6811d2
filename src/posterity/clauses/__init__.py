"""The audit: clauses of one kind in each file, with their measurement, baseline, verdict and charts.

In reading order: `subject` (the model, its texts and the plan), `clause` (what a clause consists of), `drawing`;
the clauses `credit_shares` (1, 2, 4), `readers`, `context_growth`, `later_use`, `self_default` with `dense_attention`,
`linearity`, `futures` with `continuations`, `ngrams` and `pull_products`, `pasts`, and `agreement` of the last two;
`all_clauses`; then `audit` (the loop), `saved_findings` (of an unfinished audit) and `dataset` (findings as a Dataset).
"""
