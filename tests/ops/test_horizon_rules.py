"""Horizon rules as factors by lag."""

from dataclasses import dataclass

import pytest
import torch

from posterity.errors import InputError
from posterity.ops.horizon_rules import Discount, EdgeWindow, Full, Leak, Myopic, factors_by_lag


class Halving:
    """A rule of one's own."""

    def factor(self, lag):
        return 0.5 ** lag.double()


@pytest.mark.parametrize(
    ("rule", "factors"),
    [
        (Myopic(), [1, 0, 0, 0]),
        (Discount(0.5), [1, 0.5, 0.25, 0.125]),
        (Halving(), [1, 0.5, 0.25, 0.125]),
        (EdgeWindow(2), [1, 1, 1, 0]),
        (Leak(0.25), [1, 0.25, 0.25, 0.25]),
    ],
)
def test_a_rule_is_a_factor_for_every_lag(rule, factors):
    assert factors_by_lag(rule, 4, torch.empty(0)).tolist() == factors


@pytest.mark.parametrize("rule", [Full(), Discount(1), EdgeWindow(9), Leak(1)])
def test_factors_that_are_all_one_are_none(rule):
    assert factors_by_lag(rule, 4, torch.empty(0)) is None


@dataclass
class Outdated:
    """A rule with the method's former name."""

    def weight(self, lag):
        return torch.ones_like(lag, dtype=torch.float64)


def test_a_rule_with_the_former_method_is_told_the_name_of_the_new_one():
    with pytest.raises(InputError, match=r"got Outdated\(\): the method of a rule is factor\(lag\), no longer weight"):
        factors_by_lag(Outdated(), 4, torch.empty(0))


@pytest.mark.parametrize("rule", [Myopic, None, 0.9])
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(InputError, match=r"expected a horizon such as Myopic\(\), .* or EdgeWindow\(16\); got [^:]*$"):
        factors_by_lag(rule, 4, torch.empty(0))
