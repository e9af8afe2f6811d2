"""All that knows how transformers runs a model: the operator inside one, for the length of a `with`.

In reading order: `language_model` (find it), `interface` (the attention function), `masks`, `watch` (calls and backward
passes), `probe` (check()), `attach`, `horizon` (horizon()), `chunked_loss`, `recompute`, `other_paths`; then models that
are changed: `patching`, `folded_heads`, `linear` (as_linear()).
"""
