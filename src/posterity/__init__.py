"""Posterity shows, exactly, who the keys and values of causal attention are written for.

The functions below are imported when they are first used, so that the command line answers at once.
"""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posterity.account import account
    from posterity.attention import attention
    from posterity.audit import audit
    from posterity.errors import InputError
    from posterity.files import load, save
    from posterity.fold import fold
    from posterity.folded import load_folded
    from posterity.horizon import Discount, EdgeWindow, Full, Leak, Myopic
    from posterity.inspect import inspect
    from posterity.linear import as_linear
    from posterity.mask import Mask
    from posterity.measure import measure
    from posterity.models import check, horizon
    from posterity.monitor import Monitor
    from posterity.report import report
    from posterity.summary import summary
    from posterity.train import Trainer

__all__ = [
    "Discount",
    "EdgeWindow",
    "Full",
    "InputError",
    "Leak",
    "Mask",
    "Monitor",
    "Myopic",
    "Trainer",
    "account",
    "as_linear",
    "attention",
    "audit",
    "check",
    "fold",
    "horizon",
    "inspect",
    "load",
    "load_folded",
    "measure",
    "report",
    "save",
    "summary",
]

try:
    __version__ = version("posterity")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "unknown"

_HOME = {
    "InputError": "errors",
    "Mask": "mask",
    "as_linear": "linear",
    "check": "models",
    "load": "files",
    "load_folded": "folded",
    "save": "files",
    **dict.fromkeys(("Discount", "EdgeWindow", "Full", "Leak", "Myopic"), "horizon"),
    "Monitor": "monitor",
    "Trainer": "train",
    "horizon": "models",
}


def __getattr__(name: str) -> Any:
    """Import a public function from its module, by default the one of the same name."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, name)}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Where a module and its function share a name, `posterity.<name>` is the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in __all__):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
