"""Rows 1 to 5 of the audit against dense autograd, and what all rows share: verdicts, Dataset, file, table, page."""

import math
import re

import numpy as np
import pytest
import torch
import xarray as xr
from rich.console import Console
from support import pages
from support.loss_oracles import exact
from support.spy import spy_on
from support.tiny import summed_loss, tiny, tokens

import posterity
from posterity import InputError
from posterity.axes import WRITTEN
from posterity.clauses.all_clauses import CLAUSES
from posterity.clauses.clause import judge, margin_of_error
from posterity.clauses.context_growth import measure_growth
from posterity.clauses.drawing import View
from posterity.clauses.readers import measure_readers
from posterity.clauses.subject import Plan, Subject
from posterity.decomposition.participation import KINDS, participation_ratio
from posterity.models.attach import observe_model
from posterity.reporting.audit_table import figure_rows
from posterity.results.audit_schema import AUDIT, FAILS, HOLDS, MIXED
from posterity.results.formatting import list_parts, value_with_error
from posterity.results.kind import kind_name

SMALL = {"context": 16, "limit": 2, "contexts": (4, 8, 16), "span": 48}


def subject(model, ids=None, **changes):
    ids = tokens(4, 48) if ids is None else ids
    return Subject(model, None, [(f"text {n}", row) for n, row in enumerate(ids)], Plan(**(SMALL | changes)))


@pytest.fixture(scope="module")
def audited():
    return posterity.audit(tiny("llama"), None, tokens(4, 48), rows=[1, 2, 3, 4, 5], progress=False, **SMALL)


# ---- readers ---------------------------------------------------------------------------------------------------------


def by_hand(weight):
    """Participation ratio of the columns of (..., query, key) weights."""
    return weight.abs().sum(-2) ** 2 / (weight**2).sum(-2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "gpt_oss"])
def test_readers_are_those_of_the_dense_account(name, small_blocks):
    model, ids = exact(name), tokens(2, 19)
    ratios = []
    with observe_model(model, lambda layer, back, project: ratios.append(participation_ratio(back))):
        summed_loss(model, ids).backward()
    with spy_on(model) as spy:
        summed_loss(model, ids).backward()
    for ours, (credit, mass, weight, _, _, _) in zip(ratios, spy.accounts()[::-1], strict=True):
        expected = torch.stack([by_hand(x) for x in (weight, mass[1], mass[2], credit[1], credit[2])])
        finite = expected.isfinite()  # a key that no query may read has none
        torch.testing.assert_close(ours[finite], expected[finite], rtol=1e-8, atol=1e-8)
        assert ours[~finite].isnan().all()


def test_readers_lie_between_one_and_all_that_could_read():
    model, ids = exact("llama"), tokens(2, 12)
    ratios = []
    with observe_model(model, lambda layer, back, project: ratios.append(participation_ratio(back))):
        summed_loss(model, ids).backward()
    for ratio in ratios:
        finite = ratio.isfinite()  # no loss reads the last position in the last layer
        assert finite[..., :-1].all()
        assert (ratio[finite] >= 1 - 1e-9).all()
        assert (ratio <= torch.arange(12, 0, -1) + 1e-9)[finite].all()


def test_padding_reads_nothing():
    model, ids = exact("llama"), tokens(1, 12)
    short, padded = [], []
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, 8:] = 0
    for into, inputs in ((short, {}), (padded, {"attention_mask": mask})):
        with observe_model(model, lambda layer, back, project, into=into: into.append(participation_ratio(back))):
            row = ids if inputs else ids[:, :8]
            logits = model(input_ids=row, use_cache=False, **inputs).logits[:, :7]
            torch.nn.functional.cross_entropy(logits[0], ids[0, 1:8], reduction="sum").backward()
    for expected, ratio in zip(short, padded, strict=True):
        torch.testing.assert_close(expected, ratio[..., :8], equal_nan=True)
        assert ratio[..., 8:].isnan().all()


