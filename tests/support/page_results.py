"""Results for tests of pages, and the names of their figures."""

from support.sample import sample

HOSTILE = "<b>&lt;</b><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'\"{{7*7}}%{y}\u2028"
CHARTS = ["reach", "lags", "map", "head", "layers", "positions", "first", "weights", "agreement"]
LOSS_CHARTS = ["loss_parts", "inputs", "loss_positions", "modules", "horizons", "head_horizons"]
KINDS = ["self_attn.q_proj", "mlp.experts.0.up", "mlp.experts.1.up"]
PARAMETERS = ["model.embed", *(f"model.layers.{layer}.{kind}" for layer in range(4) for kind in KINDS), "model.norm"]


def hostile_result():
    return sample(model=HOSTILE, text_name=HOSTILE, texts=[HOSTILE] * 5, modules=[HOSTILE] * 4, revision=HOSTILE)


def loss_result():
    """With own and later losses, horizons and parameters; the last layer lacks a head."""
    return sample(losses=True, horizons=(1, 2, 4, 8, 16, 32), parameters=PARAMETERS, missing_heads=1)
