"""Who pays: every part equals what one backward pass per loss position gives, over plain tensor operations."""

import math

import numpy as np
import pytest
import torch
from support.batches import INPUTS
from support.loss_oracles import by_position, close, dense, exact, own_of, position_losses, remaining
from support.spy import spy_on
from support.tiny import CONFIGS, summed_loss, tiny, tokens
from transformers import AttentionInterface

import posterity
from posterity import Discount, EdgeWindow, Full, InputError, Myopic
from posterity.decomposition.reader_lags import lags_within
from posterity.inputs import model as loading
from posterity.inputs.documents import default_text
from posterity.inputs.windows import cut_windows
from posterity.models.attach import observe_model
from posterity.models.interception import interceptions
from posterity.reporting.result_table import summary_rows
from posterity.results import stats


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("small_blocks")
def test_the_three_parts_are_those_of_one_backward_pass_per_position(name):
    model, ids = exact(name), tokens(2)
    result = posterity.measure(model, None, ids, context=12, losses=True, horizons=(1, 2, 5), progress=False)
    plain = posterity.measure(model, None, ids, context=12, progress=False)
    for variable in plain.data_vars:  # asking who pays changes nothing else
        close(result[variable], plain[variable])
    layers = by_position(model, ids)
    assert len(layers) == result.sizes["layer"]
    share = 2 if name not in ("gpt_neox", "gpt2", "deepseek_v3") else 1
    for layer, (query, *written, hidden) in enumerate(layers):
        for stream, grads in zip(("key", "value"), written, strict=True):
            head, own = grads.sum(0), own_of(grads)
            whole = head.unflatten(1, (-1, share)).sum(2).repeat_interleave(share, 1)
            actual = result.isel(layer=layer).sel(written=stream)
            close(actual.loss_credit.sel(part="own"), (own * whole).sum(-1).sum(0))
            later = actual.loss_credit.sel(part=["self later", "future"]).sum("part")
            close(later, ((head - own) * whole).sum(-1).sum(0))
            sides = result.credit_by_position.isel(layer=layer).sel(stream=stream)
            close(actual.loss_credit.sel(part="future"), sides.sel(side="other"))
            close(actual.loss_gram.sel(pair="own"), own.square().sum(-1).sum(0))
            both = actual.loss_gram.sel(pair=["self later", "future", "self later . future", "self later . future"])
            close(both.sum("pair"), (head - own).square().sum(-1).sum(0))
            cross = actual.loss_gram.sel(pair=["own . self later", "own . future"]).sum("pair")
            close(cross, (own * (head - own)).sum(-1).sum(0))
            for h in (1, 2, 5):
                discounted = remaining(grads, 1 - 1 / h)
                mine_h = result.horizon_by_document.sum("reader_of").isel(layer=layer).sel(stream=stream, horizon=h)
                close(mine_h, (discounted * whole).sum((-1, -2)))
                first = result.horizon_by_document.sel(reader_of="first").isel(layer=layer)
                close(first.sel(stream=stream, horizon=h), (discounted * whole)[..., :4, :].sum((-1, -2)))
            parts = result.loss_credit_by_document.isel(layer=layer).sel(written=stream, part="own", reader_of="rest")
            close(parts, (own * whole)[..., 4:, :].sum((-1, -2)))
        for h in (1, 2, 5):
            mine_h = result.horizon_by_document.sum("reader_of").isel(layer=layer).sel(stream="query", horizon=h)
            close(mine_h, (remaining(query, 1 - 1 / h) * query.sum(0)).sum((-1, -2)))
        own, later = own_of(hidden), hidden.sum(0) - own_of(hidden)
        actual = result.hidden.isel(layer=layer)
        for term, expected in (("own", own * own), ("later", later * later), ("inner", own * later)):
            close(actual.sel(loss_term=term), expected.sum(-1).sum(0))
    np.testing.assert_allclose(stats.loss_shares(result, ("layer", "head")).share.sum("part"), 1, rtol=1e-9)
    # nothing after the last attention layer moves information between positions
    last = result.loss_gram.isel(layer=-1).sel(pair="self later")
    assert float(last.max()) <= 1e-20 * float(result.loss_gram.isel(layer=-1).max())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.usefixtures("small_blocks")
