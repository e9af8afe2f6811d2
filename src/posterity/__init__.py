"""Posterity shows, exactly, who the keys and values of causal attention are written for.

Each public name is imported from its module on first use (PEP 562), so that the command line answers at once and
`posterity.load` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from posterity._version import __version__

if TYPE_CHECKING:
    from posterity.clauses.audit import audit
    from posterity.errors import InputError
    from posterity.inputs.model import load_folded, load_model
    from posterity.measurement.account import account
    from posterity.measurement.compress import compress
    from posterity.measurement.distributed import Processes
    from posterity.measurement.document_scores import score
    from posterity.measurement.eviction import evict
    from posterity.measurement.feature_gradients import features
    from posterity.measurement.head_folding import fold
    from posterity.measurement.local_layers import windows
    from posterity.measurement.loss_matrix import inspect
    from posterity.measurement.measure import measure
    from posterity.measurement.price_fit import Prices
    from posterity.models.horizon import horizon
    from posterity.models.linear import as_linear
    from posterity.models.probe import check
    from posterity.ops.attention import attention
    from posterity.ops.block_kernels import choose_kernels
    from posterity.ops.horizon_rules import Discount, EdgeWindow, Full, Leak, Myopic
    from posterity.ops.mask import Mask
    from posterity.plotting import plot
    from posterity.reporting.report import report
    from posterity.reporting.summary import summary
    from posterity.results import stats
    from posterity.results.files import load, save
    from posterity.results.reach import reach
    from posterity.results.tidy_table import table
    from posterity.training.compare import compare
    from posterity.training.monitor import Monitor
    from posterity.training.trainer import Trainer

_HOMES = {
    "clauses.audit": ("audit",),
    "errors": ("InputError",),
    "inputs.model": ("load_folded", "load_model"),
    "measurement.account": ("account",),
    "measurement.compress": ("compress",),
    "measurement.distributed": ("Processes",),
    "measurement.document_scores": ("score",),
    "measurement.eviction": ("evict",),
    "measurement.feature_gradients": ("features",),
    "measurement.head_folding": ("fold",),
    "measurement.local_layers": ("windows",),
    "measurement.loss_matrix": ("inspect",),
    "measurement.measure": ("measure",),
    "measurement.price_fit": ("Prices",),
    "models.linear": ("as_linear",),
    "models.horizon": ("horizon",),
    "models.probe": ("check",),
    "ops.attention": ("attention",),
    "ops.block_kernels": ("choose_kernels",),
    "ops.horizon_rules": ("Discount", "EdgeWindow", "Full", "Leak", "Myopic"),
    "ops.mask": ("Mask",),
    "reporting.report": ("report",),
    "reporting.summary": ("summary",),
    "results.reach": ("reach",),
    "results.files": ("load", "save"),
    "results.tidy_table": ("table",),
    "training.compare": ("compare",),
    "training.monitor": ("Monitor",),
    "training.trainer": ("Trainer",),
}
_MODULES = {"plot": "plotting.plot", "stats": "results.stats"}  # public names that are modules
_HOME = {name: module for module, names in _HOMES.items() for name in names} | _MODULES
__all__ = [
    "Discount",
    "EdgeWindow",
    "Full",
    "InputError",
    "Leak",
    "Mask",
    "Monitor",
    "Myopic",
    "Prices",
    "Processes",
    "Trainer",
    "__version__",
    "account",
    "as_linear",
    "attention",
    "audit",
    "check",
    "choose_kernels",
    "compare",
    "compress",
    "evict",
    "features",
    "fold",
    "horizon",
    "inspect",
    "load",
    "load_folded",
    "load_model",
    "measure",
    "plot",
    "reach",
    "report",
    "save",
    "score",
    "stats",
    "summary",
    "table",
    "windows",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module, once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOME[name]}")
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    if not _HOME[name].startswith(("errors", "ops.")):
        # nnsight gives every object a method `save`, which would hide this name until it is bound.
        globals().setdefault("save", import_module(f"{__name__}.results.files").save)
    return value


def __dir__() -> list[str]:
    """List the public names, for tab completion."""
    return __all__
