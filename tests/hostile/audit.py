"""`python -m tests.hostile.audit`: installed packages with known vulnerabilities, by pip-audit.

It asks a service on the network. Where that cannot be reached, and only then, nothing is audited, and the
one line that is printed says so.
"""

import json
import subprocess
import sys
from typing import Any

_UNREACHABLE = (
    "ConnectionError",
    "NameResolutionError",
    "ConnectTimeout",
    "ReadTimeout",
    "ProxyError",
    "SSLError",
)


def verdict(stdout: str, stderr: str) -> tuple[int, str]:
    """Exit code and what to print, from what `pip-audit --format json` has printed."""
    try:
        packages: list[dict[str, Any]] = json.loads(stdout)["dependencies"]
    except (ValueError, KeyError):
        if any(name in stderr for name in _UNREACHABLE):
            return 0, "pip-audit: NOT AUDITED: its service cannot be reached from here"
        return 1, f"pip-audit failed:\n{stderr}"
    bad = [(package, vulnerability) for package in packages for vulnerability in package.get("vulns", ())]
    if bad:
        lines = [
            f"{package['name']} {package['version']}: {vulnerability['id']},"
            f" fixed in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
            for package, vulnerability in bad
        ]
        return 1, "\n".join(["pip-audit: known vulnerabilities", *lines])
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if len(skipped) == len(packages):  # a mirror of the packages alone: it knows of no vulnerabilities
        return (
            0,
            f"pip-audit: NOT AUDITED: the index here has no answer about any of {len(packages)} packages",
        )
    note = f"; not on PyPI, so not audited: {', '.join(skipped)}" if skipped else ""
    return 0, f"pip-audit: {len(packages) - len(skipped)} packages, no known vulnerabilities{note}"


def main() -> int:
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--format",
        "json",
        "--progress-spinner",
        "off",
        "--skip-editable",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    code, text = verdict(done.stdout, done.stderr)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