def test_a_discount_is_the_discounted_sum_over_losses(name, inputs, rate):
    model, ids = exact(name), tokens(2)
    model_inputs = INPUTS[inputs](ids)
    layers = by_position(model, ids, **dict(model_inputs))
    seen, hidden = {}, []
    with observe_model(model, lambda layer, back, project: seen.update({layer: back})) as watch:
        holders = [model.get_submodule(layer.name.rpartition(".")[0]) for layer in watch.layers]
        hooks = [
            holder.register_forward_pre_hook(
                lambda _, args, kwargs: hidden.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
            for holder in holders
        ]
        with posterity.horizon(model, Discount(rate)):
            loss = position_losses(model, ids, **dict(model_inputs)).sum()
            grads = torch.autograd.grad(loss, hidden)
        for hook in hooks:
            hook.remove()
        backs = [seen[layer] for layer in watch.layers]
    for back, grad, (query, key, value, state) in zip(backs, grads, layers, strict=True):
        actual = (back.grad_query, back.grad_key, back.grad_value)
        for x, expected in zip(actual, (query, key, value), strict=True):
            close(x, remaining(expected, rate))
        close(grad, remaining(state, rate))


def parameter_gradients(model):
    result = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return result


def cut_gradients(model, ids, rule, **settings):
    model.zero_grad()
    with posterity.horizon(model, rule, **settings):
        loss = summed_loss(model, ids)
        loss.backward()
    return loss.detach(), parameter_gradients(model)


@pytest.mark.parametrize("rule", [Myopic(), Discount(0.6), EdgeWindow(3)])
@pytest.mark.parametrize("streams", [("key", "value"), ("key",), ("value",)])
@pytest.mark.parametrize("layers", [None, [1], [0, -1]])
@pytest.mark.parametrize("cut", ["kv", "hidden"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3", "gpt2"])
@pytest.mark.usefixtures("small_blocks")
def test_a_horizon_is_dense_autograd_with_a_factor_on_every_edge(name, cut, rule, streams, layers):
    model, ids = tiny(name), tokens(2)
    if layers and name == "deepseek_v3":
        layers = [layer for layer in layers if layer < 1] or [0]
    loss, actual = cut_gradients(model, ids, rule, cut=cut, streams=streams, layers=layers)
    count = model.config.num_hidden_layers
    cut_layers = range(count) if layers is None else [layer % count for layer in layers]
    with dense(model) as spy:
        own_attend, calls = spy.attend, 0
        spy.hidden = cut == "hidden"

        def attend(*args, **kwargs):
            nonlocal calls
            if spy.captured is not None:
                return own_attend(*args, **kwargs)
            factors = tuple(rule.factor if stream in streams else None for stream in ("key", "value"))
            spy.factor = factors if calls in cut_layers else (None, None)
            calls += 1
            return own_attend(*args, **kwargs)

        AttentionInterface.register("dense", attend)
        right_loss = summed_loss(model, ids)
        right_loss.backward()
    expected = parameter_gradients(model)
    torch.testing.assert_close(loss, right_loss.detach(), rtol=1e-6, atol=0)
    largest = max(x.abs().max() for x in expected.values())
    assert actual.keys() == expected.keys()
    for parameter, grad in expected.items():
        torch.testing.assert_close(actual[parameter], grad, rtol=1e-4, atol=1e-6 * largest.item(), msg=parameter)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "phi3"])
@pytest.mark.parametrize("rule", [Myopic(), Discount(0.6), EdgeWindow(2)])
@pytest.mark.usefixtures("small_blocks")
def test_a_cut_at_the_hidden_state_leaves_the_projections_all_terms(name, rule):
    """One layer: the projections' gradients are the full ones; what lies before has those of the cut at k and v."""
    model, ids = tiny(name, num_hidden_layers=1, n_layer=1), tokens(2)
    summed_loss(model, ids).backward()
    full = parameter_gradients(model)
    _, kv = cut_gradients(model, ids, rule)
    _, hidden = cut_gradients(model, ids, rule, cut="hidden")
    projections = [
        n for n in full if any(part in n for part in ("qkv", "_proj", "c_attn", "query_key_value")) and "mlp" not in n
    ]
    embedding = next(n for n in full if "emb" in n or "wte" in n)
    assert len(projections) >= 2
    largest = max(x.abs().max() for x in full.values()).item()
    for parameter in full:
        if parameter in projections or "mlp" in parameter or "post" in parameter:
            torch.testing.assert_close(hidden[parameter], full[parameter], rtol=1e-5, atol=1e-7 * largest)
    torch.testing.assert_close(hidden[embedding], kv[embedding], rtol=1e-5, atol=1e-7 * largest)
    assert not torch.allclose(full[embedding], hidden[embedding], rtol=1e-2, atol=1e-4 * largest)
    assert not all(torch.allclose(full[p], kv[p], rtol=1e-2, atol=1e-4 * largest) for p in projections)


@pytest.mark.usefixtures("small_blocks")
def test_a_cut_at_the_hidden_state_with_one_stream_cuts_only_that_one():
    model, ids = tiny("llama", num_hidden_layers=1), tokens(2)
    _, key = cut_gradients(model, ids, Myopic(), cut="hidden", streams=["key"])
    _, same = cut_gradients(model, ids, Myopic(), cut="kv", streams=["key"])
    torch.testing.assert_close(
        key["model.embed_tokens.weight"], same["model.embed_tokens.weight"], rtol=1e-5, atol=1e-9
    )


def test_rate_0_is_myopic_and_rate_1_is_full_to_the_bit():
    model, ids = tiny("llama", dtype=torch.float32), tokens(2, 40)
    summed_loss(model, ids).backward()
    plain = parameter_gradients(model)
    with posterity.horizon(model, Full()):
        summed_loss(model, ids).backward()
    full = parameter_gradients(model)
    for cut in ("kv", "hidden"):
        one, zero, window, myopic = (
            cut_gradients(model, ids, rule, cut=cut) for rule in (Discount(1.0), Discount(0.0), EdgeWindow(0), Myopic())
        )
        assert one[0] == zero[0] == myopic[0]
        for name in plain:
            assert torch.equal(one[1][name], full[name]), name
            assert torch.equal(zero[1][name], myopic[1][name])
            assert torch.equal(window[1][name], myopic[1][name])
    assert all(torch.allclose(full[name], plain[name], rtol=1e-3, atol=1e-3) for name in plain)


def test_beyond_an_edge_window_gradients_are_exactly_zero():
    query, key, value = (torch.randn(1, 2, 700, 8, dtype=torch.double, requires_grad=True) for _ in range(3))
    output = posterity.attention(query, key, value, horizon=lambda: (EdgeWindow(5), EdgeWindow(9)))
    grad = torch.zeros_like(output)
    grad[:, :, 650:] = 1
    result = torch.autograd.grad(output, (key, value), grad)
    assert (result[0][:, :, :645] == 0).all()
    assert (result[1][:, :, :641] == 0).all()
    assert (result[1][:, :, 641] != 0).all()


@pytest.mark.parametrize("rate", [0.5, 0.99])
def test_a_discount_over_a_long_context_neither_overflows_nor_underflows(rate):
    """Against the recursion over positions in float64: the discounted sums of values' terms."""
    length = 8192
    query, key, value = (torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3))
    output = posterity.attention(query, key, value, horizon=lambda: (Discount(rate), Discount(rate)))
    grad = torch.randn_like(output)
    output.backward(grad)
    for x in (query, key, value):
        assert x.grad.isfinite().all()
    reach = min(length, math.ceil(math.log(1e-12) / math.log(rate)))
    for j in (0, 1, 4000, length - 2, length - 1):  # beyond `reach` a factor is below 1e-12
        rows = slice(j, min(length, j + reach))
        score = (query[0, 0, rows].detach().double() @ key[0, 0].detach().double().T) / 2
        late = torch.arange(length)[None] > torch.arange(rows.start, rows.stop)[:, None]
        weight = torch.softmax(score.masked_fill(late, -torch.inf), -1)[:, j]
        factor = rate ** torch.arange(rows.stop - rows.start, dtype=torch.double)
        expected = (weight * factor) @ grad[0, 0, rows].double()
        torch.testing.assert_close(
            value.grad[0, 0, j].double(), expected, rtol=1e-4, atol=1e-6 * grad.abs().max().item()
        )


