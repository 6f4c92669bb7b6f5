"""What can be told of a text by itself: its script, whether it refuses, whether turns are in an odd order. Called by
`check`."""

from __future__ import annotations

import re
from itertools import pairwise

from tether.types import Messages

_APOSTROPHE = "['\u2019]"
_REFUSAL = re.compile(
    rf"\s*(?:I(?:{_APOSTROPHE}m| am) (?:very |so |really )?sorry|(?:I )?apologi[sz]e|Sorry,|Unfortunately, I|"
    rf"I (?:cannot|can{_APOSTROPHE}t|can not|am unable|am not able|won{_APOSTROPHE}t|will not|must decline|"
    r"do not feel comfortable)|As an? (?:AI|artificial|language model))",
    re.IGNORECASE,
)
_SCRIPTS = {
    "latin": re.compile(r"[A-Za-zÀ-ɏ]"),
    "cyrillic": re.compile(r"[Ѐ-ӿ]"),
    "greek": re.compile(r"[Ͱ-Ͽ]"),
    "arabic": re.compile(r"[؀-ۿ]"),
    "hebrew": re.compile(r"[֐-׿]"),
    "devanagari": re.compile(r"[ऀ-ॿ]"),
    "thai": re.compile(r"[฀-๿]"),
    "chinese": re.compile(r"[一-鿿]"),
    "japanese": re.compile(r"[぀-ヿ]"),
    "korean": re.compile(r"[가-힯]"),
}
_READ_CHARACTERS = 400
_KNOWN_ROLES = ("system", "user", "assistant", "tool", "developer")


def is_refusal(text: str) -> bool:
    """Whether a text begins with one of the usual English phrases of a refusal."""
    return _REFUSAL.match(text) is not None


def script(text: str) -> str:
    """The script that most letters of a text's beginning are in; empty for a text without letters.

    Example:
        >>> script("2 + 2 = 4"), script("Привет, world of ours"), script("これは本です")
        ('', 'latin', 'japanese')
    """
    start = text[:_READ_CHARACTERS]
    if start.isascii():
        return "latin" if any(map(str.isalpha, start)) else ""
    counts = {name: len(pattern.findall(start)) for name, pattern in _SCRIPTS.items()}
    if counts["japanese"]:  # Japanese is written with Chinese characters, too
        counts["japanese"] += counts.pop("chinese")
    name, count = max(counts.items(), key=lambda item: item[1])
    return name if count else ""


def is_odd(messages: Messages) -> bool:
    """A system message after the first place, a role that is not known, or a user who speaks twice in a row."""
    roles = [message["role"] for message in messages]
    return (
        any(role not in _KNOWN_ROLES for role in roles)
        or any(role == "system" for role in roles[1:])
        or any(before == after == "user" for before, after in pairwise(roles))
        or (bool(roles) and roles[0] in ("assistant", "tool"))
    )
