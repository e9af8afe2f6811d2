"""The instrument on whole models: against dense accounts with autograd's own gradients, and against its own laws."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import INPUTS, padded
from support.reference import by_reader_and_lag
from support.spy import spy_on
from support.tiny import CONFIGS, summed_loss, tiny, tokens

import posterity
from posterity.errors import InputError
from posterity.results import stats

KEYS = ("q_proj", "k_proj", "v_proj")


def own_loss(model, ids, model_inputs):
    logits = model(input_ids=ids, use_cache=False, **{k: v for k, v in model_inputs.items() if k != "labels"}).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), model_inputs["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.usefixtures("small_blocks")
def test_every_number_equals_the_dense_account_of_autograds_gradients(name, inputs):
    model, ids = tiny(name), tokens()
    model_inputs, readers = INPUTS[inputs](ids), None
    if inputs.endswith("padding"):
        model_inputs["labels"] = padded(ids, inputs.split()[0])[1]
        if inputs == "left padding":
            model_inputs["labels"][1, 4] = -100
        readers = model_inputs["attention_mask"].bool()
    with spy_on(model) as spy:
        own_loss(model, ids, model_inputs).backward()
    with posterity.account(model, lags="all") as ledger:
        own_loss(model, ids, model_inputs).backward()
    ours = ledger.result()

    def same(actual, expected):
        expected = np.stack([np.asarray(x) for x in expected])
        np.testing.assert_allclose(actual.values, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())

    dense = spy.accounts(readers)
    assert len(dense) == ours.sizes["layer"] > 1
    starts = [0, 0] if readers is None else readers.int().argmax(1).tolist()
    credit, mass, attention = ([by_reader_and_lag(x[kind], starts) for x in dense] for kind in range(3))
    pairs = [by_reader_and_lag(x[3][:, :1].long().expand(2, -1, -1, -1), starts) for x in dense]
    same(ours.credit, [x.sum(1).movedim(0, 1) for x in credit])
    same(ours.mass, [x.sum(1).movedim(0, 1) for x in mass])
    same(ours.attention, [x.sum(0) for x in attention])
    same(ours.edges, [x[:, 0].sum(0) for x in pairs])
    same(ours.attention_first, [sum(x[2][d, :, :, start].sum(-1) for d, start in enumerate(starts)) for x in dense])
    same(ours.profile_by_document, [[x.sum(2)[:, d] for x in credit] for d in range(2)])
    same(ours.mass_by_document, [[x.sum(2)[:, d] for x in mass] for d in range(2)])
    same(ours.attention_by_document, [[x.sum(1)[d] for x in attention] for d in range(2)])
    sides = [torch.stack((x[..., 0], x[..., 1:].sum(-1)), -1) for x in credit]
    same(ours.credit_by_document, [[x[:, d].transpose(0, 1) for x in sides] for d in range(2)])
    _check_tail_moments(ours, credit, mass, attention)
    # the ledger balances against the gradients that autograd has for the model's own q, k, v
    for call, layer in zip(spy.calls, range(len(dense)), strict=True):
        for tensor, stream in zip(call[:3], ours.stream.values, strict=True):
            balance = ours.credit.sel(layer=layer, stream=stream).sum().item()
            assert balance == pytest.approx(tensor.grad.square().sum().item(), rel=1e-10)
    assert float(stats.balance(ours).max()) < 1e-10


def _check_tail_moments(ours, credit, mass, attention):
    """Compare the moments of the tails with those of the dense sums of each document's key/value heads."""
    for layer, sums in enumerate(zip(attention, mass, credit, strict=True)):
        numbers = ours.kv_head[layer].values
        by_head = torch.cat([sums[0][None], sums[1], sums[2]])  # quantity, batch, head, reader, lag
        for group in range(numbers.max() + 1):
            first, rest = by_head[:, :, numbers == group].sum(2).unbind(2)
            beyond, whole = (x.flip(-1).cumsum(-1).flip(-1) for x in (rest, first + rest))
            actual = ours.tail_moment.isel(layer=layer, group=group)
            for moment, pair in {
                "rest . rest": (beyond, beyond), "rest . rest total": (beyond, beyond[..., :1]),
                "rest . total": (beyond, whole[..., :1]), "all . all": (whole, whole),
                "all . total": (whole, whole[..., :1]),
            }.items():  # fmt: skip
                expected = (pair[0] * pair[1]).sum(1)
                scale = expected.abs().max().item()
                np.testing.assert_allclose(actual.sel(moment=moment), expected, rtol=1e-9, atol=1e-10 * scale)