def test_a_far_horizon_leaves_the_credit_of_first_keys_and_of_the_rest():
    result = posterity.measure(tiny("gpt2"), None, tokens(2), context=12, horizons=(10**9,), progress=False)
    remaining = result.horizon_by_document.isel(horizon=0).transpose(..., "reader_of")
    credit = result.credit_by_document.sum("side").transpose(..., "reader_of")
    np.testing.assert_allclose(remaining, credit, rtol=1e-6, atol=1e-9 * float(credit.max()))


def test_an_account_inside_a_horizon_counts_what_the_horizon_lets_through():
    model, ids = tiny("llama"), tokens(1)
    with posterity.horizon(model, EdgeWindow(3)), posterity.account(model, lags="all") as ledger:
        summed_loss(model, ids).backward()
    result = ledger.result()
    assert (result.credit.sel(stream=["key", "value"]).sel(lag=slice(4, None)) == 0).all()
    assert (result.mass.sel(stream=["key", "value"]).sel(lag=slice(4, None)) == 0).all()
    assert (result.credit.sel(stream="query").sel(lag=slice(4, None)) != 0).any()
    assert float(stats.balance(result).max()) < 1e-10
    with posterity.account(model, lags="all") as outer, posterity.horizon(model, Myopic(), cut="hidden"):
        summed_loss(model, ids).backward()
    assert (outer.result().credit.sel(stream="key", lag=4) != 0).any()  # W_K learns from all of it
    assert float(stats.balance(outer.result()).max()) < 1e-10


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_parameters_split_into_what_the_own_and_what_later_losses_ask_for(name):
    model, ids = tiny(name), tokens(2)
    result = posterity.measure(model, None, ids, context=12, parameters=True, progress=False)
    assert all(p.grad is None for p in model.parameters())
    names = list(result.parameter.values)
    for document, row in enumerate(ids):
        model.zero_grad()
        summed_loss(model, row[None]).backward()
        whole = parameter_gradients(model)
        _, own = cut_gradients(model, row[None], Myopic())
        for index, module in enumerate(names):
            terms = result.parameter_by_document[document, index].values
            actual = dict(zip(result.loss_term.values, terms, strict=True))
            expected = {"own": 0.0, "later": 0.0, "inner": 0.0}
            for parameter, grad in whole.items():
                if parameter.rpartition(".")[0] == module:
                    later = grad - own[parameter]
                    expected["own"] += own[parameter].square().sum().item()
                    expected["later"] += later.square().sum().item()
                    expected["inner"] += (own[parameter] * later).sum().item()
            assert actual == pytest.approx(
                expected, rel=1e-5, abs=1e-7 * sum(x.square().sum().item() for x in whole.values())
            )


