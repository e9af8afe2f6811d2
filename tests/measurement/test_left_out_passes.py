"""Backward passes with gradients that are not finite: left out of an account as a whole, an error of `measure`."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny import summed_loss, tiny, tokens

import posterity
from posterity import InputError
from posterity.reporting.result_words import reading_notes

LORA = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


def spoil(model, layer):
    """Make the gradient at the output of a layer infinite; the layers behind it have finite ones."""
    return model.model.layers[layer].register_forward_hook(
        lambda _module, _args, output: (
            output * torch.ones((), dtype=output.dtype).requires_grad_()
            if not output.requires_grad
            else (output.register_hook(lambda grad: grad * math.inf), output)[1]
        )
    )


def same(mine, right):
    for name in right.data_vars:
        np.testing.assert_array_equal(mine[name], right[name], err_msg=name)


@pytest.mark.parametrize(("layer", "reentrant"), [(2, None), (0, None), (0, False), (0, True)])
def test_a_pass_that_is_not_finite_somewhere_is_left_out_everywhere(layer, reentrant, caplog):
    model, batches = tiny("llama"), [tokens(2, seed=seed) for seed in range(4)]
    if reentrant is not None:
        model.train().activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with posterity.account(model) as ledger:
        for number, ids in enumerate(batches):
            hook = spoil(model, layer) if number in (1, 3) else None
            summed_loss(model, ids).backward()
            if hook is not None:
                hook.remove()
    with posterity.account(model) as plain:
        for ids in (batches[0], batches[2]):
            summed_loss(model, ids).backward()
    assert ledger.documents == 4
    same(ledger.result(), plain.result())
    assert (ledger.result().attrs["left_out_passes"], plain.result().attrs["left_out_passes"]) == (2, 0)
    assert caplog.text.count("is not finite: this backward pass is left out of the ledger") == 1
    assert "Left out: 2 backward passes with gradients that are not finite." in reading_notes(ledger.result())
    assert not any("Left out" in note for note in reading_notes(plain.result()))


def scaled_training(model, ids, steps):
    """Yield before and after each pass of a training in half precision, whose first scales are too large."""
    optimizer, scaler = torch.optim.SGD(model.parameters(), 1e-3), torch.amp.GradScaler("cpu", init_scale=2.0**24)
    for _ in range(steps):
        yield
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        yield
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@pytest.mark.slow  # products in half precision on a CPU
def test_a_pass_too_large_for_half_precision_does_not_end_a_scaled_training():
    entered, left_out = [], 0
    model = tiny("llama", torch.float32)
    training = scaled_training(model, tokens(2), 14)
    for _ in training:
        with posterity.account(model) as ledger:
            next(training)
        if ledger.documents:
            entered.append(ledger.result())
            continue
        left_out += 1
        with pytest.raises(InputError, match=r"finite \(1 are left out\): check the model, use float32"):
            ledger.result()
    assert left_out > 2
    assert len(entered) > 2

    model = tiny("llama", torch.float32)
    with posterity.account(model) as ledger:
        for _ in scaled_training(model, tokens(2), 14):
            pass
    assert ledger.result().attrs["left_out_passes"] == left_out
    np.testing.assert_allclose(ledger.result().credit, sum(result.credit for result in entered), rtol=1e-12)


def test_two_losses_sent_back_together_enter_together():
    model, first, second = tiny("llama"), tokens(1, seed=1), tokens(1, seed=2)
    with posterity.account(model) as ledger:
        (summed_loss(model, first) + summed_loss(model, second)).backward()
        summed_loss(model, first).backward()
    assert ledger.documents == 3
    ledger.clear()
    with pytest.raises(InputError, match="no backward pass has been seen"):
        ledger.result()


def test_a_measurement_ends_with_the_window_that_is_not_finite():
    model = tiny("llama")
    spoil(model, 1)
    with pytest.raises(InputError, match=r"layer model.layers.1.self_attn is not finite in window document 0 #0"):
        posterity.measure(model, None, tokens(1), context=12, progress=False)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.parametrize("reads", [(1, 0, 1), (0, 1, 1)])
def test_adapters_of_some_passes_only_have_a_row_for_every_document(reads):
    model, ids = get_peft_model(tiny("llama"), LORA), [tokens(1, seed=seed) for seed in range(len(reads))]
    model.requires_grad_(True)

    def run(row, active):
        if active:
            summed_loss(model, row).backward()
        else:
            with model.disable_adapter():
                summed_loss(model, row).backward()

    with posterity.account(model) as ledger:
        for row, active in zip(ids, reads, strict=True):
            run(row, active)
            hook = spoil(model.base_model.model, 1)
            run(row, active)
            hook.remove()
    by_document = ledger.result().adapter_by_document
    assert (ledger.documents, ledger.result().attrs["left_out_passes"]) == (len(reads), len(reads))
    for document, (row, active) in enumerate(zip(ids, reads, strict=True)):
        with posterity.account(model) as single:
            run(row, active)
        right = single.result().adapter_by_document.isel(document=0).values if active else 0.0
        np.testing.assert_array_equal(by_document.isel(document=document), right)
