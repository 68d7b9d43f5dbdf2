"""The site of the pages: it builds, strictly, and every page is in it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.house.test_contracts import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: pip install -e '.[docs]'"
)


def _build(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--site-dir", str(folder), *more]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_site_builds_and_holds_every_page(tmp_path: Path) -> None:
    done = _build(tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    outside = [Path(name) for name in ("index.html", "CONTRIBUTING.html", "CHANGELOG.html", "packaged-embedder.html")]
    assert [str(page) for page in [*pages, *outside] if not (tmp_path / "site" / page).is_file()] == []


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    """To a page that is not there, and to an anchor that a page does not have: each is a warning, which is an error."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Here\n\n[there](nothing.md) and [there](glossary.md#no)\n", encoding="utf-8")
    (docs / "glossary.md").write_text("# Glossary\n", encoding="utf-8")
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[0]
    text = text.replace("docs_dir: docs", f"docs_dir: {docs}").replace("hooks: [docs/hooks.py]\n", "")
    config = tmp_path / "mkdocs.yml"
    config.write_text(text, encoding="utf-8")
    done = _build(tmp_path / "site", "--config-file", str(config))
    assert done.returncode != 0
    for link in ("nothing.md", "#no"):
        assert re.search(f"WARNING.*{link}'", done.stdout + done.stderr)
    assert "2 warnings in strict mode" in done.stdout + done.stderr
