"""Patched forward passes: every loss equals that of an eager model whose edges, keys and values are changed by hand."""

import pytest
import torch
from support.loss_oracles import exact
from support.losses_by_hand import losses_by_hand
from support.tiny import tokens

from posterity import InputError
from posterity.models.attach import head_counts, watch_model
from posterity.models.patching import (
    LATER_MEAN,
    NO_SELF,
    OWN_MEAN,
    SELF_ONLY,
    SINK_AND_SELF,
    Patch,
    patched_losses,
)

NAMES = ["llama", "qwen3", "gpt2", "mistral", "gemma2", "gpt_oss"]
POSITIONS = torch.tensor([2, 5, 6])
ALL = [(NO_SELF, None), (SINK_AND_SELF, None), (SELF_ONLY, None), (OWN_MEAN, POSITIONS), (LATER_MEAN, POSITIONS)]


def close(losses, expected):
    torch.testing.assert_close(losses, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_every_patch_is_an_edge_or_a_key_and_value_changed_by_hand(name):
    model, ids = exact(name), tokens(1)[0]
    cases = [
        (kind, layer, head, positions)
        for kind, positions in ALL
        for layer, head in ((1, 3), (2, None), (None, 1), (None, None))
    ]
    losses = patched_losses(model, ids, [Patch(*case) for case in cases], batch=3)
    for row, case in zip(losses, cases, strict=True):
        close(row, losses_by_hand(model, ids, *case))
    plain = losses_by_hand(model, ids)
    close(patched_losses(model, ids, [None])[0], plain)
    assert ((losses - plain).abs().amax(1) > 1e-4).all()  # every one of these patches matters


@pytest.mark.parametrize("name", NAMES)
def test_every_head_of_a_batch_has_its_own_patch_and_the_shortcut_changes_nothing(name):
    model, ids = exact(name), tokens(1, 9)[0]
    patches = [Patch(NO_SELF, layer, head) for head in range(4) for layer in range(3)] + [None]
    done = []
    with watch_model(model):
        short = patched_losses(model, ids, patches, batch=4, advance=lambda *x: done.append(x))
        long = patched_losses(model, ids, patches, batch=5, shortcut=False)
    torch.testing.assert_close(short, long, rtol=1e-13, atol=1e-13)
    close(
        short, torch.stack([losses_by_hand(model, ids, *(("no self", p.layer, p.head) if p else ())) for p in patches])
    )
    assert sum(rows for rows, _ in done) == len(patches)
    assert sum(count for _, count in done) == 9 * len(patches)


def test_layers_below_a_patch_are_not_computed():
    model, ids = exact("llama"), tokens(1)[0]
    calls = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
    with watch_model(model):
        calls.clear()
        patched_losses(model, ids, [Patch(NO_SELF, 2, head) for head in range(4)], batch=2)
    plain, sound, batches = [0, 1, 2], [2], [2, 2]
    assert calls == plain + sound + batches


def test_the_model_comes_back_as_it_was_after_patches_and_after_errors():
    model, ids = exact("llama"), tokens(1)[0]
    before_vars = [dict(vars(module)) for module in model.modules()]
    before = model(input_ids=ids[None]).logits
    patched_losses(model, ids, [Patch(SELF_ONLY, 2)])
    with pytest.raises(InputError, match="a head from 0 to 3; got 4"):
        patched_losses(model, ids, [Patch(SELF_ONLY, 2, 4)])
    for module, fields in zip(model.modules(), before_vars, strict=True):
        assert vars(module).get("forward") is fields.get("forward")
    assert torch.equal(model(input_ids=ids[None]).logits, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_is_no_plain_stack_falls_back_to_whole_passes():
    ids = tokens(1)[0]
    patches = [Patch(NO_SELF, layer) for layer in (0, 1, 2)]
    around = exact("llama")  # what the last layer adds is put down by the first, outside the stack
    seen = {}
    first, last = around.model.layers[0].mlp, around.model.layers[2].mlp
    first.register_forward_hook(lambda module, args, output: seen.update(first=output))
    last.register_forward_hook(lambda module, args, output: output + seen.pop("first"))
    losses = patched_losses(around, ids, patches, batch=2)
    assert torch.equal(losses, patched_losses(around, ids, patches, batch=2, shortcut=False))
    close(losses, torch.stack([losses_by_hand(around, ids, "no self", layer) for layer in (0, 1, 2)]))


def test_what_an_earlier_patch_left_behind_is_found_out():
    """The last layer reads what the middle one put down, which a patch of the middle one has changed."""
    model, ids, seen = exact("llama"), tokens(1)[0], {}
    middle, last = model.model.layers[1].mlp, model.model.layers[2].mlp
    middle.register_forward_hook(lambda module, args, output: seen.update(output=output))
    last.register_forward_hook(lambda module, args, output: output + seen["output"])
    losses = patched_losses(model, ids, [Patch(SELF_ONLY, layer) for layer in (1, 2)], batch=1)
    close(losses, torch.stack([losses_by_hand(model, ids, "self only", layer) for layer in (1, 2)]))


def test_a_module_that_is_called_twice_is_patched_call_by_call():
    """A stack run through twice: layer numbers are those of the calls, and nothing is left out."""
    model, ids = exact("llama"), tokens(1)[0]
    own = model.model.layers[1].forward
    model.model.layers[1].forward = lambda hidden, **kwargs: own(own(hidden, **kwargs), **kwargs)
    assert head_counts(model) == [4, 4, 4, 4]
    losses = patched_losses(model, ids, [Patch(NO_SELF, layer) for layer in range(4)])
    everywhere = patched_losses(model, ids, [None, Patch(NO_SELF)], shortcut=False)
    assert len({round(row[-1].item(), 9) for row in (*losses, *everywhere)}) == 6  # six different things
    close(losses[0], losses_by_hand(model, ids, "no self", 0))
    close(losses[3], losses_by_hand(model, ids, "no self", 2))
    close(everywhere[1], losses_by_hand(model, ids, "no self"))


def test_an_impossible_patch_is_refused_in_one_line():
    model, ids = exact("llama"), tokens(1)[0]
    with pytest.raises(InputError, match=r"expects one of the kinds no self, .* got 'selfless'"):
        Patch("selfless")
    for kind, positions in ((OWN_MEAN, None), (NO_SELF, POSITIONS)):
        with pytest.raises(InputError, match="expects positions for its kinds own mean and later mean only"):
            Patch(kind, positions=positions)
    for patch, message in (
        (Patch(NO_SELF, 3), "a layer from 0 to 2; got 3"),
        (Patch(NO_SELF, -1), "a layer from 0 to 2; got -1"),
        (Patch(OWN_MEAN, positions=torch.tensor([12])), "positions from 0 to 11; got"),
        (Patch(OWN_MEAN, positions=torch.tensor([], dtype=torch.long)), "positions from 0 to 11; got"),
    ):
        with pytest.raises(InputError, match=message):
            patched_losses(model, ids, [patch])
    for wrong, batch in ((ids[:1], 8), (ids[None], 8), (ids, 0)):
        with pytest.raises(InputError, match="a window of 2 tokens and a batch of 1 at least"):
            patched_losses(model, wrong, [None], batch=batch)
