"""Causal attention whose backward pass can be observed. Imports torch only, and Triton kernels where torch has Triton.

In reading order: `attention` (the operator), `blockwise` (its two passes, block by block), `scores` (of edges), `mask`,
`mask_mods` and `intervals` (which pairs are edges, block by block), `horizon_rules` (a factor on the gradient of every
edge), `recurrence` (the same for states and convolutions), `fused_kernels` (torch's own, where they apply),
`block_kernels` (where ours do), `triton_attention` (by ours), `block_table` (the blocks of a mask as tensors), `heads`
(grouped-query attention), `precision` (of sums).
"""
