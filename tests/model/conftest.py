"""What the tests of the model build their cases from."""

import pytest

from unets import Toolbox


@pytest.fixture
def tools():
    return Toolbox()
