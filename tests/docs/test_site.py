"""The documentation site: it is built without warnings, and shows its pages without a network."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="there is no mkdocs: install the package mkdocs-material")

from docs import site_hook
from tests.processes import ROOT

REPOSITORY = "https://host.example/us/it"
# What a browser loads by itself when it shows a page.
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"?(https?:[^\" >]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert built.stdout + built.stderr == ""
    return folder


def test_site_has_a_page_for_each_document(site: Path) -> None:
    documents = {page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")}
    pages = {"index.html", *(f"{name.with_suffix('.html')}" for name in documents)} - {"README.html"}
    pages |= {name.replace(".md", ".html") for name in site_hook.TOP_PAGES}
    assert {str(page.relative_to(site)) for page in site.rglob("*.html")} == pages | {"404.html"}


def test_pages_load_nothing_from_other_servers(site: Path) -> None:
    addresses = {found for page in site.rglob("*.html") for found in LOADED.findall(page.read_text("utf-8"))}
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Homepage"]
    assert {address for address in addresses if not address.startswith(ours)} == set()
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import", style.read_text("utf-8"))


def test_tables_and_links_of_the_repository_are_shown(site: Path) -> None:
    configuration = (site / "configuration.html").read_text("utf-8")
    assert configuration.count("<table") >= 7
    deployment = (site / "deployment.html").read_text("utf-8")
    assert "/tree/main/deploy/kubernetes" in deployment
    assert "/blob/main/deploy/Dockerfile" in deployment


@pytest.mark.parametrize(
    ("source", "name", "markdown", "link"),
    [
        ("docs/data.md", "data.md", "[a](models.md#b)", "[a](models.md#b)"),
        ("docs/data.md", "data.md", "[a](#b)", "[a](#b)"),
        ("docs/data.md", "data.md", "[a](https://b.example)", "[a](https://b.example)"),
        ("docs/data.md", "data.md", "[a](../SECURITY.md#b)", "[a](SECURITY.md#b)"),
        ("docs/data.md", "data.md", "[a](../deploy)", f"[a]({REPOSITORY}/tree/main/deploy)"),
        ("docs/data.md", "data.md", "[a](../README.md#demo)", f"[a]({REPOSITORY}/blob/main/README.md#demo)"),
        ("docs/data.md", "data.md", "`[a](../deploy)`", "`[a](../deploy)`"),
        ("docs/internals/disk.md", "internals/disk.md", "[a](../data.md)", "[a](../data.md)"),
        ("docs/internals/disk.md", "internals/disk.md", "[a](../../SECURITY.md)", "[a](../SECURITY.md)"),
        ("SECURITY.md", "SECURITY.md", "[a](docs/internals/disk.md)", "[a](internals/disk.md)"),
        ("SECURITY.md", "SECURITY.md", "![a](docs/img/status-page.png)", "![a](img/status-page.png)"),
    ],
)
def test_links_are_right_in_the_site(source: str, name: str, markdown: str, link: str) -> None:
    assert site_hook.links_for_site(markdown, source, name, REPOSITORY) == link


def test_site_links_to_the_repository_of_the_package() -> None:
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Homepage"]
    assert f"\nrepo_url: {ours}\n" in (ROOT / "mkdocs.yml").read_text("utf-8")
