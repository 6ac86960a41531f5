# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Every link from a built page to another place in the documentation leads somewhere.

python docs/check_links.py docs/_build/html
"""

from __future__ import annotations

import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse


class Page(HTMLParser):
    """What a page links to or shows, and the places in it that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors = {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value is not None}
        self.anchors.update(found[name] for name in ("id", "name") if name in found)
        self.links += [found[name] for name in ("href", "src") if name in found and tag != "link"]


@cache
def page(path: Path) -> Page:
    return Page(path)


def is_page(target: Path, source: Path) -> bool:
    """Whether its anchors are to be looked for. (The pages of source code link back by one name for each module.)"""
    return target.suffix == ".html" and "_modules" not in source.parts


def broken(root: Path) -> list[str]:
    """Links into nothing, as ``page: link``."""
    found = []
    for path in sorted(root.rglob("*.html")):
        for link in page(path).links:
            parts = urlparse(link)
            if parts.scheme or parts.netloc:
                continue
            file, anchor = urldefrag(link)
            target = (path.parent / unquote(urlparse(file).path)).resolve() if file else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists() or (is_page(target, path) and unquote(anchor) not in page(target).anchors):
                found.append(f"{path.relative_to(root)}: {link}")
    return found


if __name__ == "__main__":
    problems = broken(Path(sys.argv[1]).resolve())
    print("\n".join(problems) or "every internal link leads somewhere")
    raise SystemExit(1 if problems else 0)
