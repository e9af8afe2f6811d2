"""Gradients as sums of terms: which edges, lags and positions they come from. Imports torch only.

In reading order: `credit` (one backward pass), `bins` (of lags), `edge_sums` (over all edges: by kernels, or by a
sweep), `triton_sums` (by kernels), `sweep` (block by block), `lag_sums` (along the diagonals of the blocks),
`price_sums` and `prices` (what later losses lose without some edges), `first_keys` (edges into the first keys of a
document), `tail_moments` (for the errors of windows), `projections` (which matrices,
adapters and packed weights a module has), `gram`, `weight_gradients` (W_Q, W_K, W_V), `adapter_gradients`,
`edge_blocks` (single edges), `participation` (how many readers a key has), `reader_lags` (how far away they are),
`accumulator` (sums over documents).
"""
