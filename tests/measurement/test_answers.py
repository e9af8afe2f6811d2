"""With a loss on the answers only, every number is that of plain autograd with the label -100 at all other tokens."""

import numpy as np
import pytest
import torch
from support.loss_oracles import by_position, close, exact, own_of, position_losses
from support.reference import by_lag
from support.spy import spy_on
from support.texts import WORDS, byte_tokenizer
from support.tiny import tiny

import posterity

TOKENIZER = byte_tokenizer(begin=True)
# The answers are the words of one of two documents, in tokens; the prompt is cut off where the second window begins.
ROWS = [
    {"prompt": "the cat sat on", "completion": " the mat and the dog ran to the end of the long road" * 2},
    {"prompt": "the dog ran to the", "completion": " end"},
    {"prompt": "the end of the long road and the mat", "completion": " and the dog sat on the mat the dog" * 2},
]
CONTEXT = 12


def windows_by_hand():
    """Token ids and labels of the windows of ROWS: the BOS, then 11 tokens; windows without a label are left out."""
    rows = []
    for row in ROWS:
        prompt, whole = (
            TOKENIZER(text, add_special_tokens=False).input_ids
            for text in (row["prompt"], row["prompt"] + row["completion"])
        )
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        for start in range(0, len(whole) - 10, 11):
            ids = [0, *whole[start : start + 11]]
            window_labels = [-100, *labels[start : start + 11]]
            if any(label != -100 for label in window_labels):
                rows.append((ids, window_labels))
    return [torch.tensor(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.usefixtures("small_blocks")
def test_the_ledger_is_that_of_autograd_with_masked_labels(name, batch):
    model, (ids, labels) = tiny(name, vocab_size=len(TOKENIZER)), windows_by_hand()
    assert len(ids) >= 3
    assert 0 < (labels != -100).sum() < labels.numel() - len(labels)
    ours = posterity.measure(model, TOKENIZER, ROWS, context=CONTEXT, lags="all", batch=batch, progress=False)
    with spy_on(model) as spy:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
        ).view(len(ids), -1)
        losses.sum().backward()
    counts = (labels[:, 1:] != -100).sum(1)
    np.testing.assert_array_equal(ours.tokens, counts)
    close(ours.loss, losses.detach().sum(1) / counts)
    dense = spy.accounts()
    close(ours.credit.sum("reader_of"), np.stack([by_lag(x[0]).sum(1).movedim(0, 1) for x in dense]))
    close(ours.mass.sum("reader_of"), np.stack([by_lag(x[1]).sum(1).movedim(0, 1) for x in dense]))
    # all keys and values have their readers, those of prompts too
    close(ours.attention.sum("reader_of"), np.stack([by_lag(x[2]).sum(0) for x in dense]))
    for call, layer in zip(spy.calls, range(len(dense)), strict=True):
        for tensor, stream in zip(call[:3], ours.stream.values, strict=True):
            squared = tensor.grad.square().sum((1, 2, 3))
            close(ours.credit_by_document.sel(layer=layer, stream=stream).sum(("head", "reader_of", "side")), squared)
    assert ours.attrs["loss_on"] == "the answers only"


def test_who_pays_is_that_of_one_backward_pass_for_each_answer():
    model, (ids, labels) = exact("llama", vocab_size=len(TOKENIZER)), windows_by_hand()
    ours = posterity.measure(model, TOKENIZER, ROWS, context=CONTEXT, losses=True, progress=False)
    layers = by_position(model, ids, labels=labels)
    for layer, (_, *written, hidden) in enumerate(layers):
        for stream, grads in zip(("key", "value"), written, strict=True):
            head, own = grads.sum(0), own_of(grads)
            whole = head.unflatten(1, (-1, 2)).sum(2).repeat_interleave(2, 1)
            actual = ours.loss_credit.sel(written=stream).isel(layer=layer)
            close(actual.sel(part="own"), (own * whole).sum(-1).sum(0))
            close(actual.sel(part=["self later", "future"]).sum("part"), ((head - own) * whole).sum(-1).sum(0))
        own = own_of(hidden)
        close(ours.hidden.isel(layer=layer).sel(loss_term="own"), own.square().sum(-1).sum(0))


def test_weights_and_parameters_are_those_of_the_masked_loss():
    model, (ids, labels) = tiny("gpt2", vocab_size=len(TOKENIZER)), windows_by_hand()
    ours = posterity.measure(model, TOKENIZER, ROWS, context=CONTEXT, parameters=True, progress=False)
    for document, (row, row_labels) in enumerate(zip(ids, labels, strict=True)):
        model.zero_grad()
        position_losses(model, row[None], labels=row_labels[None]).sum().backward()
        terms = ours.parameter_by_document.isel(document=document)
        whole = terms.sel(loss_term="own") + terms.sel(loss_term="later") + 2 * terms.sel(loss_term="inner")
        for name in ("transformer.h.1.attn.c_attn", "transformer.h.0.mlp.c_fc", "transformer.ln_f"):
            expected = sum(p.grad.square().sum().item() for p in model.get_submodule(name).parameters(recurse=False))
            assert whole.sel(parameter=name).item() == pytest.approx(expected, rel=1e-9)
        terms = ours.weight_by_document.isel(document=document).sel(stream="value")
        whole = terms.sel(term="self") + terms.sel(term="other") + 2 * terms.sel(term="inner")
        for layer in range(3):
            module = model.transformer.h[layer].attn.c_attn
            expected = module.weight.grad[:, 48:].square().sum() + module.bias.grad[48:].square().sum()
            assert whole.isel(layer=layer).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_table_says_that_the_loss_is_on_answers_and_a_mixture_says_so(capsys):
    model = tiny("llama", num_hidden_layers=1, vocab_size=len(TOKENIZER))
    result = posterity.measure(model, TOKENIZER, ROWS, context=CONTEXT, lags="self", progress=False)
    posterity.summary(result)
    losses = f"loss on the answers only ({int(result.tokens.sum()):,} losses)"
    assert losses in " ".join(capsys.readouterr().out.split())
    rows = [{"text": WORDS}], [WORDS]
    first, second = (
        posterity.measure(model, TOKENIZER, row, context=CONTEXT, lags="self", progress=False) for row in rows
    )
    assert first.attrs["text_digest"] == second.attrs["text_digest"]
    result = posterity.measure(model, TOKENIZER, [*ROWS, WORDS], context=CONTEXT, lags="self", progress=False)
    assert result.attrs["loss_on"] == "the answers only, in conversations; every token of the other texts"
    assert int(result.tokens[-1]) == CONTEXT - 1
    assert "loss_on" not in posterity.measure(model, TOKENIZER, [WORDS], context=CONTEXT, progress=False).attrs
