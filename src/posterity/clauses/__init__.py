"""The audit: one clause of the idea a file, each with its measurement, baseline, verdict and picture.

In reading order: `clause` (what a clause is), `credit_shares`, `readers`, `context_growth`, `later_use`, `self_default`,
`linearity`, `futures`, `pasts`, then `audit` (the loop) and `dataset` (findings as a Dataset).
"""
