"""The list of what is installed: valid CycloneDX, and what is in the environment that it is made of."""

import json
import re
import subprocess
import sys
import venv
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest

pytest.importorskip("cyclonedx_py", reason="there is no cyclonedx_py: install the package cyclonedx-bom")

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.processes import ROOT


def needed() -> list[str]:
    """Return the names of the packages that ecavg depends on."""
    found = [re.match(r"[\w.-]+", each) for each in requires("ecavg") or () if "extra ==" not in each]
    return [each[0] for each in found if each]


def environment_of(names: list[str], folder: Path) -> tuple[Path, dict[str, str]]:
    """Make an environment in which these packages seem to be installed; return its Python and versions."""
    venv.create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    versions = {}
    for name in names:
        found = distribution(name)
        (metadata,) = {Path(str(found.locate_file(each))).parent for each in found.files or () if
                       str(each).endswith(".dist-info/METADATA")}  # fmt: skip
        (site / metadata.name).symlink_to(metadata)
        versions[found.metadata["Name"]] = found.version
    return folder / "bin/python", versions


def command(python: Path, output: Path) -> list[str]:
    """Return the command of `make sbom`, without the setting up of its own environment."""
    makefile = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", "")
    found = re.search(r"^sbom:.*\n\t\$\(BIN\)/python (-m cyclonedx_py .*)", makefile, re.MULTILINE)
    assert found
    places = {"sbom.json": str(output), "$(SBOM_PYTHON)": str(python)}
    return [sys.executable, *(places.get(word, word) for word in found[1].split())]


def test_bill_of_materials_has_what_is_installed(tmp_path: Path) -> None:
    python, versions = environment_of(needed(), tmp_path / "environment")
    assert len(versions) > 15
    subprocess.run(command(python, tmp_path / "sbom.json"), cwd=ROOT, check=True, capture_output=True)

    written = (tmp_path / "sbom.json").read_text("utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(written) is None
    bill = json.loads(written)
    assert (bill["metadata"]["component"]["name"], bill["specVersion"]) == ("ecavg", "1.6")
    assert {each["name"]: each["version"] for each in bill["components"]} == versions