PROJECTIONS = {  # rows of each parameter that make the query, key and value
    "llama": lambda model: [{f"{n}.weight": slice(None)} for n in KEYS],
    "qwen3": lambda model: [{f"{n}.weight": slice(None)} for n in KEYS],
    "phi3": lambda model: [{"qkv_proj.weight": rows} for rows in (slice(0, 24), slice(24, 36), slice(36, 48))],
    "gpt_neox": lambda model: [
        {f"query_key_value.{n}": np.arange(72).reshape(4, 3, 6)[:, s].ravel() for n in ("weight", "bias")}
        for s in range(3)
    ],
    "gpt2": lambda model: [
        {f"c_attn.{n}": (..., slice(24 * s, 24 * s + 24)) for n in ("weight", "bias")} for s in range(3)
    ],
}


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.usefixtures("small_blocks")
def test_the_two_parts_of_a_weight_gradient_add_up_to_autograds_own(name, batch):
    """|self|^2 + |other|^2 + 2 self.other is the squared norm of the rows of the parameter's gradient, exactly."""
    model, ids = tiny(name), tokens(4)
    ours = posterity.measure(model, None, ids, context=12, batch=batch, progress=False)
    assert model.training is False
    gradients = []
    for row in ids:
        model.zero_grad()
        summed_loss(model, row[None]).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    module_of = dict(zip(ours.layer.values, ours.module.values, strict=True))
    whole = ours.weight_by_document.sel(term="self") + ours.weight_by_document.sel(term="other")
    whole = whole + 2 * ours.weight_by_document.sel(term="inner")
    mean = (
        ours.weight_mean.sel(term="self") + ours.weight_mean.sel(term="other") + 2 * ours.weight_mean.sel(term="inner")
    )
    for layer, module in module_of.items():
        for stream, rows in zip(ours.stream.values, PROJECTIONS[name](model), strict=True):
            per_document = [
                torch.cat([g[f"{module}.{n}"][index].flatten() for n, index in rows.items()]) for g in gradients
            ]
            expected = [g.square().sum().item() for g in per_document]
            np.testing.assert_allclose(whole.sel(layer=layer, stream=stream), expected, rtol=1e-6)
            expected = torch.stack(per_document).mean(0).square().sum().item()
            assert mean.sel(layer=layer, stream=stream).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3"])
