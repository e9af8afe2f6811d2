"""Silence transformers: errors come as one line, and progress bars are the project's own."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Hold back transformers' reports and bars, for errors come as one line; bars of a download stay."""
    loggers, hub_bars = (logging, hub_logging), not are_progress_bars_disabled()
    levels = [module.get_verbosity() for module in loggers]
    with warnings.catch_warnings(), hide_progress_bars():
        warnings.simplefilter("ignore")
        try:
            for module in loggers:
                module.set_verbosity_error()
            if hub_bars:
                enable_progress_bars()
            yield
        finally:
            for module, level in zip(loggers, levels, strict=True):
                module.set_verbosity(level)
            if not hub_bars:
                disable_progress_bars()


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide the progress bars that transformers shows for the files it reads or writes."""
    visible = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if visible:
            logging.enable_progress_bar()
