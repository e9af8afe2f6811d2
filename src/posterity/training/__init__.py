"""Training under a horizon, and its cost in held-out loss.

In reading order: `trainer`, `monitor` (measure while training) and `probe_windows`, `settings`, `tasks`, `data`,
`run` (a run is a folder), `compare`, `myopia`.
"""
