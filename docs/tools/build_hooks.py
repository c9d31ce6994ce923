"""What MkDocs calls while it builds the site: pages of the reference are made, and filled, from the installed code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

import reference

_MARK = re.compile(r"^<!-- generated: ([\w-]+) ?(.*?) -->$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every plugin has its page in the navigation, below the list of all components."""
    assert config.nav is not None
    below = _find(config.nav, "Plugins")
    below += [f"{reference.REFERENCE}/plugins/{plugin.name}.md" for plugin in reference.catalog().plugins]
    return config


def _find(nav: Any, title: str) -> Any:
    """The list of pages that stands under a title."""
    for entry in nav:
        for key, value in entry.items() if isinstance(entry, dict) else ():
            if key == title and isinstance(value, list):
                return value
            if isinstance(value, list) and (found := _find(value, title)) is not None:
                return found
    return None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """A page for each plugin."""
    for plugin in reference.catalog().plugins:
        uri = f"{reference.REFERENCE}/plugins/{plugin.name}.md"
        files.append(File.generated(config, uri, content=reference.plugin_page(plugin)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The parts that a page asks for; the README of an example is followed by the example's files."""
    if page.file.src_uri.startswith("examples/"):
        assert page.file.abs_src_path is not None
        markdown += reference.package_files(Path(page.file.abs_src_path).parent)
    return _MARK.sub(lambda mark: reference.PARTS[mark[1]](mark[2]), markdown)
