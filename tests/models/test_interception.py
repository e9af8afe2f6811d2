"""The registry of interceptors: the innermost in force answers a call, and none is left behind."""

import threading

import pytest
import torch
from support.tiny import tiny, tokens

from posterity import as_linear
from posterity.models.attach import watch_model
from posterity.models.interception import intercept, interceptions, interceptor_of
from posterity.models.interface import switch_attention
from posterity.models.watch import Watch


class Zero:
    """Gives zeros, and counts its calls."""

    calls = 0

    def attend(self, call):
        self.calls += 1
        return call.zero_output()


@pytest.fixture
def module():
    return torch.nn.Linear(2, 2)


def test_the_innermost_interceptor_answers_and_the_outer_one_comes_back(module):
    outer, inner = Zero(), Zero()
    assert interceptor_of(module) is None
    with intercept([module], outer):
        with intercept([module, module], inner):
            assert interceptor_of(module) is inner
        assert interceptor_of(module) is outer
        with pytest.raises(RuntimeError), intercept([module], inner):
            raise RuntimeError
        assert interceptor_of(module) is outer
    assert not any(interceptions.values())


def test_interceptors_may_end_in_any_order(module):
    outer, inner = Zero(), Zero()
    first, second = intercept([module], outer), intercept([module], inner)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert interceptor_of(module) is inner
    second.__exit__(None, None, None)
    assert interceptor_of(module) is None


def test_one_thread_may_run_a_module_again_while_others_go_on(module):
    everywhere, here, elsewhere = Zero(), Zero(), []
    with intercept([module], everywhere), intercept([module], here, this_thread=True):
        thread = threading.Thread(target=lambda: elsewhere.append(interceptor_of(module)))
        thread.start()
        thread.join()
        assert interceptor_of(module) is here
    assert elsewhere == [everywhere]


def test_a_module_that_is_gone_leaves_no_entry():
    before = len(interceptions)
    with intercept([torch.nn.Linear(2, 2)], Zero()):
        assert len(interceptions) == before + 1
    assert len(interceptions) == before


def test_only_calls_of_the_intercepted_modules_are_answered():
    model, ids, zero = tiny("llama"), tokens(), Zero()
    with torch.no_grad(), switch_attention(model, "posterity"):
        plain = model(input_ids=ids).logits
        with intercept([model.model.layers[1].self_attn], zero):
            changed = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert zero.calls == 1
    assert not torch.allclose(changed, plain)


def test_a_module_is_read_off_inside_a_watch_and_the_watch_goes_on():
    model = tiny("llama")
    module = model.model.layers[1].self_attn
    outside = as_linear(module)
    with watch_model(model) as watch:
        assert torch.equal(as_linear(module).weight, outside.weight)
        assert interceptor_of(module) is watch
        with watch_model(model) as inner:
            assert inner is watch
    assert isinstance(watch, Watch)
    assert not any(interceptions.values())
