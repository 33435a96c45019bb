import pytest

pytest.register_assert_rewrite("tests.hostile.target")  # what it asserts fails with the values, as in a test
