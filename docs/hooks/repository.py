"""Files of the repository outside docs/ that pages lead to, as part of the site.

A hook of MkDocs. README files that are worth a page become one; whatever else a link names is
copied. So a link that is right in a checkout is right on the site, and a wrong one fails the build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

MIRRORED = {
    "cluster/README.md": "cluster.md",
    "CHANGELOG.md": "changelog.md",
    "DECISIONS.md": "decisions.md",
}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|/|#)([^)\s#]+)")
_FENCED = re.compile(r"(^[ \t]*```.*?^[ \t]*```[ \t]*$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the mirrored pages, and the files that pages lead to."""
    root = Path(config.config_file_path).parent
    for source, path in MIRRORED.items():
        files.append(File.generated(config, path, content=(root / source).read_text("utf-8")))
    linked: set[str] = set()
    for file in files.documentation_pages():
        linked |= _list_outside(file, root)
    for target in sorted(linked - set(MIRRORED)):
        copied = File.generated(config, _place(target), abs_src_path=str(root / target))
        files.append(copied)
    return files


def on_page_markdown(
    markdown: str,
    page: Page,
    config: MkDocsConfig,
    files: Files,  # noqa: ARG001
) -> str:
    """Turn links to the repository into links within the site."""
    root = Path(config.config_file_path).parent
    here = posixpath.dirname(page.file.src_uri)

    def turn(match: re.Match[str]) -> str:
        target = _resolve(match[1], page.file, root)
        if target is None:
            return match[1]
        return posixpath.relpath(_place(target), here or ".")

    pieces = _FENCED.split(markdown)
    return "".join(p if place % 2 else _LINK.sub(turn, p) for place, p in enumerate(pieces))


def _place(target: str) -> str:
    """Where a file of the repository lies on the site."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target in MIRRORED:
        return MIRRORED[target]
    # A page that nobody put into the navigation would be reported as forgotten.
    return f"repository/{target}{'.txt' if target.endswith('.md') else ''}"


def _list_outside(file: File, root: Path) -> set[str]:
    text = _FENCED.sub("", file.content_string)
    found = (_resolve(match[1], file, root) for match in _LINK.finditer(text))
    return {target for target in found if target is not None and not target.startswith("docs/")}


def _resolve(link: str, file: File, root: Path) -> str | None:
    """Path in the repository of a link that crosses the border of docs/ to a file; else None."""
    sources = {path: source for source, path in MIRRORED.items()}
    source = sources.get(file.src_uri, f"docs/{file.src_uri}")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if target.startswith("..") or (target.startswith("docs/") and source.startswith("docs/")):
        return None
    return target if (root / target).is_file() else None
