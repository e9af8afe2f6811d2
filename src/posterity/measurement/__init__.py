"""A model and windows of text in, a result out.

In reading order: `measure` (start reading here), `window_batch`, `account` and its `ledger`, `price_account` (prices
in the ledger), `loss_split` (own and later losses) and `hidden_gradients`, `loss_matrix` (inspect()),
`feature_gradients` (features()), `head_folding` (fold()), `local_layers` (windows()), `predictions` (divergence of
two conditions); caches: `price_fit` (Prices) with `price_measurement` and `price_calibration`, `compress`
(compress()), `eviction` (evict()) with `eviction_texts`, `cache_scorers` and their `prompt_layer`; `document_scores`
(score()); `distributed` (several processes), `run_state` (an unfinished run on disk), `state_folder` (its files and
its lock), `estimate`, `memory_timeline`, `forecast` (before there are texts), `provenance`.
"""
