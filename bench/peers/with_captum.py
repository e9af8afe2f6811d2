"""Captum: one layer attribution per token: the gradient of the token's loss at the outputs of all k_proj and v_proj.

Captum attributes one target at a time, so every loss takes a forward and a backward pass, over the prefix it can see.
Inner products of gradients are the same before and after the rotary embedding, which only turns the keys.
"""

import torch
from captum.attr import LayerGradientXActivation
from cell import main, split_losses


def losses(folder, model, ids, budget):
    embedded = model.get_input_embeddings()(ids).detach()
    layers = [proj for x in model.model.layers for proj in (x.self_attn.k_proj, x.self_attn.v_proj)]

    def last(prefix):
        """Negative log-likelihood of every word as the next one: Captum picks the target."""
        # not logits_to_keep=1: a head's backward pass from a single row rounds ten times worse
        return -model(inputs_embeds=prefix, use_cache=False).logits[:, -1].log_softmax(-1)

    def total(inputs):
        logits = model(inputs_embeds=inputs, use_cache=False).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")[None]

    def attribute(function, inputs, target=None):
        gradients = LayerGradientXActivation(function, layers, multiply_by_inputs=False).attribute(inputs, target)
        return [x[0].detach() for x in gradients]

    def prepare():
        return attribute(total, embedded), lambda t: attribute(last, embedded[:, : t + 1], int(ids[0, t + 1]))

    return split_losses(prepare, ids.shape[1], budget)


if __name__ == "__main__":
    main(losses, "captum")
