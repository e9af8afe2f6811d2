"""Folders of tiny saved models, as fixtures."""

from support.model_folders import folder, saved_model

__all__ = ["folder", "saved_model"]
