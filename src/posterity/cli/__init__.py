"""The command line: a thin shell around one function call each.

In reading order: `main` (the app and its measuring commands), `training`, `options`, `outputs`, `exit_codes`.
"""
