"""The tests of the project, in folders as the packages they test; what tests share is in `tests.support`."""

import pytest

pytest.register_assert_rewrite("tests.support")
