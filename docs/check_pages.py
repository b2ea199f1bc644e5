"""Check built pages, without the network: ``python docs/check_pages.py docs/_build/html``.

Every link to another page or file, every anchor and every image must be there. Sphinx checks only the links that it
makes itself.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Attributes that lead elsewhere, by element.
LINKS = {"a": "href", "link": "href", "img": "src", "script": "src", "source": "src", "object": "data"}


@dataclass
class Page(HTMLParser):
    """What a page leads to, and the anchors that it has."""

    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=lambda: {"", "top"})

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the link and the anchor of an element."""
        attributes = dict(attrs)
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        link = attributes.get(LINKS.get(tag, ""))
        if link is not None:
            self.links.append(link)


def read_page(path: Path) -> Page:
    """Parse a page."""
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page


def find_broken(folder: Path) -> list[str]:
    """Describe every link, anchor and image of the pages in the folder that leads nowhere."""
    folder = folder.resolve()
    pages = {path: read_page(path) for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts}
    return [
        f"{path.relative_to(folder)}: {link!r} {problem}"
        for path, page in pages.items()
        for link in page.links
        if (problem := _problem(link, path, folder, pages)) is not None
    ]


def _problem(link: str, path: Path, folder: Path, pages: dict[Path, Page]) -> str | None:
    """Say what is wrong with a link of the page at ``path``, if anything."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
    if not target.is_relative_to(folder):
        return "leads out of the documentation"
    if not target.is_file():
        return "leads to no file"
    if target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return "has no such anchor"
    return None


def main() -> None:
    """Check the folder named on the command line."""
    if len(sys.argv) != 2 or not list(Path(sys.argv[1]).glob("*.html")):
        sys.exit(f"Pass the folder of the built pages; found {sys.argv[1:]}. Run `make docs` first.")
    broken = find_broken(Path(sys.argv[1]))
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
