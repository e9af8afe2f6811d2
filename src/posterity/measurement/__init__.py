"""A model and windows of text in, a result out.

In reading order: `measure` (start reading here), `account` (the ledger), `loss_split` (own and later losses),
`loss_matrix` (inspect()), `head_folding` (fold()), `distributed`, `run_state`, `estimate`, `provenance`.
"""
