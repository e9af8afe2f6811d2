"""Who pays in models whose positions also communicate outside attention, against one backward pass per position."""

import contextlib
import sys

import pytest
import torch
from support.families import build
from support.verification import TOLERANCE, double, nll, record_calls

import posterity
from posterity import InputError, check
from posterity.models import state_horizon


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


SOME = [slow("granitemoehybrid"), "lfm2", slow("qwen3_next")]
QUICK = ["granitemoehybrid", "lfm2", "qwen3_next"]
SLOW = ["bailing_hybrid", "bamba", "falcon_h1", "jamba", "kimi_linear", "lfm2_moe", "lfm3", "nemotron_h", "olmo_hybrid"]
SLOW += ["inkling_text", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "zamba", "zamba2"]
HORIZONS = {1: 0.0, 2: 0.5, 10: 0.9}
LENGTH = 12
pytestmark = pytest.mark.filterwarnings("ignore:.*`_is_quantized`")


def tokens(rows=1):
    return torch.randint(3, 60, (rows, LENGTH), generator=torch.Generator().manual_seed(3))


def layer_of(model, module):
    """The module around an attention module."""
    name = next(name for name, part in model.named_modules() if part is module)
    parent = model.get_submodule(name.rpartition(".")[0])
    return module if isinstance(parent, torch.nn.ModuleList) else parent


def by_position(model, ids, points):
    """Gradient of every loss at some tensors that `points` collects in a forward pass: (loss, *shape) each."""
    with contextlib.ExitStack() as stack:
        tensors = stack.enter_context(points)
        losses = nll(model(input_ids=ids, use_cache=False).logits, ids).sum(0)
        tensors = [x for x in tensors() if x.requires_grad]
        rows = [torch.autograd.grad(loss, tensors, retain_graph=True, materialize_grads=True) for loss in losses]
    rows.append([torch.zeros_like(x) for x in tensors])  # the last position has no loss
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@contextlib.contextmanager
def streams_and_inputs(model):
    """Query, key, value (position before head) and the layer's input of every attention call."""
    inputs = {}

    def keep(module, args, kwargs):
        inputs.setdefault(module, []).append(next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)))

    hooks = [x.register_forward_pre_hook(keep, with_kwargs=True) for x in model.modules()]
    try:
        with record_calls() as calls:
            yield lambda: [x for call in calls for x in (*call.streams, inputs[layer_of(model, call.module)][-1])]
    finally:
        for hook in hooks:
            hook.remove()


def discounted(grads, rate):
    """Sum over losses t of rate^(t-j) times the gradient at position j: (loss, batch, [head,] position, dim)."""
    lag = torch.arange(len(grads))[:, None] - torch.arange(len(grads))
    factors = torch.where(lag >= 0, torch.tensor(rate, dtype=torch.float64) ** lag.clamp(min=0), 0.0)
    return (grads * factors.view(len(grads), *(1,) * (grads.dim() - 3), len(grads), 1)).sum(0)


def by_place(x, y):
    """Inner products at every position of the only row, over heads."""
    products = (x * y).sum(-1)[0]
    return products.sum(0) if products.dim() == 2 else products


@pytest.mark.parametrize("name", [*QUICK, *map(slow, SLOW)])
def test_who_pays_is_that_of_single_losses_where_positions_communicate_outside_attention(name):
    model, ids = build(name, torch.float64), tokens()
    with double():
        answer = check(model)
        assert answer.other_paths
        assert not answer.uncut_paths
        grads = by_position(model, ids, streams_and_inputs(model))
        result = posterity.measure(
            model, None, ids, context=LENGTH, losses=True, horizons=tuple(HORIZONS), weights=False, progress=False
        )
    own_credit = torch.tensor(result.loss_credit.isel(part=0).sum("head").transpose("layer", "written", ...).values)
    remaining = torch.tensor(
        result.horizon_by_document.isel(document=0).sum(("head", "reader_of")).transpose("horizon", "layer", ...).values
    )
    hidden = torch.tensor(result.hidden.transpose("layer", "loss_term", "position").values)
    assert len(grads) == 4 * len(own_credit)
    for layer, start in enumerate(range(0, len(grads), 4)):
        streams, inputs = grads[start : start + 3], grads[start + 3]
        for written, stream in enumerate(streams[1:]):
            close(own_credit[layer, written], by_place(discounted(stream, 0), stream.sum(0)))
        for number, rate in enumerate(HORIZONS.values()):
            credit = [by_place(discounted(stream, rate), stream.sum(0)).sum() for stream in streams]
            close(remaining[number, layer], torch.stack(credit))
        own = discounted(inputs, 0)
        later = inputs.sum(0) - own
        close(hidden[layer], torch.stack([by_place(x, y) for x, y in ((own, own), (later, later), (own, later))]))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