def test_a_horizon_leaves_the_forward_pass_and_the_model_alone():
    model, ids = tiny("llama"), tokens(2)
    with posterity.horizon(model, Full()):
        expected = summed_loss(model, ids)
        expected.backward()
    for cut in ("kv", "hidden"):
        with posterity.horizon(model, Discount(0.5), cut=cut):
            loss = summed_loss(model, ids)
            loss.backward()
        assert torch.equal(loss, expected)
    assert model.config._attn_implementation == "eager"
    assert not any(interceptions.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cut", ["kv", "hidden"])
def test_a_horizon_under_gradient_checkpointing_is_the_same(reentrant, cut):
    model, ids = tiny("llama"), tokens(2)
    _, expected = cut_gradients(model, ids, Discount(0.5), cut=cut)
    model.train().activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, actual = cut_gradients(model, ids, Discount(0.5), cut=cut)
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-6, atol=1e-9)


def test_bad_horizons_are_refused_in_one_line():
    model, ids = tiny("llama"), tokens(1)
    for rate in (-0.1, 1.1, float("nan"), "half", True):
        with pytest.raises(InputError, match="Discount expects a rate from 0 to 1"):
            Discount(rate)
    for lags in (-1, 0.5, None):
        with pytest.raises(InputError, match="EdgeWindow expects a whole number"):
            EdgeWindow(lags)
    refused = {
        r'streams expects "key", "value" or both; got \(\'query\',\)': {"streams": ("query",)},
        'cut expects "kv" or "hidden"': {"cut": "head"},
        "layers expects numbers from 0 to 2, or from the end with -1; got 3": {"layers": [3]},
        "layers expects at least one": {"layers": []},
    }
    for message, settings in refused.items():
        with pytest.raises(InputError, match=message), posterity.horizon(model, Myopic(), **settings):
            pass
    with pytest.raises(InputError, match="expected a horizon such as Myopic"), posterity.horizon(model, 0.9):
        pass
    with posterity.horizon(model, Myopic()):
        with pytest.raises(InputError, match="contradicts the one around it"), posterity.horizon(model, Discount(0.5)):
            pass
        with posterity.horizon(model, Myopic(), layers=[1]):
            summed_loss(model, ids).backward()
    with posterity.horizon(model, Myopic(), streams="key"), posterity.horizon(model, Discount(0.5), streams="value"):
        summed_loss(model, ids).backward()
    with (
        pytest.raises(InputError, match="no forward pass with gradients"),
        posterity.horizon(model, Myopic()),
        torch.no_grad(),
    ):
        model(input_ids=ids)
    with posterity.horizon(model, Myopic()):
        late = summed_loss(model, ids)
    with pytest.raises(InputError, match="backward pass came after"):
        late.backward()
    for horizons in ((0, 1), (2, 1), (1.5,), (1, 1), (True,)):
        with pytest.raises(InputError, match="horizons expects whole numbers"):
            posterity.measure(model, None, ids, context=12, horizons=horizons, progress=False)
    with posterity.horizon(model, Myopic()):
        summed_loss(model, ids).backward()
        for options in ({"losses": True}, {"horizons": (1, 2)}):
            with pytest.raises(InputError, match="a question to the whole gradient"):
                posterity.measure(model, None, ids, context=12, progress=False, **options)
    with pytest.raises(InputError, match="one window at a time"):
        posterity.measure(model, None, ids, context=12, parameters=True, batch=2, progress=False)


