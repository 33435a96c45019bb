"""`make release`: build wheel and sdist, and try the wheel as a user would, on every Python that is here.

For each Python the wheel is installed into an empty environment, outside of the checkout. From there the
commands do a round of the demo.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
PYTHONS = ("python3.11", "python3.12", "python3.13")


def main() -> int:
    """Build, try, and print a line for each Python; return 1 if one of them failed."""
    shutil.rmtree(DIST, ignore_errors=True)
    # The wheel is built from the sdist, so that a file that the sdist lacks is missed here.
    _run([sys.executable, "-m", "build", "--quiet", "--outdir", DIST, ROOT], ROOT)
    (wheel,) = DIST.glob("*.whl")
    failed = [python for python in PYTHONS if _starts(python) and not _works(python, wheel)]
    return 1 if failed else 0


def _starts(python: str) -> bool:
    """Return True if there is a Python of this name, and say so if there is none."""
    if shutil.which(python) and not subprocess.run([python, "--version"], capture_output=True).returncode:
        return True
    print(f"{python}: not tried, it is not installed")
    return False


def _works(python: str, wheel: Path) -> bool:
    """Install the wheel and do a round with it; print what came of it."""
    with TemporaryDirectory() as folder:
        bin_dir = Path(folder) / "venv/bin"
        try:
            _run([python, "-m", "venv", bin_dir.parent], folder)
            _run([bin_dir / "pip", "install", "--quiet", "--disable-pip-version-check", wheel], folder)
            version = _run([bin_dir / "cloud-server", "--version"], folder).strip()
            shutil.copy(ROOT / "experiments/demo.py", folder)
            _run([bin_dir / "python", "demo.py"], folder)
        except subprocess.CalledProcessError as error:
            print(f"{python}: {' '.join(map(str, error.cmd))} failed:\n{error.stdout}{error.stderr}")
            return False
    print(f"{python}: {version}, a round of the demo was done")
    return True


def _run(command: Sequence[str | Path], folder: str | Path) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
