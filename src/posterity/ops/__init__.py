"""What runs: causal attention whose backward pass can be observed. Imports torch only.

In reading order: `attention` (the operator), `mask` and `intervals` (which pairs are edges, block by block),
`horizon_rules` (a factor on the gradient of every edge), `fused_kernels` (torch's own, where they apply).
"""
