"""TransformerLens: the lag profile from forward and backward hooks on q, k, v, pattern and z of every layer."""

import torch
from cell import main, timed
from dense import credit_by_lag
from transformer_lens.model_bridge import TransformerBridge

POINTS = {"query": "hook_rot_q", "key": "hook_rot_k", "value": "hook_v", "pattern": "hook_pattern", "output": "hook_z"}


def profile(folder, model, ids, budget):
    bridge = TransformerBridge.boot_transformers(folder, hf_model=model, device="cpu")
    credit, seconds = timed(lambda: passed(bridge, ids))
    return {"credit": credit.numpy()}, seconds, False


def passed(bridge, ids):
    """Credit (layer, stream, lag). A layer is accounted and forgotten as soon as its gradients are complete."""
    kept, grads, credit = {}, {}, {}

    def keep(layer, name):
        def forward(x, hook):
            kept[layer, name] = heads_first(name, x.detach())

        def backward(grad, hook):
            found = grads.setdefault(layer, {})
            found[name] = heads_first(name, grad.detach())
            if len(found) == len(POINTS):
                inputs = {one: kept.pop((layer, one)) for one in POINTS}
                del inputs["output"]
                credit[layer] = credit_by_lag(**inputs, grads=grads.pop(layer), scale=inputs["key"].shape[-1] ** -0.5)

        return forward, backward

    forward, backward = [("embed.hook_out", lambda x, hook: x.requires_grad_())], []
    for layer in range(len(bridge.blocks)):
        for name, point in POINTS.items():
            there, back = keep(layer, name)
            forward.append((f"blocks.{layer}.attn.{point}", there))
            backward.append((f"blocks.{layer}.attn.{point}", back))
    with bridge.hooks(fwd_hooks=forward, bwd_hooks=backward):
        logits = bridge(ids, return_type="logits")[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    return torch.stack([credit[layer] for layer in range(len(bridge.blocks))])


def heads_first(name, x):
    """All but the pattern are (batch, position, head, dim) there."""
    return x if name == "pattern" else x.transpose(1, 2)


if __name__ == "__main__":
    main(profile, "transformer-lens")
