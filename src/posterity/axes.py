"""The labels of every axis, stated once for arithmetic, results and reports."""

STREAMS = ("query", "key", "value")


SIDES = ("self", "other")


TERMS = ("self", "other", "inner")


WRITTEN = ("key", "value")


PARTS = ("own", "self later", "future")


PAIRS = ("own", "self later", "future", "own . self later", "own . future", "self later . future")


LOSS_TERMS = ("own", "later", "inner")
