"""The few HTML elements a report is made of. Every text that comes in is escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Text that is markup already; a plain str is escaped wherever it is put."""

    __slots__ = ()


Text = str | Html


def html(text: Text) -> Html:
    """Returns the text as markup."""
    return text if isinstance(text, Html) else Html(escape(text))


def element(tag: str, *children: Text, **attributes: str) -> Html:
    """Returns <tag attributes>children</tag>; `class_` stands for "class"."""
    named = "".join(f' {k.rstrip("_")}="{escape(v)}"' for k, v in attributes.items())
    return Html(f"<{tag}{named}>{''.join(map(html, children))}</{tag}>")


def join(parts: Iterable[Text]) -> Html:
    """Returns the parts one after the other."""
    return Html("\n".join(map(html, parts)))


def paragraphs(sentences: Iterable[Text]) -> Html:
    """Returns one <p> per sentence."""
    return join(element("p", sentence) for sentence in sentences)


def bullets(items: Sequence[Text]) -> Html:
    """Returns a list; nothing where there are no items."""
    return element("ul", *(element("li", item) for item in items)) if items else Html("")


def table(head: Sequence[Text], rows: Iterable[Sequence[Text]], caption: Text = "") -> Html:
    """Returns a table whose first column is a row heading; it scrolls where the page is narrow."""
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", c) for c in row[1:]))
        for row in rows
    ]
    words = element("caption", caption) if caption else Html("")
    inside = element("table", words, element("thead", top), element("tbody", *body))
    return element("div", inside, class_="scroll")


def pairs(rows: Iterable[tuple[Text, Text]]) -> Html:
    """Returns a description list: what, and what it is."""
    return element("dl", *(p for k, v in rows for p in (element("dt", k), element("dd", v))))


def image(png: bytes, caption: str) -> Html:
    """Returns a figure with the image inside it, as a data URI, and its caption."""
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    img = Html(f'<img src="{source}" alt="{escape(caption)}">')
    return element("figure", img, element("figcaption", caption))


def details(summary: str, *children: Text) -> Html:
    """Returns a part that opens on a click, without a script."""
    return element("details", element("summary", summary), *children)
