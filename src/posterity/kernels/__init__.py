"""Triton kernels. Imports triton only, which torch brings along for CUDA.

In reading order: `tiles` (a block of scores in the registers of a program), `attention_passes` (forward and backward),
`edge_reductions` (sums over edges).
"""
