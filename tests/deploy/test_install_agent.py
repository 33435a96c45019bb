"""The script that installs an agent as a service, in a folder that stands for the root of a device."""

import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

from ecavg.edge_agent.config import AgentConfig
from tests.processes import ROOT

SCRIPT = ROOT / "deploy/install-agent.sh"
SERVER = "cloud.example:50051"
WHEELS_FOR_CPUS = "https://download.pytorch.org/whl/cpu"


def install(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", SCRIPT, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def wheel(folder: Path, version: str) -> Path:
    """Write a wheel of a package that needs no other one and has the agent's command."""
    path, info = folder / f"stub-{version}-py3-none-any.whl", f"stub-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("stub.py", f"def main():\n    print('{version}')\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: stub\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", "[console_scripts]\nedge-agent = stub:main\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def files_of(folder: Path) -> dict[str, tuple[int, str]]:
    """Return the mode and the content of each file below etc/."""
    found = [path for path in (folder / "etc").rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): (path.stat().st_mode & 0o777, path.read_text("utf-8"))
        for path in found
    }


def test_device_gets_program_configuration_token_and_unit(tmp_path: Path) -> None:
    root, token = tmp_path / "root", tmp_path / "token.txt"
    token.write_text("ecavg1.secret\n", "utf-8")
    words = ("--server", SERVER, "--root", root, "--torch-index", "")
    first = install(*words, "--package", wheel(tmp_path, "1.0"), "--token-file", token)
    assert first.returncode == 0, first.stderr
    unit = (ROOT / "deploy/systemd/edge-agent.service").read_text("utf-8")
    assert files_of(root) == {
        "etc/ecavg/edge-agent.toml": (0o644, f'server = "{SERVER}"\n'),
        "etc/ecavg/join-token": (0o600, "ecavg1.secret\n"),
        "etc/systemd/system/edge-agent.service": (0o644, unit),
    }
    settings = tomllib.loads((root / "etc/ecavg/edge-agent.toml").read_text("utf-8"))
    assert AgentConfig.model_validate(settings).server == SERVER
    assert "secret" not in first.stdout + first.stderr
    # What the unit starts is where the script puts it.
    assert "ExecStart=/opt/ecavg/bin/edge-agent --config /etc/ecavg/edge-agent.toml" in unit
    assert "LoadCredential=join-token:/etc/ecavg/join-token" in unit

    # Another run updates the program, and keeps what the device's owner has written.
    own = f'server = "{SERVER}"\ndata = "/srv/images"\n'
    (root / "etc/ecavg/edge-agent.toml").write_text(own, "utf-8")
    (root / "etc/ecavg/join-token").write_text("", "utf-8")
    second = install(*words, "--package", wheel(tmp_path, "2.0"))
    assert second.returncode == 0, second.stderr
    assert files_of(root)["etc/ecavg/edge-agent.toml"] == (0o644, own)
    assert files_of(root)["etc/ecavg/join-token"] == (0o600, "")
    said = subprocess.run([root / "opt/ecavg/bin/edge-agent"], capture_output=True, text=True, check=True)
    assert said.stdout == "2.0\n"


def test_dry_run_says_every_step_and_does_none(tmp_path: Path) -> None:
    found = install("--server", SERVER, "--root", tmp_path / "root", "--dry-run")
    assert found.returncode == 0, found.stderr
    assert list(tmp_path.iterdir()) == []
    steps = found.stdout.replace(str(tmp_path / "root"), "").splitlines()
    assert steps == [
        "+ python3 -m venv /opt/ecavg",
        f"+ /opt/ecavg/bin/pip install --upgrade --index-url {WHEELS_FOR_CPUS} torch torchvision",
        f"+ /opt/ecavg/bin/pip install --upgrade {ROOT}",
        "+ install -d -m 755 /etc/ecavg /etc/systemd/system",
        "+ write /etc/ecavg/edge-agent.toml (mode 644)",
        "+ write /etc/ecavg/join-token (mode 600)",
        "+ write /etc/systemd/system/edge-agent.service (mode 644)",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "--server is missing"),
        (("--server",), "--server needs a value"),
        (("--server", "cloud.example"), "--server must be HOST:PORT, not cloud.example"),
        (("--server", 'a"\nb:1'), "--server must be HOST:PORT"),
        (("--server", SERVER, "--token-file", "/nowhere"), "/nowhere cannot be read"),
        (("--faster",), "unknown option: --faster"),
    ],
)
def test_wrong_use_is_one_line_and_changes_nothing(words: tuple[str, ...], line: str, tmp_path: Path) -> None:
    found = install(*words, *(("--root", tmp_path / "root") if len(words) != 1 else ()))
    assert found.returncode == 2
    assert f"install-agent.sh: {line}" in found.stderr
    assert not (tmp_path / "root").exists()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    found = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, check=False)
    assert found.stdout + found.stderr == ""