def test_the_row_on_readers_averages_over_keys_heads_and_windows():
    model = exact("llama")
    audit_subject = subject(model)
    finding = measure_readers(audit_subject)
    ratios = []
    for ids in audit_subject.windows(16, 2):
        with spy_on(model) as spy:
            summed_loss(model, ids[None]).backward()
        layers = [
            torch.stack([by_hand(x) for x in (weight, mass[1], mass[2], credit[1], credit[2])])[:, 0]
            for credit, mass, weight, _, _, _ in spy.accounts()
        ]
        ratios.append(torch.stack(layers))  # layer, kind, head, key
    ratios = torch.stack(ratios)
    for index, figure in enumerate(finding.figures):
        by_window = ratios[:, :, index].nanmean((2, 3)).mean(1)
        assert figure.value == pytest.approx(by_window.mean().item(), rel=1e-8)
        assert figure.error == pytest.approx(by_window.std().item() / math.sqrt(2), rel=1e-8)
        assert figure.baseline == 8.5
    np.testing.assert_allclose(finding.variables["by_head"], ratios.nanmean(4).mean(0).permute(0, 2, 1), rtol=1e-8)
    np.testing.assert_allclose(
        finding.variables["by_position"],
        ratios.permute(0, 2, 4, 1, 3).flatten(3).nanmean(3).mean(0).mT,
        rtol=1e-8,
    )
    assert list(finding.variables["by_layer"].kind.values) == list(KINDS)


# ---- by lag, weights -------------------------------------------------------------------------------------------------


def test_look_back_and_look_ahead_are_the_dense_shares():
    model = exact("gpt2")
    audit_subject = subject(model)
    credits = []
    for ids in audit_subject.windows(16, 2):
        with spy_on(model) as spy:
            summed_loss(model, ids[None]).backward()
        credits.append(torch.stack([account[0][:, 0] for account in spy.accounts()]))  # layer, stream, head, i, j
    credit = torch.stack(credits)
    self_share = credit.diagonal(dim1=-2, dim2=-1).sum((0, 1, 3, 4)) / credit.sum((0, 1, 3, 4, 5))
    values = {f.name: f.value for clause in CLAUSES[:2] for f in clause.measure(audit_subject).figures}
    names = ("query credit over edges to earlier keys", *(f"{x} credit over edges from later queries" for x in WRITTEN))
    for name, share in zip(names, self_share.tolist(), strict=True):
        assert values[name] == pytest.approx(1 - share, rel=1e-6)


def test_the_count_is_exact_and_the_weights_are_autograd_s():
    model = exact("llama")
    audit_subject = subject(model, limit=1)
    figures = {f.name: f for f in CLAUSES[3].measure(audit_subject).figures}
    assert figures["later terms for one own"].value == 7.5
    assert figures["self share of W_K, one window"].baseline == pytest.approx(2 / 17)
    ids = audit_subject.windows(16, 1)[0][None]
    for stream, name in (("k_proj", "W_K"), ("v_proj", "W_V")):
        weights = [layer.self_attn.get_parameter(f"{stream}.weight") for layer in model.model.layers]
        model.zero_grad()
        summed_loss(model, ids).backward()
        total = [w.grad.clone() for w in weights]
        parts = self_gradients(model, ids, stream)
        share = sum((p * w).sum() for p, w in zip(parts, total, strict=True)) / sum(w.square().sum() for w in total)
        assert figures[f"self share of {name}, one window"].value == pytest.approx(share.item(), rel=1e-6)