def spoilt(x, passes):
    """Make the gradient at a tensor infinite in every backward pass but the first few."""
    seen = []

    def spoil(grad):
        seen.append(grad)
        return grad * torch.inf if len(seen) > passes else grad

    x.register_hook(spoil)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": True}, r"what the own losses send to layer model\.layers\.1\.self_attn"),
        ({"horizons": (4,)}, r"at horizon 4 the gradient of layer model\.layers\.1\.self_attn"),
    ],
)
def test_a_later_backward_pass_that_is_not_finite_is_named(options, message):
    model = tiny("llama")

    def spoil(module, args, output):
        if args[0].shape[1] == 12:  # not in the probe
            spoilt(output, passes=1)

    model.model.layers[1].mlp.register_forward_hook(spoil)
    with pytest.raises(InputError, match=rf"^{message} is not finite in window .*#0: check the model"):
        posterity.measure(model, None, tokens(), context=12, progress=False, **options)


def test_gradients_of_hidden_states_and_parameters_that_are_not_finite_are_named():
    model = tiny("llama")

    def spoil(module, args):
        if args[0].shape[1] == 12:
            spoilt(args[0], passes=1)

    hook = model.model.layers[0].register_forward_pre_hook(spoil)
    hidden = r"^the gradient of the hidden states of layer model\.layers\.0\.self_attn is not finite in window .*#0"
    with pytest.raises(InputError, match=hidden):
        posterity.measure(model, None, tokens(), context=12, losses=True, progress=False)
    hook.remove()
    spoilt(model.model.layers[1].mlp.down_proj.weight, passes=1)
    with pytest.raises(InputError, match=r"^the gradient of the parameters is not finite in window .*#0"):
        posterity.measure(model, None, tokens(), context=12, parameters=True, progress=False)


