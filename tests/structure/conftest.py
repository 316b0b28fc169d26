"""Set-up of the tests of structure."""

import pytest

from tests.threads import one_thread


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    with one_thread():
        yield