def test_the_self_part_of_a_weight_gradient_is_the_gradient_with_all_other_edges_cut(name):
    """Cutting every other edge of the last layer in the backward pass leaves the self part of its weights' gradient."""
    model, ids = tiny(name), tokens(1)
    ours = posterity.measure(model, None, ids, context=12, progress=False)
    layers = model.gpt_neox.layers if name == "gpt_neox" else model.model.layers
    module = layers[-1].attention if name == "gpt_neox" else layers[-1].self_attn
    index = 0

    def keep_self(module_, query, key, value, attention_mask, scaling, **kwargs):
        nonlocal index
        index += 1
        share = query.shape[1] // key.shape[1]
        own = index == len(layers)
        whole_query, eye = query, torch.eye(12, dtype=torch.double)
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        score = whole_query @ key.mT * scaling
        if own:
            score = score * eye + (score * (1 - eye)).detach()
        weight = torch.softmax(score + attention_mask.clamp(min=-1e30), -1)
        output = weight @ value
        if own:  # values: only the self edge's term may reach them
            output = output.detach() + (weight.detach() * eye) @ value - ((weight.detach() * eye) @ value).detach()
            output = output + weight @ value.detach() - (weight @ value.detach()).detach()
        return output.transpose(1, 2).contiguous(), None

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("keep_self", keep_self)
    AttentionMaskInterface.register("keep_self", eager_mask)
    model.set_attn_implementation("keep_self")
    model.zero_grad()
    summed_loss(model, ids).backward()
    rows = PROJECTIONS[name](model)
    for stream, parts in zip(ours.stream.values, rows, strict=True):
        parameters = dict(module.named_parameters())
        expected = sum(parameters[n].grad[rows].square().sum().item() for n, rows in parts.items())
        actual = ours.weight_by_document.sel(stream=stream, term="self").isel(layer=-1).item()
        assert actual == pytest.approx(expected, rel=1e-5), stream


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 5), max_size=3), batch=st.integers(1, 4))
def test_any_split_of_the_documents_and_any_batch_gives_the_same_result(cuts, batch):
    model, ids = tiny("llama", num_hidden_layers=2), tokens(5)
    whole = posterity.measure(model, None, ids, context=12, progress=False)
    edges = [0, *sorted(cuts), 5]
    parts = [
        posterity.measure(model, None, ids[a:b], context=12, batch=batch, progress=False)
        for a, b in pairwise(edges)
        if a < b
    ]
    for name in ("credit", "mass", "attention", "credit_by_position", "attention_first", "edges"):
        xr.testing.assert_allclose(whole[name], sum(part[name] for part in parts), rtol=1e-9, atol=1e-12)
    for name in (
        "credit_by_document",
        "first_by_document",
        "profile_by_document",
        "loss",
        "tokens",
        "weight_by_document",
    ):
        joined = xr.concat([part[name].drop_vars(("document", "text")) for part in parts], "document")
        xr.testing.assert_allclose(whole[name].drop_vars(("document", "text")), joined, rtol=1e-6, atol=1e-9)


def test_padding_on_the_left_changes_no_number_of_a_document():
    """A document alone, and the same document behind four padding tokens: first position and positions included."""
    model, ids = tiny("llama"), tokens(1)
    with posterity.account(model, lags="all") as alone:
        summed_loss(model, ids).backward()
    behind = torch.cat((torch.ones(1, 4, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)), 1)
    with posterity.account(model, lags="all") as padded_ledger:
        places = {"attention_mask": mask, "position_ids": torch.cat((torch.zeros(4), torch.arange(12)))[None].long()}
        own_loss(model, behind, places | {"labels": behind.masked_fill(torch.arange(16) < 5, -100)}).backward()
    for name, expected in alone.result().data_vars.items():
        actual = padded_ledger.result()[name]
        actual = actual.isel({dim: slice(0, expected.sizes[dim]) for dim in ("lag", "position") if dim in actual.dims})
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-9, err_msg=name)


def test_the_corpus_of_a_ledger_is_the_sum_of_its_documents():
    result = posterity.measure(tiny("llama"), None, tokens(3, 20), context=20, progress=False)
    by_document = result.credit_by_document.sum("document")
    xr.testing.assert_allclose(result.credit_by_position.sum("position"), by_document.sum("reader_of"))
    xr.testing.assert_allclose(result.credit.isel(lag=0, drop=True), by_document.sel(side="self", drop=True))
    xr.testing.assert_allclose(result.profile_by_document.sum("document"), result.credit.sum("head"))
    xr.testing.assert_allclose(result.mass_by_document.sum("document"), result.mass.sum("head"))
    xr.testing.assert_allclose(result.attention_by_document.sum("document"), result.attention.sum("head"))
    total = result.attention.sum(("reader_of", "lag"))
    xr.testing.assert_allclose(total, xr.full_like(result.attention_first, 60.0))


