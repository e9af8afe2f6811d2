"""The inputs that a user names, as objects: texts as windows of tokens, names as loaded models.

In reading order: `arguments` (what a public function was called with), `windows` (read_corpus()), `packing`,
`named_documents` (every form in which documents come), `documents`, `conversations`, `tokenization`, `text_sources`,
`row_files`, `text_files`, `model` (load_model()), `model_source` (a name to a folder or a commit), `pretrained`
(weights and tokenizer), `model_files`, `adapter_folder`, `limits_folder` (folded heads, local layers), `checkpoints`,
`directions` (of the residual stream).
"""
