"""Results that the tests of this folder share; none changes them."""

import pytest
from support.page_results import hostile_result, loss_result
from support.sample import sample


@pytest.fixture(scope="session")
def plain():
    return sample()


@pytest.fixture(scope="session")
def hostile():
    return hostile_result()


@pytest.fixture(scope="session")
def paid():
    return loss_result()
