"""Labelled data: results, audits, comparisons, evictions and features as xarray Datasets, with no torch.

In reading order: `schema` (the variables of a result), `stats` (every share with its standard error: `head_stats`,
`lag_stats`, `sink_stats`, `weight_stats`, `loss_stats`, `price_stats`, `window_stats`, all made of `ratios`;
`uniform_attention`, a baseline by position), `reach` (lags that hold most of it, and windows), `window_plan` (which
layers may look back less far), `lag_bins` (between the ends of a bin of lags), `tidy_table` (table(): these numbers in
pandas), `files` (save() and load()), `kind` (what the kinds of Dataset have in common), `audit_schema`,
`comparison_schema`, `eviction_schema`, `feature_schema` with `feature_parts`, `steps` (results along training),
`netcdf` (the file format), `formatting` (numbers as text).
"""
