"""Datasets as words, tables and pages.

In a terminal: `summary` (which table for which kind), `result_table`, `result_words`, `reach_table`, `window_table`,
`audit_table`, `comparison_table`, `eviction_table`, `feature_table`, `explanation_text` (why something
is refused).

As a page: `report` (which page for which kind), `result_page`, `audit_page`, `comparison_page`, `eviction_page`,
`feature_page`. What they show: `key_numbers` (the first five), `charts` (the figures by name), `reach_chart`,
`lag_chart`, `head_maps`, `head_details` (one head at a time), `credit_charts`, `loss_charts`, `price_charts`,
`training_charts`, `tables` (the numbers of the figures) and `inspected_text` with `reader_table`.

How a figure is made: `panel_grid` (panels side by side as a plotly figure, at a width), `traces` (lines, bands and
axes), `bins`, `module_kinds` and `result_group` (what is drawn), `theme` (the plotly template), `page_figures` (figures
as JSON for a page), `html` (templates, escaping, content security policy), `notebook` (which report holds plotly's
script). Templates, styles and scripts are in `assets`; `theme.js` draws the figures of every page, `numbers.js` saves
them and makes their tables.
"""
