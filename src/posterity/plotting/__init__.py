"""Figures for papers: the numbers of `posterity.stats` in matplotlib, one plot on one pair of axes.

In reading order: `plot` (the public names), `credit_plots`, `loss_plots`, `feature_plot`, `audit_plot`, `canvas`
(figures of a column's width, lines with bands, maps).
"""
