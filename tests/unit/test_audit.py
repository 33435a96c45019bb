"""What `make check` makes of pip-audit's answers."""

import json
from typing import Any

import pytest

from tests.hostile.audit import verdict

GOOD: Any = {"name": "good", "version": "1.0", "vulns": []}
BAD: Any = {"name": "bad", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}]}
OWN: Any = {"name": "own", "skip_reason": "not found on PyPI"}


def answer(*packages: Any) -> str:
    return json.dumps({"dependencies": packages})


@pytest.mark.parametrize(
    ("stdout", "stderr", "code", "says"),
    [
        (answer(GOOD), "", 0, "1 packages, no known vulnerabilities"),
        (answer(GOOD, OWN), "", 0, "not audited: own"),
        (answer(GOOD, BAD, OWN), "", 1, "bad 1.0: CVE-1, fixed in 1.1"),
        (answer(OWN, OWN), "", 0, "NOT AUDITED"),
        ("", "requests.exceptions.ConnectionError: ...", 0, "NOT AUDITED"),
        ("", "Traceback: something else", 1, "something else"),
    ],
)
def test_only_a_service_out_of_reach_is_passed_over(stdout: str, stderr: str, code: int, says: str) -> None:
    found, text = verdict(stdout, stderr)
    assert found == code
    assert says in text
