"""Keeping transformers quiet: errors come as one line, and progress bars are the project's own."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' reports and bars, for errors come as one line; bars of a download stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    levels, hub_bars = (logging, hub_logging), not are_progress_bars_disabled()
    before = [module.get_verbosity() for module in levels]
    with warnings.catch_warnings(), without_bars():
        warnings.simplefilter("ignore")
        try:
            for module in levels:
                module.set_verbosity_error()
            if hub_bars:
                enable_progress_bars()
            yield
        finally:
            for module, level in zip(levels, before, strict=True):
                module.set_verbosity(level)
            if not hub_bars:
                disable_progress_bars()


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, transformers shows no progress bar for every file that it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