def test_a_single_loss_whose_gradient_is_not_finite_is_named():
    model = tiny("llama")

    def spoil(module, args, output):
        if args[0].shape[:2] == (4, 9):  # the rows of losses 4 to 7
            spoilt(output, passes=0)

    model.model.layers[1].mlp.register_forward_hook(spoil)
    with pytest.raises(InputError, match=r"^the gradient of single losses in layer .* is not finite"):
        posterity.inspect(model, None, tokens(1)[0], batch=4, progress=False)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_the_matrix_of_one_text_is_one_backward_pass_per_loss(name, batch):
    model, ids = exact(name), tokens(1)
    result = posterity.inspect(model, None, ids[0], batch=batch, horizons=(1, 4), progress=False)
    assert list(result.token.values) == [str(int(token)) for token in ids[0]]
    share = 1 if name == "gpt2" else 2
    for layer, (_, *written, _) in enumerate(by_position(model, ids)):
        for stream, grads in zip(("key", "value"), written, strict=True):
            shared = grads.unflatten(2, (-1, share)).sum(3)  # loss, batch, group, position, dim
            actual = result.isel(layer=layer).sel(written=stream)
            close(actual.inspect_credit, (shared * shared.sum(0)).sum((1, 2, 4)))
            close(actual.inspect_norm, shared.square().sum((1, 2, 4)).sqrt())
    # the sum over losses is the whole, its diagonal the own part, and nothing is paid before it is written
    whole = (
        result.credit_by_position.sel(stream=["key", "value"]).sum(("head", "side")).transpose("layer", "stream", ...)
    )
    close(result.inspect_credit.sum("loss_position"), whole)
    own = result.loss_credit.sel(part="own").sum("head")
    close(np.diagonal(result.inspect_credit, axis1=2, axis2=3), own)
    early = np.triu(np.ones((12, 12)), 1).astype(bool)
    assert (result.inspect_credit.values[..., early] == 0).all()
    assert (result.inspect_norm.values[..., early] == 0).all()


def lag_by_hand(carried, level):
    """The lag within which a part of what a key carries lies, given what it carries to each of its readers in turn."""
    total, running = carried.sum(), 0.0
    if total <= 1e-3 * np.abs(carried).sum():
        return np.nan
    for lag, part in enumerate(carried):
        running += part
        if running >= level * total:
            return lag
    return np.nan


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2", "deepseek_v3"])
@pytest.mark.usefixtures("small_blocks")
def test_the_lags_of_a_tokens_readers_are_those_of_the_dense_edges(name):
    model, ids = exact(name), tokens(1, 30)
    result = posterity.inspect(model, None, ids[0], progress=False)
    model.requires_grad_(True)
    with spy_on(model) as spy:
        summed_loss(model, ids).backward()
        layers = [
            np.stack([x.sum((0, 1)).detach().numpy() for x in (weight, credit[1], credit[2])])
            for credit, _, weight, *_ in spy.accounts()
        ]
    by_hand = [
        [[[lag_by_hand(edges[key:, key], level) for key in range(30)] for level in (0.5, 0.9)] for edges in quantities]
        for quantities in (*layers, sum(layers))
    ]
    np.testing.assert_array_equal(stats.reader_lags(result, ("layer",)), by_hand[:-1])
    np.testing.assert_array_equal(stats.reader_lags(result), by_hand[-1])
    assert np.isnan(result.reader_lag_all.sel(reader_quantity="value credit").values[:, -1]).all()  # it has no loss
    assert float(result.reader_lag.max()) > 9


