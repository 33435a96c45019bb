"""Cases that `make test` leaves to `make soak`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def others_soak(cases: Iterable[Any], at_once: Collection[Any]) -> list[Any]:
    """Return the cases for `pytest.mark.parametrize`, all but some of them marked for `make soak`.

    Args:
        cases: a tuple of arguments for each case, or the only argument.
        at_once: the cases that `make test` does.
    """
    cases = list(cases)
    assert all(case in cases for case in at_once)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=() if case in at_once else pytest.mark.soak
        )
        for case in cases
    ]
