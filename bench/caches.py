"""Memory and time of a compressed cache beside the model's own.

python bench/caches.py PRICES [--model default] [--tokens 4096] [--new 64] [--keep 0.25] [--repeat 3]

PRICES is a folder of `posterity prices` for the model. The prompt is the beginning of the default text.
Prints bytes of both caches behind the prompt; seconds of the prompt, of predicting its prices and of dropping pairs;
milliseconds of a generated token over both caches, medians of alternating repeats.
"""

import argparse
import statistics
import time

import torch
from transformers import DynamicCache

import posterity
from posterity.inputs.documents import default_text
from posterity.inputs.windows import cut_windows
from posterity.models.compressed_cache import CompressedCache
from posterity.models.compressed_layer import CompressedLayer


class Clock:
    """Seconds spent in some methods."""

    def __init__(self):
        self.seconds = 0.0

    def wrap(self, function):
        """Return the function with its time taken."""

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def run(model, ids, cache, new):
    """Return seconds of the prompt and of each new token."""
    times = []
    token = ids
    for _ in range(new + 1):
        start = time.perf_counter()
        with torch.no_grad():
            logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        times.append(time.perf_counter() - start)
        token = logits[:, -1:].argmax(-1)
    return times[0], statistics.median(times[1:])


def own_bytes(cache):
    """Return the bytes of keys and values."""
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prices")
    parser.add_argument("--model", default="default")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    loaded = posterity.load_model(options.model)
    model, prices = loaded.model.eval(), posterity.Prices.load(options.prices)
    ids = cut_windows([default_text()], loaded.tokenizer, options.tokens, 1)[0].ids[None].to(model.device)
    predict, drop = Clock(), Clock()
    observe, evict, attend = CompressedCache.observe, CompressedCache.evict, CompressedLayer.observe
    rows = []
    for _ in range(options.repeat):
        own = DynamicCache(config=model.config)
        own_times = run(model, ids, own, options.new)
        with posterity.compress(model, prices, options.keep) as cache:
            predict.seconds = drop.seconds = 0.0
            CompressedCache.observe, CompressedCache.evict = predict.wrap(observe), drop.wrap(evict)
            CompressedLayer.observe = predict.wrap(attend)
            try:
                with torch.no_grad():
                    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                sizes = cache.nbytes
                shares = predict.seconds, drop.seconds
                cache.reset()
                times = run(model, ids, cache, options.new)
            finally:
                CompressedCache.observe, CompressedCache.evict, CompressedLayer.observe = observe, evict, attend
        own.crop(-options.new)
        rows.append((own_times[0], own_times[1], times[1], *shares, sizes / own_bytes(own)))
    names = ("prompt, s", "token over own cache, s", "token over compressed cache, s", "predicting, s", "dropping, s",
             "bytes by own")  # fmt: skip
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    for name, value in zip(names, medians, strict=True):
        print(f"{name:34} {value:.4f}")
    print(f"predicting by prompt               {medians[3] / medians[0]:.4f}")
    print(f"dropping by prompt                 {medians[4] / medians[0]:.4f}")
    print(f"token by token over own cache      {statistics.median([row[2] / row[1] for row in rows]):.3f}")


if __name__ == "__main__":
    main()