def test_positions_beyond_the_exact_ones_are_binned_by_quarter_octaves():
    options = {"losses": True, "context": 40, "progress": False}
    exact, binned = (posterity.measure(tiny("llama"), None, tokens(2, 40), positions=n, **options) for n in (40, 8))
    assert binned.position.values.tolist() == [*range(8), 8, 10, 11, 13, 16, 19, 23, 27, 32, 38]
    assert binned.position_end.values[-3:].tolist() == [31, 37, 39]
    for name in ("credit_by_position", "loss_credit", "loss_gram", "hidden"):
        expected = np.add.reduceat(exact[name].values, binned.position.values, axis=-1)
        np.testing.assert_allclose(binned[name], expected, rtol=1e-10, atol=1e-14)
    xr.testing.assert_identical(exact.credit, binned.credit)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once_and_gives_the_same(reentrant):
    model, ids = tiny("llama"), tokens()
    with posterity.account(model) as plain:
        summed_loss(model, ids).backward()
    model.train().activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with posterity.account(model) as checkpointed:
        summed_loss(model, ids).backward()
    for name, variable in plain.result().data_vars.items():
        xr.testing.assert_allclose(variable, checkpointed.result()[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_gives_the_same():
    model, ids = tiny("llama", dtype=torch.float32), tokens()
    with posterity.account(model) as plain:
        summed_loss(model, ids).backward()
    compiled = torch.compile(model)
    with posterity.account(compiled) as ledger:
        summed_loss(compiled, ids).backward()
    for name, variable in plain.result().data_vars.items():
        largest = float(abs(variable).max())
        xr.testing.assert_allclose(variable, ledger.result()[name], rtol=1e-4, atol=1e-4 * largest)


def compile_wrapped(model):
    return torch.compile(model, backend="aot_eager")


def compile_in_place(model):
    model.compile(backend="aot_eager")
    return model


def compile_layers(model):
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    return model


def compile_and_train(model):
    compiled = compile_wrapped(model)
    summed_loss(compiled, tokens()).backward()
    model.zero_grad()
    return compiled


@pytest.mark.parametrize(
    "compiled",
    [compile_wrapped, compile_in_place, compile_layers, pytest.param(compile_and_train, marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_is_measured_by_as_many_backward_passes_as_it_takes(compiled):
    options = {"context": 12, "horizons": (2,), "parameters": True, "progress": False}
    right = posterity.measure(tiny("llama"), None, tokens(), **options)
    mine = posterity.measure(compiled(tiny("llama")), None, tokens(), **options)
    for name, variable in right.data_vars.items():
        np.testing.assert_array_equal(mine[name], variable, err_msg=name)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_generation_inside_an_account_writes_the_same_and_leaves_no_entry(name):
    model, ids = tiny(name, torch.float32), tokens(2)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    right = model.generate(ids, **options)
    with posterity.account(model) as ledger:
        assert torch.equal(model.generate(ids, **options), right)
        with pytest.raises(InputError, match=r"static cache needs masks written out.*: leave cache_implementation out"):
            model.generate(ids, cache_implementation="static", **options)
        assert ledger.documents == 0
        summed_loss(model, ids).backward()
    with posterity.account(model) as plain:
        summed_loss(model, ids).backward()
    xr.testing.assert_equal(ledger.result().drop_attrs(), plain.result().drop_attrs())


def test_gradient_accumulation_and_unequal_lengths_add_documents():
    model = tiny("llama")
    with posterity.account(model) as ledger:
        for length in (12, 30, 20):
            summed_loss(model, tokens(1, length)).backward()
    result = ledger.result()
    assert result.sizes["document"] == 3
    assert result.sizes["position"] == 30
    for index, length in enumerate((12, 30, 20)):
        alone = posterity.measure(model, None, tokens(1, length), context=length, progress=False)
        actual = result.profile_by_document.isel(document=index).sel(lag=alone.lag)
        xr.testing.assert_allclose(
            actual.drop_vars(("document", "text", "lag_end")),
            alone.profile_by_document[0].drop_vars(("document", "text", "lag_end")),
        )


def test_lags_all_summed_into_bins_equal_the_bins():
    model, ids = tiny("llama"), tokens(2, 40)
    fine = posterity.measure(model, None, ids, context=40, lags="all", progress=False)
    coarse = posterity.measure(model, None, ids, context=40, progress=False)
    two = posterity.measure(model, None, ids, context=40, lags="self", progress=False)
    for name in ("credit", "mass", "attention", "edges", "profile_by_document"):
        for bins in (coarse, two):
            for b, (first, last) in enumerate(zip(bins.lag.values, bins.lag_end.values, strict=True)):
                expected = fine[name].sel(lag=slice(first, last)).sum("lag")
                actual = bins[name].isel(lag=b)
                known = actual.notnull()
                assert known.all() or (bins is two and not known.sel(reader_of="rest").any())
                np.testing.assert_allclose(actual.where(known, 0), expected.where(known, 0), rtol=1e-9, atol=1e-12)


def test_measuring_leaves_the_model_as_it_was():
    model = tiny("llama").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    required = [p.requires_grad for p in model.parameters()]
    posterity.measure(model, None, tokens(), context=12, progress=False)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    assert not model.model.embed_tokens._forward_hooks


def test_random_numbers_are_left_alone():
    model, state = tiny("llama"), torch.get_rng_state()
    posterity.measure(model, None, tokens(), context=12, seed=7, progress=False)
    assert torch.equal(state, torch.get_rng_state())


def test_bad_input_is_named_in_one_line():
    model = tiny("llama")
    with pytest.raises(InputError, match="at most 64 tokens; got a context of 65"):
        posterity.measure(tiny("gpt2"), None, tokens(1, 65), context=65, progress=False)
    with pytest.raises(InputError, match=r"lags expects .* got 'thirds'"):
        posterity.measure(model, None, tokens(), context=12, lags="thirds", progress=False)
    with pytest.raises(InputError, match="batch of at least 1"):
        posterity.measure(model, None, tokens(), context=12, batch=0, progress=False)
    with pytest.raises(InputError, match="knows tokens 0 to 60; got 99 in window"):
        posterity.measure(model, None, [[1] * 11 + [99]], context=12, progress=False)
    with posterity.account(model) as ledger, pytest.raises(InputError, match="no backward pass"):
        ledger.result()
    with posterity.account(model) as ledger:
        summed_loss(model, tokens()).backward()
        late = summed_loss(model, tokens())
    with pytest.raises(InputError, match="one text for each of 2 documents; got 1"):
        ledger.result(["a"])
    with pytest.raises(InputError, match="inside it"):
        late.backward()
    with posterity.account(model) as ledger:
        with torch.no_grad():
            model(input_ids=tokens())
        cut = model.model.layers[1].register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
        summed_loss(model, tokens()).backward()
        cut.remove()
    with pytest.raises(InputError, match=r"layers\.0\.self_attn has seen 0 of 2 documents"):
        ledger.result()


def test_a_gradient_that_is_not_finite_is_named_by_document_and_layer():
    model = tiny("llama")

    def poison(module, args, output):
        if args[0].shape[1] == 12:  # not in the probe
            output.register_hook(lambda grad: grad * torch.inf)

    model.model.layers[1].mlp.register_forward_hook(poison)
    with pytest.raises(InputError, match=r"layer model\.layers\.1\.self_attn is not finite in window .*#0"):
        posterity.measure(model, None, tokens(), context=12, progress=False)
    model = tiny("llama")
    model.lm_head.register_forward_hook(
        lambda module, args, output: output * (torch.nan if args[0].shape[1] == 12 else 1)
    )
    with pytest.raises(InputError, match=r"the loss of window .*#0 is not finite"):
        posterity.measure(model, None, tokens(), context=12, progress=False)


def test_progress_shows_an_estimate_and_a_bar(capsys):
    posterity.measure(tiny("llama"), None, tokens(), context=12, progress=True)
    stderr = capsys.readouterr().err
    assert "2 windows of 12 tokens: about" in stderr
    assert "2/2 windows" in stderr


def test_what_is_no_model_is_refused_and_one_horizon_may_stand_alone():
    with pytest.raises(InputError, match="expected a causal language model of transformers; got int: load it"):
        posterity.measure(3, None, tokens(), context=12)  # type: ignore[arg-type]
    one = posterity.measure(tiny("llama"), None, tokens(), context=12, horizons=4, progress=False)  # type: ignore[arg-type]
    assert one.horizon.values.tolist() == [4]
