"""The hook of mkdocs.yml: links of the repository become links of the site.

Pages link to each other, and to files outside docs/, as GitHub shows them. Some files outside docs/ are pages
of the site as well; links to any other become links to the repository.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# The documents at the top of the repository that are pages of the site.
TOP_PAGES = ("ARCHITECTURE.md", "CHANGELOG.md", "SECURITY.md")

_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie at the top of the repository."""
    for name in TOP_PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Return the text of a page with links that are right in the site."""
    name = page.file.src_uri
    source = name if name in TOP_PAGES else f"docs/{name}"
    return links_for_site(markdown, source, name, str(config.repo_url))


def links_for_site(markdown: str, source: str, name: str, repository: str) -> str:
    """Return Markdown with links that are right in the site; what is in backticks stays.

    Args:
        source: the path of the document in the repository.
        name: the path of the page in the site's sources.
        repository: the address of the repository.
    """

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        return _in_site(target, posixpath.dirname(name), repository)

    pieces, end = [], 0
    for code in _CODE.finditer(markdown):
        pieces += [_LINK.sub(link, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, _LINK.sub(link, markdown[end:])])


def _in_site(target: str, folder: str, repository: str) -> str:
    """Return the link from a folder of the site to a file of the repository."""
    if target in TOP_PAGES:
        return posixpath.relpath(target, folder or ".")
    if target.startswith("docs/") and not target.endswith(".py"):
        return posixpath.relpath(target.removeprefix("docs/"), folder or ".")
    kind = "tree" if (ROOT / target).is_dir() else "blob"
    return f"{repository}/{kind}/main/{target}"
