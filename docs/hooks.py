"""What the site needs beyond MkDocs: pages that stand outside of docs/, and docstrings in Markdown.

The README is the site's first page. Links are written for a reader of the repository, and made to
fit the site here, so that they work in both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "bench/notes.md")
ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):`~?\.?([^`]+)`")


def on_files(files: Any, config: Any) -> Any:
    """Adds the README as the first page, the pages outside of docs/, and the examples."""
    root = Path(config.config_file_path).parent
    files.append(File.generated(config, "index.md", content=(root / "README.md").read_text()))
    examples = [str(path.relative_to(root)) for path in sorted((root / "examples").glob("*.py"))]
    for name in (*OUTSIDE, *examples):
        files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are from docs/ on, whatever folder the page is in."""
    up = "../" * page.file.src_uri.count("/")
    if page.file.src_uri == "index.md" or page.file.src_uri in OUTSIDE:
        return markdown.replace(f"]({up}docs/", f"]({up}")
    return markdown.replace("](../", "](")


class Roles(griffe.Extension):
    """Docstrings name things as Sphinx does (``:class:`X```); Markdown has code for that."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that was found in the source."""
        if obj.docstring:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = text.replace("``", "`")
