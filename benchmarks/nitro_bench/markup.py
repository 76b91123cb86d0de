"""Pieces of HTML that the page and its charts share. Everything given is escaped, but what is called `content`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def element(name: str, content: str, css: str = "") -> str:
    """`content` is HTML already."""
    attribute = f' class="{css}"' if css else ""
    return f"<{name}{attribute}>{content}</{name}>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], css: str = "") -> str:
    """It scrolls by itself where it is wider than the page."""
    lines = [element("tr", "".join(element("th", escape(cell)) for cell in head))] if head else []
    lines += [element("tr", "".join(element("td", escape(cell)) for cell in row)) for row in rows]
    return element("div", element("table", "".join(lines), css), "scroll")


def cards(charts: Iterable[tuple[str, str]]) -> str:
    """(heading, content), each in a card of its own; one without content is left out."""
    found = [
        element("div", (element("h3", escape(heading)) if heading else "") + content, "card")
        for heading, content in charts
        if content
    ]
    return element("div", "".join(found), "grid") if found else ""
