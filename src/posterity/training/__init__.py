"""Train under a horizon, and compare what it costs.

In reading order: `trainer`, `monitor` (measure while training), `settings`, `tasks`, `data`, `run` (a run is a folder),
`compare`, `myopia`.
"""
