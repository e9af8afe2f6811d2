"""TransformerLens: the lag profile from forward and backward hooks on q, k, v, pattern and z of every layer."""

import torch
from cell import main, timed
from dense import credit_by_lag
from transformer_lens.model_bridge import TransformerBridge

POINTS = {"query": "hook_rot_q", "key": "hook_rot_k", "value": "hook_v", "pattern": "hook_pattern", "output": "hook_z"}


def profile(folder, model, ids, budget):
    bridge = TransformerBridge.boot_transformers(folder, hf_model=model, device="cpu")
    credit, seconds = timed(lambda: model_credit(bridge, ids))
    return {"credit": credit.numpy()}, seconds, False


def model_credit(bridge, ids):
    """Credit (layer, stream, lag). A layer is accounted and forgotten as soon as its gradients are complete."""
    tensors, grads, credit = {}, {}, {}

    def hooks(layer, name):
        def forward(x, hook):
            tensors[layer, name] = heads_first(name, x.detach())

        def backward(grad, hook):
            layer_grads = grads.setdefault(layer, {})
            layer_grads[name] = heads_first(name, grad.detach())
            if len(layer_grads) == len(POINTS):
                inputs = {point: tensors.pop((layer, point)) for point in POINTS}
                del inputs["output"]
                credit[layer] = credit_by_lag(**inputs, grads=grads.pop(layer), scale=inputs["key"].shape[-1] ** -0.5)

        return forward, backward

    forward_hooks, backward_hooks = [("embed.hook_out", lambda x, hook: x.requires_grad_())], []
    for layer in range(len(bridge.blocks)):
        for name, point in POINTS.items():
            forward, backward = hooks(layer, name)
            forward_hooks.append((f"blocks.{layer}.attn.{point}", forward))
            backward_hooks.append((f"blocks.{layer}.attn.{point}", backward))
    with bridge.hooks(fwd_hooks=forward_hooks, bwd_hooks=backward_hooks):
        logits = bridge(ids, return_type="logits")[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    return torch.stack([credit[layer] for layer in range(len(bridge.blocks))])


def heads_first(name, x):
    """Move heads before positions: TransformerLens has (batch, position, head, dim) for all but the pattern."""
    return x if name == "pattern" else x.transpose(1, 2)


if __name__ == "__main__":
    main(profile, "transformer-lens")