def self_gradients(model, ids, stream):
    """Gradients of a projection's weights by the self edges alone: dk, dv of these edges, sent through by hand."""
    inputs = []
    hooks = [
        getattr(layer.self_attn, stream).register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
        for layer in model.model.layers
    ]
    with spy_on(model) as spy:
        summed_loss(model, ids).backward()
    for hook in hooks:
        hook.remove()
    gradients = []
    for (query, _key, value, output, scale, _, _, _), x in zip(spy.calls, inputs, strict=True):
        groups = value.shape[1]
        account = spy.accounts()[len(gradients)]
        weight, grad = account[2].diagonal(dim1=-2, dim2=-1)[..., None], output.grad
        if stream == "v_proj":
            part = weight * grad
        else:
            own = (grad * value.repeat_interleave(grad.shape[1] // groups, 1)).sum(-1, keepdim=True)
            part = scale * weight * (own - (grad * output).sum(-1, keepdim=True)) * query
        part = part.unflatten(1, (groups, -1)).sum(2)
        if stream == "k_proj":  # back through the rotary embedding, which is a rotation
            cos, sin = model.model.rotary_emb(part, torch.arange(part.shape[2])[None])
            half = part.shape[-1] // 2
            turned = torch.cat((part[..., half:], -part[..., :half]), -1)
            part = part * cos[:, None] + turned * sin[:, None]
        flat = part.transpose(1, 2).flatten(2)[0]
        gradients.append(flat.mT @ x[0])
    return gradients


# ---- the context -----------------------------------------------------------------------------------------------------


def test_growth_measures_the_same_text_at_every_length():
    model = exact("llama")
    audit_subject = subject(model, tokens(1, 48))
    finding = measure_growth(audit_subject)
    text = audit_subject.windows(48, 1)[0]
    shares = finding.variables["share"]
    for context in (4, 8, 16):
        own, total, weight = torch.zeros(3), torch.zeros(3), 0.0
        for ids in text.view(-1, context):
            with spy_on(model) as spy:
                summed_loss(model, ids[None]).backward()
            for credit, _, weights, _, _, _ in spy.accounts():
                own += credit.diagonal(dim1=-2, dim2=-1).sum((1, 2, 3)).float()
                total += credit.sum((1, 2, 3, 4)).float()
                weight += weights.diagonal(dim1=-2, dim2=-1).mean().item() / len(spy.calls) * context / 48
        for index, curve in ((1, "key credit"), (2, "value credit")):
            assert float(shares.sel(curve=curve, context=context)) == pytest.approx(
                (own / total)[index].item(), rel=1e-5
            )
        assert float(shares.sel(curve="mean a_ii", context=context)) == pytest.approx(weight, rel=1e-6)


def test_an_exponent_is_the_slope_of_the_logarithms_and_its_error_a_jackknife():
    from posterity.clauses.context_growth import _exponent

    contexts = (64, 128, 256)
    exact_power = np.stack([np.stack([c**-0.7 * np.ones(4), np.ones(4)]) for c in contexts])
    assert _exponent(exact_power, contexts) == pytest.approx((-0.7, 0), abs=1e-12)
    rng = np.random.default_rng(0)
    noisy = exact_power * np.exp(0.1 * rng.normal(size=exact_power.shape))
    slope, error = _exponent(noisy, contexts)
    slopes = []
    for omitted in range(4):
        blocks = [n for n in range(4) if n != omitted]
        y = [math.log(noisy[c, 0, blocks].sum() / noisy[c, 1, blocks].sum()) for c in range(3)]
        x = [math.log(c) for c in contexts]
        mx, my = sum(x) / 3, sum(y) / 3
        slopes.append(sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x))
    mean = sum(slopes) / 4
    assert error == pytest.approx(math.sqrt(3 / 4 * sum((value - mean) ** 2 for value in slopes)))
    assert abs(slope - mean) < 0.1
    assert math.isnan(_exponent(noisy[..., :1], contexts)[1])


def test_the_future_dominates_from_the_length_on_after_which_no_share_rises_above_one_half():
    from posterity.clauses.context_growth import _crossover

    share = xr.DataArray(
        [[0.6, 0.4, 0.7, 0.4], [0.4, 0.6, 0.7, 0.4], [0.3, 0.4, 0.7, 0.4]],
        {"context": [8, 16, 32], "layer": range(4)},
        ["context", "layer"],
    )
    np.testing.assert_array_equal(_crossover(share), [16, 32, np.nan, 8])


# ---- what all rows share ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "verdict"),
    [
        ([0.9, 0.8], [0.1, 0.1], HOLDS),
        ([0.9, 0.8, 0.45], [0.1, 0.1, 0.1], HOLDS),
        ([0.1, 0.2], [0.1, 0.1], FAILS),
        ([0.9, 0.1], [0.1, 0.1], MIXED),
        ([0.55, 0.45], [0.1, 0.1], MIXED),
        ([0.9, math.nan], [math.nan, math.nan], HOLDS),
    ],
)
def test_a_verdict_takes_a_margin_of_error(value, error, verdict):
    margin = margin_of_error(error, 0)
    assert judge(value, margin)[0] == verdict
    other = {HOLDS: FAILS, FAILS: HOLDS, MIXED: MIXED}
    assert judge([1 - x for x in value], margin)[0] == other[verdict]
    assert judge([1 - x for x in value], margin, above=False)[0] == verdict


def test_few_windows_have_a_wide_margin_of_error():
    errors = [0.1, math.nan]
    for windows, factor in {0: 2, 1: 2, 2: 12.706205, 4: 3.182446, 1000: 1.962341}.items():
        np.testing.assert_allclose(margin_of_error(errors, windows), [0.1 * factor, 0], rtol=1e-6)
    assert judge([0.75], margin_of_error([0.1], 20))[0] == HOLDS
    assert judge([0.75], margin_of_error([0.1], 4))[0] == MIXED


