"""Pages of the site that lie outside docs/, and links between them. Used by mkdocs.yml; `make docs` builds the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = {  # in the repository -> in the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "LICENSE": "LICENSE.txt",
    "regen_dist/pretrained/pocket/README.md": "packaged-embedder.md",
}
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)((?:#[^)]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of other folders."""
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that are right in the repository at the pages of the site. A strict build fails at any other."""
    site = page.file.src_uri
    source = next((path for path, target in OUTSIDE.items() if target == site), f"docs/{site}")

    def pointed(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        target = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else path)
        return link[1] + posixpath.relpath(target, posixpath.dirname(site) or ".") + link[3]

    return LINK.sub(pointed, markdown)
