"""Building HTML so that text from data cannot become markup: a string is escaped unless it was built here."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias

_VOID = frozenset({"meta", "br", "line", "rect", "path", "circle"})


class Html(str):
    """Markup that was built by `tag` or `join`; every other string is text."""

    __slots__ = ()


Child: TypeAlias = "str | Html | Iterable[str | Html | None] | None"


def join(*children: Child) -> Html:
    """Put children one after another.

    Args:
        children: text, which is escaped; markup, which is not; None, which is nothing; or an iterable of these.

    Returns:
        The markup.

    >>> join("a < b", None, tag("b", "c & d"))
    'a &lt; b<b>c &amp; d</b>'
    """
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(html.escape(child, quote=True))
        else:
            parts.append(join(*child))
    return Html("".join(parts))


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """Build an element.

    Args:
        name: of the element.
        children: what it holds, see `join`.
        attributes: by name, where `_` stands for `-` and a trailing `_` is dropped (`class_`); None leaves one out.

    Returns:
        The markup.

    >>> tag("p", "<script>", class_='a"b', hidden=None)
    '<p class="a&quot;b">&lt;script&gt;</p>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID and not children:
        return Html(f"<{name}{written}>" if name in {"meta", "br"} else f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")
