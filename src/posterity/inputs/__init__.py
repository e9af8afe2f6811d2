"""What a user names, as objects: texts as windows of tokens, names as loaded models.

In reading order: `windows`, `text_sources`, `model` (load_model()), `model_files`, `folded_folder`, `checkpoints`.
"""
