"""The labels of every axis, stated once for arithmetic, results and reports."""

STREAMS = ("query", "key", "value")
SIDES = ("self", "other")  # of a gradient: what a position sends to itself, and the rest
READER_OF = ("first", "rest")  # edges by their key: the first positions of a document, and all others
TERMS = ("self", "other", "inner")  # squared norms of the two sides, and their inner product
WRITTEN = ("key", "value")  # the streams that later positions read
PARTS = ("own", "self later", "future")  # of a gradient at a key or value, by the losses that send it
PAIRS = ("own", "self later", "future", "own . self later", "own . future", "self later . future")
READER_QUANTITIES = ("attention", "key credit", "value credit")  # of the edges from a token to its readers
READER_LEVELS = (0.5, 0.9)  # parts of them, nearest readers first
LOSS_TERMS = ("own", "later", "inner")
QUANTITIES = ("attention", *(f"{stream} {kind}" for kind in ("mass", "credit") for stream in STREAMS))
# of the tails by lag of a document, with the rest of its edges, all of them, and their totals
MOMENTS = ("rest . rest", "rest . rest total", "rest . total", "all . all", "all . total")
# of the gradient of the parameters, by its path: through the residual stream at chosen positions to the own loss, or to
# later losses; or past them
FEATURE_PARTS = ("direct", "pre-cached", "shared")
FEATURE_PAIRS = (
    *FEATURE_PARTS, "direct . pre-cached", "direct . shared", "pre-cached . shared",
)  # fmt: skip
PULLS = ("own", "later", "own . own", "later . later", "own . later")
