"""A model and windows of text in, a result out.

In reading order: `measure` (start reading here), `account` (the ledger), `loss_split` (own and later losses) and
`hidden_gradients`, `loss_matrix` (inspect()), `head_folding` (fold()), `distributed` (several processes), `run_state`
and `state_folder` (unfinished runs on disk), `estimate`, `provenance`.
"""