def test_standard_errors_are_those_of_the_bootstrap():
    from posterity.clauses.agreement import pooled_ratio
    from posterity.results.stats import mean_and_error

    rng = np.random.default_rng(0)
    values, totals = rng.gamma(2.0, size=(40, 3)), rng.gamma(3.0, size=(40, 3))
    drawn = rng.integers(40, size=(20_000, 40))
    mean, error = mean_and_error(values)
    np.testing.assert_allclose(mean, values.mean(0))
    bootstrap = values[drawn].mean(1).std(0) * math.sqrt(40 / 39)  # the bootstrap's divides by n
    np.testing.assert_allclose(error, bootstrap, rtol=0.03)  # 20,000 draws know a deviation to 0.5 %
    share, error = pooled_ratio(values, totals)
    np.testing.assert_allclose(share, values.sum(0) / totals.sum(0))
    resampled = (values[drawn].sum(1) / totals[drawn].sum(1)).std(0)
    np.testing.assert_allclose(error, resampled, rtol=0.1)  # a ratio is linear in the sums to first order only


def test_parts_are_named():
    assert list_parts(np.array([True, False, True])) == "layers 0 and 2"
    assert list_parts(np.eye(2, dtype=bool)) == "layers L0 H0 and L1 H1"
    assert list_parts(np.ones(10, dtype=bool), most=2) == "layers 0, 1 and 8 more"
    assert list_parts(np.zeros(3, dtype=bool)) == ""


def test_numbers_show_as_many_digits_as_their_error_allows():
    assert value_with_error(0.12345, 0.0123) == "0.123 ± 0.012"
    assert value_with_error(123.4, 20.0) == "123 ± 20"
    assert value_with_error(0.25) == "0.25"
    assert value_with_error(math.nan) == "–"
    assert value_with_error(3e-9, 1e-10) == "3.00e-09 ± 1.0e-10"


def test_an_audit_is_the_same_in_a_file(tmp_path, audited):
    posterity.save(audited, tmp_path / "audit.nc")
    loaded = posterity.load(tmp_path / "audit.nc")
    xr.testing.assert_equal(loaded, audited)
    assert loaded.attrs == audited.attrs
    for name in audited.data_vars:
        assert loaded[name].attrs == audited[name].attrs


def test_every_variable_of_an_audit_has_a_name_and_units(audited):
    for name, variable in audited.data_vars.items():
        assert variable.attrs["long_name"], name
        if variable.dtype.kind == "f":
            assert variable.attrs["units"], name


def test_models_stand_side_by_side_even_if_they_differ_in_depth():
    deep, flat = tiny("llama"), tiny("llama", num_hidden_layers=2)
    both = posterity.audit({"deep": deep, "flat": flat}, None, tokens(4, 48), rows=[1, 5], progress=False, **SMALL)
    alone = posterity.audit({"flat": flat}, None, tokens(4, 48), rows=[1, 5], progress=False, **SMALL)
    assert list(both.model.values) == ["deep", "flat"]
    xr.testing.assert_equal(both.figure.sel(model="flat"), alone.figure.sel(model="flat"))
    assert View(both, "flat").look_back_share.sizes["layer"] == 2
    assert View(both, "deep").look_back_share.sizes["layer"] == 3


def test_the_control_has_the_same_config_and_other_weights():
    model = tiny("llama")
    both = posterity.audit(model, None, tokens(4, 48), rows=[1], control="random", progress=False, **SMALL)
    assert list(both.model.values) == ["LlamaForCausalLM", "random weights"]
    assert both.figure[0, 0] != both.figure[1, 0]


def test_a_model_and_the_random_numbers_are_as_they_were():
    model = tiny("llama").train()
    before = [x.clone() for x in model.parameters()]
    state = torch.get_rng_state()
    posterity.audit(model, None, tokens(4, 48), rows=[1, 3], progress=False, **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(x, y) and y.grad is None for x, y in zip(before, model.parameters(), strict=True))


def test_table_and_page_show_every_clause_and_escape_what_comes_from_outside(tmp_path, audited):
    hostile = audited.assign_coords(model=["<script>alert(1)</script>"])
    console = Console(record=True, width=80)
    posterity.summary(hostile, console)
    text = console.export_text()
    page = posterity.report(hostile, tmp_path / "audit.html").read_text()
    for clause in CLAUSES[:5]:
        assert clause.name in text
        assert clause.name in page
    assert "<script>alert" not in page
    figures = pages.data(page)["figures"]
    assert len(figures) == page.count('class="chart"') > 5
    assert all(figure["data"] for figure in figures.values())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"rows": [11]}, "rows expects numbers from 1 to 10"),
        ({"rows": []}, "rows expects numbers"),
        ({"control": "shuffled"}, 'control expects "random"'),
        ({"contexts": (64, 32)}, "contexts expects two or more lengths that grow"),
        ({"contexts": (8, 999), "span": 999}, "at most 64 tokens; got contexts (8, 999): lower it"),
        ({"zorg": 1}, "audit takes context"),
        ({"contexts": 64}, "contexts expects several lengths, such as (64, 128); got 64"),
        ({"rows": 12}, "rows expects numbers from 1 to 10; got 12"),
        ({"prefix": 60, "future": 32, "rows": [9]}, "the model reads at most 64 tokens; got prefix 60"),
        ({"span": 8}, "a span of at least the longest context"),
    ],
)
def test_mistakes_are_one_line(options, line):
    with pytest.raises(InputError, match=re.escape(line)):
        posterity.audit(tiny("gpt2"), None, tokens(4, 1000), progress=False, **({"rows": [5]} | SMALL | options))