@contextlib.contextmanager
def linear_outputs(model, kept):
    """Outputs of all linear modules; their inputs, without a graph, go to `kept` by name."""
    outputs = {}

    def keep(name):
        def hook(module, args, output):
            if output.dim() == 3:
                kept[name], outputs[name] = args[0].detach(), output

        return hook

    hooks = [x.register_forward_hook(keep(name)) for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)]
    try:
        yield lambda: list(outputs.values())
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", SOME)
def test_the_own_part_of_a_matrix_is_what_single_losses_send_to_its_output_at_their_own_position(name):
    model, ids, inputs = build(name, torch.float64), tokens(), {}
    with double():
        grads = by_position(model, ids, linear_outputs(model, inputs))
        result = posterity.measure(model, None, ids, context=LENGTH, parameters=True, weights=False, progress=False)
    matrices = set(result.parameter.values) & {x for x in inputs if model.get_submodule(x).bias is None}  # no tied head
    assert sum("layers.0." in module for module in matrices) >= 3
    for module, grad in zip(inputs, grads, strict=True):
        if module not in matrices:
            continue
        own, total = (torch.einsum("bnd,bne->de", x, inputs[module]) for x in (discounted(grad, 0), grad.sum(0)))
        expected = torch.stack([(x * y).sum() for x, y in ((own, own), (total - own, total - own), (own, total - own))])
        actual = result.parameter_by_document.isel(document=0).sel(parameter=module)
        close(torch.tensor(actual.values), expected)


