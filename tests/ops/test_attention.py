"""The operator against dense attention written down in the reference, and against torch's own."""

from functools import partial

import pytest
import torch
from jaxtyping import TypeCheckError
from support.attention_cases import BIASES, DIM, DIM_V, HEADS, LENGTHS, MASKS, leaves, mask_case
from support.reference import dense_attention
from torch import nn

from posterity.errors import InputError
from posterity.ops.attention import attention
from posterity.ops.heads import sum_heads
from posterity.ops.horizon_rules import Discount, Full
from posterity.ops.mask import Mask
from posterity.ops.precision import dot


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dim_v", [DIM_V, DIM])
@pytest.mark.usefixtures("small_blocks")
def test_output_and_gradients_equal_dense_attention(length, name, softcap, sinks, dim_v):
    query, key, value, sink = leaves(length, dim_v, sinks)
    mask, allowed, _ = mask_case(name, length)
    ours = attention(query, key, value, 0.7, mask=mask, softcap=softcap, sinks=sink)
    dense = dense_attention(query, key, value, 0.7, allowed, softcap, sink)[0]
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12)
    inputs = [x for x in (query, key, value, sink) if x is not None]
    grad = torch.randn_like(ours)
    for actual, expected in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(dense, inputs, grad), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [1, 3, 8, 9])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("name", ["plain", "window"])
@pytest.mark.usefixtures("small_blocks")
def test_gradcheck(length, contiguous, name):
    query, key, value, sinks = leaves(length, sinks=name != "plain", batch=1)
    if not contiguous:
        query, key, value = (x.detach().mT.contiguous().mT.requires_grad_() for x in (query, key, value))
        assert length == 1 or not query.is_contiguous()
    mask = mask_case(name, length, 1)[0]

    def run(query, key, value, sinks):
        return attention(query, key, value, mask=mask, softcap=None if name == "plain" else 2.0, sinks=sinks)

    assert torch.autograd.gradcheck(run, (query, key, value, sinks))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", BIASES)
@pytest.mark.parametrize(("name", "softcap"), [("plain", None), ("plain", 1.5), ("left padding", None)])
@pytest.mark.parametrize("horizon", [Full(), Discount(0.5)])
@pytest.mark.usefixtures("small_blocks")
def test_a_bias_and_sinks_of_each_query_have_the_gradients_of_dense_attention(length, shape, name, softcap, horizon):
    """A horizon is about keys and values: it leaves the gradient of a bias, of sinks and of queries as it is."""
    query, key, value, _ = leaves(length)
    bias, sinks = (torch.randn(size).double().requires_grad_() for size in (BIASES[shape](length), (2, HEADS, length)))
    mask, allowed, _ = mask_case(name, length)
    ours = attention(
        query, key, value, 0.7, mask=mask, softcap=softcap, sinks=sinks, bias=bias, horizon=lambda: (horizon, horizon)
    )
    dense = dense_attention(query, key, value, 0.7, allowed, softcap, sinks, bias)[0]
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12)
    inputs = (query, sinks, bias, *((key, value) if horizon == Full() else ()))
    grad = torch.randn_like(ours)
    for actual, expected in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(dense, inputs, grad), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [1, 3, 8, 9])
