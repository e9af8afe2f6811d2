"""Any input either works or is refused in one line: what hypothesis makes of each target in hostile.py."""

import pytest
from hypothesis import HealthCheck, given, settings
from support.hostile import TARGETS

QUICK = {"results, changed by h5py": 15, "sealed results, bytes changed": 20, "command lines": 60}
SLOW = {"results, changed by h5py": 25}  # each takes more than a second
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def fuzz(name: str, number: int, *, always_the_same: bool) -> None:
    use, inputs = TARGETS[name]
    profile = settings(max_examples=number, derandomize=always_the_same, deadline=None, database=None,
                       suppress_health_check=CHECKS)  # fmt: skip

    def law(example):
        use(example)

    profile(given(inputs)(law))()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_any_input_works_or_is_refused_in_one_line(name):
    fuzz(name, QUICK.get(name, 100), always_the_same=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_many_inputs_work_or_are_refused_in_one_line(name):
    fuzz(name, SLOW.get(name, 10 * QUICK.get(name, 200)), always_the_same=False)
