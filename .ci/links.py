"""Check the links of built HTML pages, offline.

Local links, pictures, scripts and anchors must lead somewhere. Links to other sites must be well
formed; what a page loads (scripts, styles, pictures) must lie beside it.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src"}
PASSIVE = {"canonical", "author", "license", "index", "search", "next", "prev"}  # of <link rel=…>


class Page(HTMLParser):
    """The anchors of a page and its links, each with its line."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[int, str, bool]] = []  # line, address, whether the page loads it
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        line = self.getpos()[0]
        if tag == "a" and "href" in given:
            self.links.append((line, given["href"], False))
        elif tag in LOADED and given.get(LOADED[tag]):
            loads = tag != "link" or given.get("rel", "") not in PASSIVE
            self.links.append((line, given[LOADED[tag]], loads))


def check(folder: Path) -> list[str]:
    """What is wrong with the links of all pages in a folder."""
    pages = {path.resolve(): Page(path) for path in _pages(folder)}
    faults = [] if pages else [f"{folder}: no pages"]
    for path, page in pages.items():
        for line, address, loads in page.links:
            fault = _fault(path, address, loads, folder.resolve(), pages)
            if fault:
                faults.append(f"{path.relative_to(folder.resolve())}:{line}: {address}: {fault}")
    return faults


def _pages(folder: Path) -> list[Path]:
    """All but the templates that a theme keeps beside its scripts."""
    found = sorted(folder.rglob("*.html"))
    return [path for path in found if "_static" not in path.relative_to(folder).parts]


def _fault(
    path: Path, address: str, loads: bool, folder: Path, pages: dict[Path, Page]
) -> str | None:
    try:
        url = urlsplit(address)
    except ValueError as error:
        return str(error)
    if url.scheme or url.netloc:
        return _foreign_fault(address, url.scheme, url.netloc, loads)
    target = path if not url.path else (path.parent / unquote(url.path)).resolve()
    if target.is_dir():
        target /= "index.html"
    if not target.is_relative_to(folder):
        return "leads out of the pages"
    if not target.is_file():
        return "no such file"
    anchor = unquote(url.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return "no such anchor"
    return None


def _foreign_fault(address: str, scheme: str, host: str, loads: bool) -> str | None:
    if scheme == "data" or (scheme == "mailto" and not loads):
        return None
    if loads:
        return "is loaded from another site"
    if scheme not in ("http", "https") or not host or any(c.isspace() for c in address):
        return "is no web address"
    return None


def main() -> int:
    folder = Path(sys.argv[1])
    faults = check(folder)
    print("\n".join(faults) or f"links: {len(_pages(folder))} pages, no fault")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
