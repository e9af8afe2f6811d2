"""Figures for papers in matplotlib: the numbers of `posterity.stats`, one plot on one pair of axes.

Each function takes a result and `ax=None`, and returns the axes. Without axes it makes a figure of a column's width
(3.3 inches) whose text stays text in PDF, PS and SVG files: `plot.lags(result).figure.savefig("lags.pdf")`. With axes,
sizes and fonts are those of their figure. Of a result of several training steps the last one is drawn. Bands are what
tables print behind the ± (`posterity.stats.uncertainty`): one standard error over windows, half the 95 % interval for 3
to 7 windows, nothing for fewer. The bars of an audit are one standard error.
"""

from posterity.plotting.audit_plot import plot_audit as audit
from posterity.plotting.credit_plots import plot_heads as heads
from posterity.plotting.credit_plots import plot_lags as lags
from posterity.plotting.credit_plots import plot_reach as reach
from posterity.plotting.credit_plots import plot_sinks as sinks
from posterity.plotting.feature_plot import plot_features as features
from posterity.plotting.loss_plots import plot_horizon as horizon
from posterity.plotting.loss_plots import plot_losses as losses
from posterity.plotting.loss_plots import plot_matrix as matrix

__all__ = ["audit", "features", "heads", "horizon", "lags", "losses", "matrix", "reach", "sinks"]


def __dir__() -> list[str]:
    """List the plots, for tab completion."""
    return __all__