def test_the_first_crossing_counts_and_cancelled_edges_have_no_lag():
    edges = torch.zeros(1, 6, 6)
    edges[0, :, 0] = torch.tensor([1.0, 4.0, 5.0, -8.0, 6.0, 2.0])  # their sum is 10
    edges[0, 1:, 1] = torch.tensor([1.0, -2.0, 1.0, 0.0, 0.0])
    edges[0, 2, 2] = 3.0
    lags = lags_within(edges, (0.5, 0.9))
    np.testing.assert_array_equal(lags[0, :, :3], [[1, np.nan, 0], [2, np.nan, 0]])


def test_results_without_the_lags_of_readers_are_read_and_say_so(tmp_path):
    result = posterity.inspect(tiny("llama"), None, tokens(1)[0], progress=False)
    old = result.drop_vars(["reader_lag", "reader_lag_all", "reader_quantity", "level"])
    old = posterity.load(posterity.save(old, tmp_path / "old.nc"))
    with pytest.raises(InputError, match=r"which was not measured: measure with posterity\.inspect"):
        stats.reader_lags(old)
    with pytest.raises(InputError, match=r"by expects \(\) or \('layer',\)"):
        stats.reader_lags(result, ("head",))


def test_an_inspected_text_is_saved_and_read(tmp_path):
    result = posterity.inspect(tiny("llama"), None, tokens(1)[0], progress=False)
    assert posterity.load(posterity.save(result, tmp_path / "one.nc")).identical(result)


def test_texts_that_cannot_be_inspected_are_refused_in_one_line():
    model = tiny("llama", max_position_embeddings=512)
    for ids in ([5], [5] * 257, []):
        with pytest.raises(InputError, match=f"a text of 2 to 256 tokens; got {len(ids)}"):
            posterity.inspect(model, None, ids, progress=False)
    with pytest.raises(InputError, match="expected a tokenizer"):
        posterity.inspect(model, None, "words", progress=False)
    with pytest.raises(InputError, match="batch of at least 1"):
        posterity.inspect(model, None, [5, 6], batch=0, progress=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_own_losses_of_the_default_model_are_those_of_one_backward_pass_per_position():
    loaded = loading.load_model(None)
    window = cut_windows([default_text()], loaded.tokenizer, 48, 1)[0]
    result = posterity.inspect(loaded.model, None, window.ids, progress=False)
    own = result.loss_credit.sel(part="own").sum("head").values
    diagonal = np.diagonal(result.inspect_credit, axis1=2, axis2=3)
    largest = np.abs(own).max((1, 2), keepdims=True)
    assert (np.abs(own - diagonal) / largest).max() < 1e-4
    whole = (
        result.credit_by_position.sel(stream=["key", "value"]).sum(("head", "side")).transpose("layer", "stream", ...)
    )
    summed = result.inspect_credit.sum("loss_position").values
    assert (np.abs(summed - whole.values) / np.abs(whole.values).max((1, 2), keepdims=True)).max() < 1e-4
    norms = result.loss_gram.sel(pair="self later").isel(layer=-1).sum().item()
    assert norms <= 1e-12 * result.loss_gram.isel(layer=-1).sel(pair="future").sum().item()


def test_the_summary_says_who_pays():
    result = posterity.measure(
        tiny("llama"), None, tokens(3), context=12, losses=True, horizons=(1, 2, 64), progress=False
    )
    table = {row.label: row.cells for row in summary_rows(result)}
    share = stats.loss_shares(result, (), "rest").share
    for label, part in (("own loss", "own"), ("self edge, later losses", "self later"), ("future edges", "future")):
        query, key, value = table[label]
        assert query == ""
        assert key.startswith(f"{100 * share.sel(written='key', part=part):.1f}")
        assert value.startswith(f"{100 * share.sel(written='value', part=part):.1f}")
    assert table["effective horizon"][0] == ""
    assert all("token" in cell for cell in table["effective horizon"][1:])
    plain = posterity.measure(tiny("llama"), None, tokens(3), context=12, progress=False)
    assert not {row.label for row in summary_rows(plain)} & {"own loss", "effective horizon"}
