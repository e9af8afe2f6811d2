"""Losses and gradients by chunks of positions are those of all logits at once, whatever is done behind the head."""

import pytest
import torch
from support.families import IMPOSSIBLE, TYPES, build
from support.loss_oracles import by_position, close, exact, own_of, remaining
from support.tiny import CONFIGS, summed_loss, tiny, tokens
from support.verification import double
from torch.utils._python_dispatch import TorchDispatchMode

import posterity
from posterity import check
from posterity.models import chunked_loss
from posterity.models.chunked_loss import ChunkedLoss, LMHead, token_losses
from posterity.models.language_model import freeze_parameters

# A soft-cap, scales, a transform or a projection before the head, a bias; a head inside another module; tied weights.
BEHIND = ["gemma2", "cohere", "granite", "minicpm3", "opt", "bert", "roberta", "electra", "xglm", "phi", "glm4", "mpt"]


@pytest.fixture
def chunk_of(monkeypatch):
    """Sets how many positions of two windows make a chunk."""
    return lambda positions, vocabulary: monkeypatch.setattr(chunked_loss, "CHUNK", 2 * positions * vocabulary + 1)


def by_chunks(model, ids, parameters=False, targets=None):
    """Losses, the gradient at the embeddings, and the gradients of all parameters, from two backward passes."""
    embeddings = []
    with freeze_parameters(model, parameters):
        head = LMHead.probe(model)
        hook = model.get_input_embeddings().register_forward_hook(lambda *call: embeddings.append(call[-1]))
        loss = ChunkedLoss.run(model, ids, head, targets)
        hook.remove()
        embeddings[0].retain_grad()
        loss.backward(retain_graph=True)
        grad = embeddings[0].grad.clone()
        grads = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
        embeddings[0].grad = None
        loss.backward()
    torch.testing.assert_close(embeddings[0].grad, grad, rtol=0, atol=0)
    return head.separable, loss.losses, grad, grads


def at_once(model, ids):
    """The same by the model's own forward pass and autograd, window by window."""
    losses, grads = [], []
    model.zero_grad()
    for row in ids:
        embeddings = []
        hook = model.get_input_embeddings().register_forward_hook(lambda *call: embeddings.append(call[-1]))  # noqa: B023
        summed = summed_loss(model, row[None])
        hook.remove()
        embeddings[0].retain_grad()
        summed.backward()
        losses.append(summed.detach())
        grads.append(embeddings[0].grad[0])
    return torch.stack(losses), torch.stack(grads), {n: x.grad for n, x in model.named_parameters()}


def assert_equal(model, ids, separable=True):
    is_separable, losses, grads, _ = by_chunks(model, ids)
    assert is_separable == separable
    right_losses, right_grads, _ = at_once(model, ids)
    close(losses, right_losses, 1e-12)
    close(grads, right_grads, 1e-12)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("positions", [1, 5, 12, 100])
