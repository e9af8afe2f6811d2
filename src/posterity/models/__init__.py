"""All that knows how transformers runs a model: the operator inside one, for the length of a `with`.

In reading order: `language_model` (find it, freeze it), `weight_layout` (whole or in parts), `context_length`, `masks`
(masks as rules), `interception` (one attention call, and who answers it), `interface` (what transformers calls),
`projection_calls` (inputs and outputs of projections), `recompute` (queries, keys and values again), `shared_streams`
(calls that read the same keys), `state_horizon` (horizons outside attention), `watch` (calls and backward passes),
`recorder`, `other_paths`, `horizon_check` (do horizons hold there?), `gradient_check`, `packed_weights` and `probe`
(check()), `attach` (the watch over a model), `horizon` (horizon()), `chunked_loss`, `packed_rows` (do packed documents
see each other?), `checkpointing` (layers that run again), `layer_inputs` (the residual stream in front of layers and
its gradients); then models that are changed: `patching`, `folded_heads`, `window_limits` (layers that look back no
further than a window), `permanent_limits` (both as long as a model lives), `linear` (as_linear()); and caches:
`price_heads` (prices predicted), `observed_attention` (by the last queries of a prompt), `compressed_layer` and
`compressed_cache` (pairs dropped). `transformers_logging` keeps transformers quiet.
"""
