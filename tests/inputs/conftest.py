"""Folders of tiny saved models, as fixtures."""

from support.model_folders import folder, made

__all__ = ["folder", "made"]