def test_lengths_beyond_a_rotary_model_s_config_are_kept():
    options = SMALL | {"rows": [1], "context": 80, "limit": 1}
    audit = posterity.audit(tiny("llama"), None, tokens(2, 200), progress=False, **options)
    assert "context=80" in audit.attrs["plan"]
    assert audit.verdict.values != "not measured"


def test_what_is_not_given_shrinks_to_what_the_model_reads():
    assert Plan().fit_to(10**9, ()) == Plan()
    small = Plan().fit_to(64, ())
    assert (small.context, small.contexts, small.short) == (64, (16, 32, 64), 64)
    assert small.prefix + small.future <= 64
    assert Plan().fit_to(200, ()).contexts == (64, 128)
    audit = posterity.audit(tiny("llama"), None, tokens(2, 200), rows=[1], progress=False, limit=2)
    assert "context=64" in audit.attrs["plan"]
    assert "without standard errors" not in str(audit.reason.values)


def test_a_row_that_cannot_be_measured_says_why_and_the_others_go_on(tmp_path):
    model, ids = tiny("gpt_oss"), tokens(4, 48)
    audit = posterity.audit(
        model, None, [ids[0]], rows=[1, 10], progress=False, **(SMALL | {"prefix": 30, "future": 15})
    )
    assert audit.verdict.values[0].tolist()[0] in (HOLDS, FAILS, MIXED)
    assert audit.verdict.values[0].tolist()[1] == "not measured"
    assert "two windows of 45 tokens" in str(audit.reason.values[0, 1])
    posterity.save(audit, tmp_path / "audit.nc")
    posterity.report(posterity.load(tmp_path / "audit.nc"), tmp_path / "audit.html")
    with pytest.raises(InputError, match="two windows of 45 tokens"):
        posterity.audit(model, None, [ids[0]], rows=[10], progress=False, **(SMALL | {"prefix": 30, "future": 15}))


def test_a_single_window_says_that_there_are_no_errors():
    audit = posterity.audit(tiny("llama"), None, tokens(1, 48), rows=[1], progress=False, **(SMALL | {"limit": 1}))
    assert "without standard errors" in str(audit.reason.values[0, 0])


def test_no_number_of_a_table_is_cut(audited):
    models = xr.concat([audited.assign_coords(model=[f"model {n}"]) for n in range(3)], "model", data_vars="minimal")
    for wide in (80, 200):
        console = Console(record=True, width=wide)
        posterity.summary(models, console)
        text = console.export_text()
        for row in figure_rows(audited, 4):
            assert text.count(row.values[0]) >= 3
            assert text.count(row.baseline) >= 1


@pytest.mark.parametrize("name", ["figure", "verdict", "formula", "of_clause"])
def test_a_file_without_what_it_must_have_is_refused(tmp_path, audited, name):
    broken = audited.drop_vars(name)
    with pytest.raises(InputError, match=name):
        posterity.save(broken, tmp_path / "audit.nc")
    broken.to_netcdf(tmp_path / "audit.nc", engine="h5netcdf")
    with pytest.raises(InputError, match=name):
        posterity.load(tmp_path / "audit.nc")


def test_a_damaged_or_foreign_file_is_refused(tmp_path, audited):
    posterity.save(audited, tmp_path / "audit.nc")
    data = (tmp_path / "audit.nc").read_bytes()
    (tmp_path / "cut.nc").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="expected"):
        posterity.load(tmp_path / "cut.nc")
    wrong = audited.assign(verdict=audited.verdict.astype(object).where(False, "maybe").astype(str))
    wrong.to_netcdf(tmp_path / "wrong.nc", engine="h5netcdf")
    with pytest.raises(InputError, match="a verdict is none of holds, fails, mixed"):
        posterity.load(tmp_path / "wrong.nc")
    assert kind_name(audited) == AUDIT.name
