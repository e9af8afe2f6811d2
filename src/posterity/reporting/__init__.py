"""Datasets as words, tables and pages.

In reading order: `summary` (the table in a terminal), `report` (which page for which kind), `result_page`, `charts`,
`tables`, `inspected_text`, `audit_page`, `comparison_page`, `html`; templates, styles and scripts are in `assets`.
"""