@pytest.mark.parametrize("shape", BIASES)
@pytest.mark.usefixtures("small_blocks")
def test_gradcheck_with_a_bias(length, shape):
    inputs = (
        *leaves(length)[:3],
        *(torch.randn(size).double() for size in ((2, HEADS, length), BIASES[shape](length))),
    )
    # half of the heads and two numbers of each: every entry of the gradient is compared, in a fifth of the time
    query, key, value = (x[:, : x.shape[1] // 2, :, :2].detach().requires_grad_() for x in inputs[:3])
    sinks, bias = (x[:, : HEADS // 2].requires_grad_() for x in inputs[3:])

    def run(query, key, value, sinks, bias):
        return attention(query, key, value, softcap=2.0, sinks=sinks, bias=bias)

    assert torch.autograd.gradcheck(run, (query, key, value, sinks, bias))


def test_a_bias_that_does_not_fit_is_refused():
    query, key, value, _ = leaves(5)
    with pytest.raises(InputError, match=r"broadcasts to \[2, 4, 5, 5\]; got \[2, 3, 5, 5\]"):
        attention(query, key, value, bias=torch.zeros(2, 3, 5, 5).double())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("groups", "size"), [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("name", ["plain", "window", "left padding"])
@pytest.mark.usefixtures("small_blocks")
def test_chosen_keys_are_the_only_edges(length, groups, size, name):
    mask, allowed, readers = mask_case(name, length)
    selection = torch.randint(-1, -(-length // size), (2, groups, length, 3))
    blocks = torch.arange(length) // size
    selected = (selection[..., None] == blocks).any(3).repeat_interleave(HEADS // groups, 1) & allowed
    query, key, value, _ = leaves(length)
    limited = mask.select_keys(selection, HEADS, size)
    ours = attention(query, key, value, 0.7, mask=limited)
    torch.testing.assert_close(ours, dense_attention(query, key, value, 0.7, selected)[0], rtol=1e-10, atol=1e-12)
    counted = allowed[:, 0]
    if readers is not None:
        counted = counted & readers[:, :, None]
    lags = torch.stack([counted.diagonal(-lag, 1, 2).sum(-1) for lag in range(length)], -1)
    assert (limited.edges(length, query.device) == lags).all()
    blind = ~selected.any(-1) if readers is None else ~selected.any(-1) & readers[:, None]
    assert limited.has_blind_query(length, length, query.device) == blind.any()


def test_a_mask_can_be_taken_whole_and_not_in_part():
    mask = Mask()
    assert mask[:, :, 0:, :] is mask
    for index in ((slice(None), 0), (slice(None), slice(None), slice(-99, None)), 0):
        with pytest.raises(TypeError, match="logits_to_keep=0"):
            mask[index]


@pytest.mark.parametrize("length", [1, 100, 129, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_attention_equals_scaled_dot_product_attention(length, dtype):
    query, key, value, _ = leaves(length, DIM, dtype=dtype)
    ours = attention(query, key, value)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    grad = torch.randn_like(ours)
    for actual, expected in zip(
        (ours, *torch.autograd.grad(ours, (query, key, value), grad)),
        (theirs, *torch.autograd.grad(theirs, (query, key, value), grad)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("small_blocks")
def test_fewer_queries_than_keys_stand_at_the_end():
    query, key, value, _ = leaves(21)
    output = attention(query, key, value)
    torch.testing.assert_close(attention(query[:, :, 13:], key, value), output[:, :, 13:], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_outside_the_band_are_never_touched():
    mask = Mask(lambda query, key: (key <= query) & (query - key < 3))
    lags = [
        tile.lag - tile.columns.stop + tile.columns.start
        for _, row in mask.tiles(64, 64, torch.device("cpu"))
        for tile in row
    ]
    assert max(lags) < 3
    assert sum(len(row) for _, row in mask.tiles(64, 64, torch.device("cpu"))) <= 2 * 64 // 4


def test_a_mask_that_looks_ahead_is_refused():
    query, key, value, _ = leaves(5)
    with pytest.raises(InputError, match="later keys"):
        attention(query, key, value, mask=Mask(lambda query, key: key <= query + 1))


def test_shapes_that_do_not_fit_are_refused_by_name():
    query, key, value, _ = leaves(5)
    with pytest.raises(InputError, match=r"head a multiple of group; got \[2, 3, 5, 5\]"):
        attention(query[:, :3], key, value)
    with pytest.raises(InputError, match="5 queries, 4 keys"):
        attention(query, key[:, :, :4], value[:, :, :4])


def test_shape_checks_are_on():
    with pytest.raises(TypeCheckError):
        attention(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))


def test_a_call_that_passed_the_shape_checks_lets_no_other_pass():
    x = torch.zeros(1, 4, 3, 2)
    sum_heads(x, 2)
    for args in ((x[0], 2), (x.int(), 2), (x.tolist(), 2), (x, "2")):
        with pytest.raises(TypeCheckError):
            sum_heads(*args)
    dot(x, x)
    with pytest.raises(TypeCheckError):
        dot(x, torch.zeros(1, 4, 3, 5))


def test_under_autocast_it_takes_what_fused_attention_takes():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3))
    grad = torch.randn(2, 4, 9, 8).bfloat16()
    results = []
    for function in (attention, partial(nn.functional.scaled_dot_product_attention, is_causal=True)):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(query, key, value.bfloat16())  # rotary embedding leaves queries and keys in float32
        results.append((out, *torch.autograd.grad(out, (query, key, value), grad)))
    assert results[0][0].dtype == torch.bfloat16
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    wide = query.double(), key.double(), value.double()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attention(*wide), attention(*wide), rtol=0, atol=0)
        assert attention(*wide).dtype == torch.float64


@pytest.mark.parametrize("rule", [Full(), Discount(0.5)])
def test_a_backward_pass_under_autocast_keeps_its_precision(rule):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3)]
    grad, gradients, passes = torch.randn(1, 2, 9, 8), [], []
    for enabled in (False, True):
        out = attention(*inputs, horizon=lambda: (rule, rule), observe=passes.append)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(out, inputs, grad))
    assert all(map(torch.equal, *gradients))
    assert torch.equal(passes[0].grad_key, passes[1].grad_key)


@pytest.mark.parametrize("late", [(0, 150), (3, 299), (127, 128), (130, 256), (298, 299)])
def test_a_mask_with_a_single_later_key_is_refused_wherever_it_is(late):
    query, later = late

    def allowed(i, j):
        return (j <= i) | ((i == query) & (j == later))

    x = torch.randn(1, 1, 300, 4)
    with pytest.raises(InputError, match="later keys"):
        attention(x, x, x, mask=Mask(allowed))
