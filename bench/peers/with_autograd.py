"""Plain autograd: one forward pass, then one backward pass per loss to the keys and values of all layers."""

import torch
from cell import main, split_losses


def losses(folder, model, ids, budget, dtype="float32"):
    model.to(getattr(torch, dtype))
    layers = [proj for x in model.model.layers for proj in (x.self_attn.k_proj, x.self_attn.v_proj)]
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())

    def prepare():
        written = []
        hooks = [layer.register_forward_hook(lambda module, inputs, output: written.append(output)) for layer in layers]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        for hook in hooks:
            hook.remove()
        position_losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")

        def gradients(loss):
            return [x[0] for x in torch.autograd.grad(loss, written, retain_graph=True)]

        return gradients(position_losses.sum()), lambda t: gradients(position_losses[t])

    return split_losses(prepare, ids.shape[1], budget)


if __name__ == "__main__":
    main(losses)