def embedding_gradients(model, ids, rule):
    """The gradient of the sum of all losses at the embeddings, under a horizon and with the cache of a plain call."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    with posterity.horizon(model, rule):
        nll(model(inputs_embeds=embeddings).logits, ids).sum().backward()
    return embeddings.grad


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("rule", [posterity.Full(), posterity.Myopic(), posterity.Discount(0.7)], ids=str)
def test_a_horizon_discounts_every_path_to_the_embeddings(name, rule):
    model, ids = build(name, torch.float64), tokens(2)
    rate = {"Full()": 1, "Myopic()": 0}.get(str(rule), 0.7)
    with double():
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        losses = nll(model(inputs_embeds=embeddings, use_cache=False).logits, ids).sum(0)
        rows = [torch.autograd.grad(loss, embeddings, retain_graph=True)[0] for loss in losses]
        expected = discounted(torch.stack([*rows, torch.zeros_like(embeddings)]), rate)
        close(embedding_gradients(model, ids, rule), expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("name", SOME)
def test_gradient_checkpointing_changes_no_horizon(name):
    model, ids, rule = build(name), tokens(2), posterity.Discount(0.7)
    expected = embedding_gradients(model.train(), ids, rule)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    actual = embedding_gradients(model, ids, rule)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_horizon_that_states_cannot_keep_is_refused():
    model = build("lfm2")
    for options in ({"cut": "hidden"}, {"streams": "key"}, {"layers": [0]}):
        horizon = posterity.horizon(model, posterity.Myopic(), **options)
        with pytest.raises(InputError, match="keys and values, and all layers"), horizon:
            pass
    for rule in (posterity.EdgeWindow(3), posterity.Leak(0.5)):
        with pytest.raises(InputError, match="whose factors are rate"), posterity.horizon(model, rule):
            pass


def test_a_backward_pass_after_the_horizon_is_refused_at_states_too():
    model, ids = build("lfm2"), tokens()
    with posterity.horizon(model, posterity.Myopic()):
        output = model.model.layers[0](model.get_input_embeddings()(ids).detach().requires_grad_())
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert output is not None
    with pytest.raises(InputError, match="after the `with` had ended"):
        loss.backward()


def test_a_state_of_earlier_tokens_is_refused_under_a_horizon():
    model, ids = build("qwen3_next"), tokens()
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(InputError, match="a state of earlier tokens"), posterity.horizon(model, posterity.Myopic()):
        model(input_ids=ids, past_key_values=cache, use_cache=True)


def test_a_model_is_restored_after_a_horizon_and_after_an_error():
    model, ids = build("lfm2"), tokens()
    forwards = [module.forward for module in model.modules()]
    posterity.measure(model, None, ids, context=LENGTH, losses=True, progress=False)
    with pytest.raises(ZeroDivisionError), posterity.horizon(model, posterity.Myopic()):
        raise ZeroDivisionError
    assert [module.forward for module in model.modules()] == forwards
    assert not any("forward" in vars(module) for module in model.modules())


WRONG = {
    "a tap is not discounted": (
        "lfm2",
        "causal_conv1d_fn",
        lambda formula: lambda rate, *x, **y: formula(1.0, *x, **y),
    ),
    "a kernel is not known": ("lfm2", "causal_conv1d_fn", lambda formula: None),
    "one of two kernels is not known": ("qwen3_next", "causal_conv1d_fn", lambda formula: None),
    "a gate is off by 1 %": (
        "qwen3_next",
        "torch_chunk_gated_delta_rule",
        lambda formula: lambda rate, *x, beta, **y: formula(rate, *x, beta=1.01 * beta, **y),
    ),
    "keys are not normed": (
        "qwen3_next",
        "torch_chunk_gated_delta_rule",
        lambda formula: lambda rate, *x, use_qk_l2norm_in_kernel, **y: formula(rate, *x, **y),
    ),
    "a skip connection is left out": (
        "granitemoehybrid",
        "mamba2_chunk_scan",
        lambda formula: lambda rate, *x, D, **y: formula(rate, *x, **y),
    ),
    "a state is cut instead of discounted": (
        "granitemoehybrid",
        "mamba2_chunk_scan",
        lambda formula: lambda rate, *x, **y: formula(float(rate == 1), *x, **y),
    ),
    "a kernel has other arguments": (
        "granitemoehybrid",
        "mamba2_chunk_scan",
        lambda formula: lambda rate, x, steps: formula(rate, x, steps),
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_formula_is_found_by_the_measurement_and_the_model_refused(monkeypatch, mistake):
    name, kernel, plant = WRONG[mistake]
    formulas = dict(state_horizon._FORMULAS)
    if (wrong := plant(formulas.pop(kernel))) is not None:
        formulas[kernel] = wrong
    monkeypatch.setattr(state_horizon, "_FORMULAS", formulas)
    model, ids = build(name), tokens()
    answer = check(model)
    assert answer.ok
    assert answer.uncut_paths == answer.other_paths != ()
    with pytest.raises(InputError, match="carries information between them too"):
        posterity.measure(model, None, ids, context=LENGTH, losses=True, weights=False, progress=False)


def test_a_path_that_carries_little_is_found_too(monkeypatch):
    """One millionth of another position's input, added in a place that no formula covers."""
    model = build("lfm2")
    layer = model.model.layers[1].feed_forward
    forward = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda x: forward(x + 1e-6 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])
    )
    assert check(model).uncut_paths


KERNELS = {
    "qwen3_next": "torch_chunk_gated_delta_rule",
    "kimi_linear": "chunk_kimi_delta_attention",
    "granitemoehybrid": "mamba2_chunk_scan",
    "jamba": "mamba_selective_scan",
    "lfm2": "causal_conv1d_fn",
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_formula_is_its_kernel_beyond_one_chunk(monkeypatch, name):
    """The probe has 8 tokens, kernels have chunks of 64."""
    model = build(name, torch.float64)
    file = sys.modules[type(model).__module__]
    kernel, calls = getattr(file, KERNELS[name]), []

    def keep(*args, **kwargs):
        calls.append((args, kwargs))
        return kernel(*args, **kwargs)

    monkeypatch.setattr(file, KERNELS[name], keep)
    formula = state_horizon._FORMULAS[KERNELS[name]]
    with double():
        model(input_ids=torch.arange(70)[None] % 50 + 3, use_cache=False)
        args, kwargs = calls[0]
        leaves = [x.detach().requires_grad_() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        results = []
        for run in (kernel, lambda *x, **y: formula(1.0, *x, **y)):
            iterator = iter(leaves)
            args = [next(iterator) if isinstance(x, torch.Tensor) else x for x in args]
            kwargs = {key: next(iterator) if isinstance(x, torch.Tensor) else x for key, x in kwargs.items()}
            output = run(*args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            weights = torch.linspace(-1, 1, output.numel()).view_as(output)
            results.append([output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)])
    for actual, expected in zip(*reversed(results), strict=True):
        close(actual, expected)
