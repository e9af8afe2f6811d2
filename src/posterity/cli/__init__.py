"""The command line: a thin shell around one function call each.

In reading order: `main` (the app and its measuring commands), `training`, `windows`, `caches`, `features`, `tables`,
`guide` (what each command is for), `options`, `outputs`, `exit_codes`.

Whatever imports torch, transformers or xarray is imported inside the commands, or through the lazy names of
`posterity`, so that `--help` and a wrong option answer at once. These are the only imports inside functions.
"""
