"""Lets pages link to files of the repository outside docs/, as they do on a code host.

A link such as `../SECURITY.md` leads to a file that MkDocs does not know. Every such file that a
page or the navigation names becomes part of the site, under `repository/`, and links are changed to
where it lies. A link to what does not exist stays as it is, and the strict build fails on it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PLACE = "repository"
LINK = re.compile(r"(?<=\]\()(?!\w+:|/|#)([^)\s#]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files that pages and the navigation name, and those that these name in turn."""
    root = Path(config.config_file_path).parent
    named = [root / uri.removeprefix(f"{PLACE}/") for uri in _leaves(config.nav) if _generated(uri)]
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    while pages or named:
        for page in pages:
            for link in LINK.findall(page.read_text("utf-8")):
                named.append(Path(os.path.normpath(page.parent / link)))
        pages = []
        for path in named:
            uri = _uri(path, root, Path(config.docs_dir))
            if _generated(uri) and path.is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
                if path.suffix == ".md":
                    pages.append(path)
        named = []
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point a page's links at where their files lie on the site."""
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    source = page.file.abs_src_path
    if source is None:
        return markdown
    here = os.path.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        uri = _uri(Path(os.path.normpath(Path(source).parent / match[1])), root, docs)
        if files.get_file_from_path(uri) is None:
            return match[1]
        return os.path.relpath(uri, here or ".").replace(os.sep, "/")

    return LINK.sub(moved, markdown)


def _uri(path: Path, root: Path, docs: Path) -> str:
    if path.is_relative_to(docs):
        return path.relative_to(docs).as_posix()
    return (
        f"{PLACE}/{path.relative_to(root).as_posix()}" if path.is_relative_to(root) else str(path)
    )


def _generated(uri: str) -> bool:
    return uri.startswith(f"{PLACE}/")


def _leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav or []
    return [leaf for part in parts for leaf in _leaves(part)]
