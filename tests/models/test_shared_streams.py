"""Layers that read the keys and values of an earlier layer: their terms belong to the one key that there is."""

from collections import UserDict

import pytest
import torch
from support.families import build
from support.verification import double, nll

import posterity
from posterity import InputError
from posterity.models.shared_streams import SharingCalls, StreamOwners

TYPES = ("gemma3n_text", "gemma4_text")  # two layers that make keys, two that borrow them
IDS = torch.arange(3, 23)[None]


@pytest.fixture(params=TYPES)
def model(request):
    with double():
        yield build(request.param, torch.float64)


def autograd_gradients(model, ids):
    """Gradients at the keys that the two first layers make, and at W_K, of all losses."""
    keys, before = {}, UserDict.__setitem__

    def keep(shared, name, streams):
        streams[0].retain_grad()
        keys[name] = streams[0]
        before(shared, name, streams)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UserDict, "__setitem__", keep)
        model.requires_grad_()
        nll(model(input_ids=ids, use_cache=False).logits, ids).sum().backward()
    weights = [layer.self_attn.k_proj.weight.grad for layer in model.model.layers[:2]]
    model.zero_grad()
    return {name: key.grad for name, key in keys.items()}, weights


def squares(terms):
    own, other, inner = torch.tensor(terms.transpose("term", ...).values)
    return own + other + 2 * inner


def test_credit_of_all_readers_of_a_key_adds_up_to_its_gradient(model):
    keys, _ = autograd_gradients(model, IDS)
    result = posterity.measure(model, None, IDS, context=20, losses=True, horizons=(1, 4), progress=False)
    kinds = model.config.layer_types
    for kind, grad in keys.items():
        readers = [number for number, other in enumerate(kinds) if other == kind]
        key = result.sel(stream="key", written="key", layer=readers)
        whole = grad.square().sum().item()
        assert float(key.credit.sum()) == pytest.approx(whole, rel=1e-10)
        assert float(key.loss_credit.sum()) == pytest.approx(whole, rel=1e-10)
        by_position = key.credit_by_position.sum(("layer", "head", "side"))
        torch.testing.assert_close(torch.tensor(by_position.values), grad.square().sum((0, 1, 3)), rtol=1e-10, atol=0)


def test_weights_of_a_shared_key_get_the_gradient_of_all_its_readers(model):
    _, weights = autograd_gradients(model, IDS)
    result = posterity.measure(model, None, IDS, context=20, parameters=True, progress=False)
    key = squares(result.weight_by_document.sel(stream="key", document=0))
    by_module = result.parameter_by_document.sel(document=0).rename(loss_term="term")
    for layer, grad in enumerate(weights):
        whole = grad.square().sum().item()
        assert float(key[layer]) == pytest.approx(whole, rel=1e-10)
        module = by_module.sel(parameter=f"model.layers.{layer}.self_attn.k_proj").expand_dims("layer")
        assert float(squares(module)[0]) == pytest.approx(whole, rel=1e-10)
    assert key[2:].isnan().all()  # these layers have no W_K
    pooled = posterity.stats.weight_shares(result).share.sel(stream="key")
    terms = result.weight_by_document.sel(stream="key", document=0, layer=[0, 1])
    own = (terms.sel(term="self") + terms.sel(term="inner")).sum()
    assert float(pooled) == pytest.approx(float(own / key[:2].sum().item()))


def test_the_table_says_which_layers_borrow(model, capsys):
    posterity.summary(posterity.measure(model, None, IDS, context=20, progress=False))
    words = " ".join(capsys.readouterr().out.split())
    assert "No weights of their own: W_K in 2, W_V in 2 of 4 layers, which borrow from an earlier one." in words


def test_self_edges_of_readers_are_self_edges_of_the_weights(model):
    """With self edges alone, in all layers, nothing comes over other edges."""
    ids = IDS[:, :20]
    cut = posterity.account(model)
    with cut as ledger, posterity.horizon(model, posterity.Myopic()):
        nll(model(input_ids=ids, use_cache=False).logits, ids).sum().backward()
    terms = ledger.result().weight_by_document.sel(document=0, stream=["key", "value"], layer=[0, 1])
    assert float(terms.sel(term="self").min()) > 0
    assert float(terms.sel(term="other").max()) < 1e-20 * float(terms.sel(term="self").max())


def test_a_copy_of_a_shared_key_is_the_same_key(model, monkeypatch):
    """A model spread over devices hands copies on."""
    plain = posterity.measure(model, None, IDS, context=20, progress=False)
    read = UserDict.__getitem__
    monkeypatch.setattr(UserDict, "__getitem__", lambda shared, name: tuple(x.clone() for x in read(shared, name)))
    copied = posterity.measure(model, None, IDS, context=20, progress=False)
    torch.testing.assert_close(torch.tensor(copied.credit.values), torch.tensor(plain.credit.values))
    torch.testing.assert_close(*(torch.tensor(x.weight_mean.values) for x in (copied, plain)), equal_nan=True)


def test_matrices_of_single_losses_add_up_to_the_credit_of_their_layer(model):
    result = posterity.inspect(model, None, IDS[0], progress=False)
    total = result.credit_by_position.sel(stream=["key", "value"]).sum(("head", "side"))
    matrices = result.inspect_credit.sum("loss_position").transpose("layer", "written", "position")
    torch.testing.assert_close(torch.tensor(matrices.values), torch.tensor(total.values), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_ledger_over_a_training_of_several_passes_counts_readers_of_every_pass(model, checkpointing):
    ids = torch.arange(3, 43).view(2, 20)
    alone = posterity.measure(model, None, ids, context=20, progress=False)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with posterity.account(model) as ledger:
        for row in ids:
            nll(model(input_ids=row[None], use_cache=False).logits, row[None]).sum().backward()
    result = ledger.result()
    for name in ("credit", "weight_by_document"):
        torch.testing.assert_close(*(torch.tensor(x[name].values) for x in (result, alone)), equal_nan=True)


def test_a_call_that_mixes_keys_of_two_layers_is_refused():
    owners, tensors = StreamOwners(), [torch.ones(1, requires_grad=True) * 2 for _ in range(6)]
    for call in (0, 1):
        assert owners.register(call, tensors[3 * call : 3 * call + 3], lambda call=call: SharingCalls(call)) is None
    with pytest.raises(InputError, match="2 reads queries, keys or values of 0 and 1"):
        owners.register(2, [torch.ones(1, requires_grad=True), tensors[1], tensors[5]], lambda: SharingCalls(2))