def test_losses_by_chunks_are_those_of_all_logits_at_once(name, positions, chunk_of):
    chunk_of(positions, 61)
    assert_equal(tiny(name), tokens(2))
    assert_equal(tiny(name), tokens(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [*BEHIND, *(pytest.param(name, marks=pytest.mark.slow) for name in TYPES if name not in {*BEHIND, *IMPOSSIBLE})],
)
def test_whatever_is_behind_the_head_is_done_for_each_chunk(name, chunk_of):
    model, ids = build(name, torch.float64), tokens(2)
    if not check(model).ok:
        pytest.skip("cannot be measured")
    if name == "ctrl":
        pytest.skip("writes into its own embeddings")
    chunk_of(5, 97)
    with double():  # many types compute norms and softmax in float32, whatever their weights are
        assert_equal(model, ids)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_heads_own_parameters_get_their_gradient_once(name, chunk_of):
    chunk_of(3, 61)
    model, ids = tiny(name), tokens(2)
    *_, grads = by_chunks(model, ids, parameters=True)
    *_, right = at_once(model, ids)
    assert grads.keys() == right.keys()
    for parameter, grad in grads.items():
        close(grad, right[parameter], 1e-10)


@pytest.mark.parametrize(("counted", "chunks"), [([], 0), ([7], 1), ([3, 4, 11], 2), ([0, 11], 2), ([4, 9], 2)])
def test_logits_are_computed_where_a_target_counts_and_nowhere_else(counted, chunks, chunk_of, monkeypatch):
    chunk_of(5, 61)
    model, ids = tiny("llama"), tokens(2)
    targets, calls, logits = torch.full_like(ids, -100), [], LMHead.logits
    targets[1, counted] = ids[0, counted]
    monkeypatch.setattr(LMHead, "logits", lambda *args: calls.append(args[2]) or logits(*args))
    _, losses, grad, _ = by_chunks(model, ids, targets=targets)
    assert sum(of is ids for of in calls) == chunks  # others are the probe's
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    right = token_losses(model(inputs_embeds=embeddings).logits, targets).sum(1)
    right.sum().backward()
    close(losses, right.detach(), 1e-12)
    close(grad, embeddings.grad, 1e-12)


def past_the_head(model, hidden, logits):
    return logits + 0.05 * hidden[:, : logits.shape[1]].sum(-1, keepdim=True)


def called_twice(model, hidden, logits):
    return logits + model.lm_head(hidden[:, : logits.shape[1]].flip(-1))


def between_positions(model, hidden, logits):
    return logits - 0.5 * logits.cumsum(1) / torch.arange(1, logits.shape[1] + 1)[:, None]


def not_a_call(model, hidden, logits):
    return hidden @ model.lm_head.weight.T


def replaced(model, behind, call_head=True):
    """The model with something else behind its body."""
    plain_forward = model.forward

    def forward(*args, **kwargs):
        hidden = []
        hook = model.model.register_forward_hook(lambda *call: hidden.append(call[-1].last_hidden_state))
        if call_head:
            output = plain_forward(*args, **kwargs)
        else:
            output = model.model(*args, **kwargs)
            output.logits = None
        hook.remove()
        output.logits = behind(model, hidden[0], output.logits)
        return output

    model.forward = forward
    return model


@pytest.mark.parametrize("behind", [past_the_head, called_twice, between_positions, not_a_call])
def test_a_model_that_cannot_be_chunked_is_measured_with_all_logits_at_once(behind, chunk_of):
    chunk_of(3, 61)
    model, ids = replaced(exact("llama"), behind, behind is not not_a_call), tokens(2)
    assert_equal(model, ids, separable=False)


@pytest.mark.parametrize("behind", [past_the_head, not_a_call])
def test_who_pays_is_right_for_a_model_that_cannot_be_chunked(behind):
    model, ids = replaced(exact("llama"), behind, behind is not not_a_call), tokens(1)
    result = posterity.measure(model, None, ids, context=12, losses=True, horizons=(2,), progress=False)
    for layer, (_, key, value, _) in enumerate(by_position(model, ids)):
        for stream, grads in (("key", key), ("value", value)):
            own, head = own_of(grads), grads.sum(0)
            total = head.unflatten(1, (-1, 2)).sum(2).repeat_interleave(2, 1)
            credit = result.isel(layer=layer).sel(written=stream)
            close(credit.loss_credit.sel(part="own"), (own * total).sum(-1).sum(0))
            left = result.horizon_by_document.sum("reader_of").isel(layer=layer).sel(stream=stream, horizon=2)
            close(left, (remaining(grads, 0.5) * total).sum((-1, -2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_token_loss_is_the_negative_log_likelihood_in_the_working_precision(dtype):
    logits, targets = torch.randn(2, 5, 7).to(dtype), torch.randint(7, (2, 5))
    targets[0, 3] = -100
    losses = token_losses(logits, targets)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = -logits.to(losses.dtype).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected[0, 3] = 0
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(token_losses(logits[1, 2:], targets[1, 2:]), losses[1, 2:], rtol=0, atol=0)


class Widest(TorchDispatchMode):
    """Counts the most positions for which numbers as wide as the vocabulary are made at once."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.positions = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for x in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == self.vocabulary:
                self.positions = max(self.positions, x.numel() // self.vocabulary)
        return output


@pytest.mark.parametrize("options", [{}, {"losses": True, "horizons": (1, 4)}])
def test_logits_of_all_positions_are_never_held(options, chunk_of):
    model, ids = tiny("gemma2", vocab_size=211), tokens(2, 64)
    with Widest(211) as all_logits:
        summed_loss(model, ids)
    assert all_logits.positions >= 2 * 63  # what the guard would see
    chunk_of(6, 211)
    with Widest(211) as chunks:
        posterity.measure(model, None, ids, context=64, batch=2, weights=False, progress=False, **options)
    assert chunks.positions <= 3 * 16  # of the probes of the operator, not the 128 of the windows


def test_chunks_are_deterministic_and_leave_the_model_as_it_was(chunk_of):
    chunk_of(3, 61)
    model, ids = tiny("llama"), tokens(2)
    before = [(dict(vars(module)), len(module._forward_hooks)) for module in model.modules()]
    first, second = (posterity.measure(model, None, ids, context=12, losses=True, progress=False) for _ in range(2))
    for variable in first.data_vars:
        assert first[variable].equals(second[variable])
    for module, (held, hooks) in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == held.keys()
        assert len(module._forward_hooks) == hooks
