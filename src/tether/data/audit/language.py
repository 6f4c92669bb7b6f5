"""What can be told of a text by itself: its script and language, whether it refuses, whether turns are in an odd order.
Called by `check`."""

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
# The commonest words of languages in Latin script; those that languages share speak for each of them.
_COMMON = {
    "english": "the and of to is that it was for with as you on this are be have from not they which what would there",
    "german": "der die das und ist nicht ein eine zu den mit von auf ich sie für dem des auch es sich wie als wird",
    "french": "le la les et est des une un que pour dans qui pas sur au avec plus ce il elle sont vous nous cette mais",
    "spanish": "el la los las y es que de en un una por con para no se del como más pero su al lo está son",
    "italian": "il la che di e è un una per non con sono del della si come più ma gli anche dei nel questo alla le",
    "portuguese": "o a os as e é que de um uma em para com não por do da mais como se mas ao dos na são você",
    "dutch": "de het een en van is dat niet op te zijn voor met die er maar ook als aan bij wordt naar deze je ik",
}
_LANGUAGES: dict[str, tuple[str, ...]] = {
    word: tuple(name for name, words in _COMMON.items() if word in words.split())
    for words in _COMMON.values()
    for word in words.split()
}
_TOLD = 4  # common words that a language must have, and twice as many as any other
_WORD = re.compile(r"[^\W\d_]+")
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


def language(text: str) -> str:
    """The language of a text's beginning, among seven in Latin script; empty where its commonest words do not tell.

    Example:
        >>> language("What is the name of that city, and what is it for?")
        'english'
        >>> language("Das ist nicht die Stadt, die ich mit dem Namen meine.")
        'german'
        >>> language("x = 3")
        ''
    """
    counts = dict.fromkeys(_COMMON, 0)
    for word in _WORD.findall(text[:_READ_CHARACTERS].lower()):
        for name in _LANGUAGES.get(word, ()):
            counts[name] += 1
    second, first = sorted(counts.items(), key=lambda item: item[1])[-2:]
    return first[0] if first[1] >= max(_TOLD, 2 * second[1]) else ""


def is_odd(messages: Messages) -> bool:
    """A system message after the first place, a role that is not known, or a user who speaks twice in a row."""
    roles = [message["role"] for message in messages]
    return (
        any(role not in _KNOWN_ROLES for role in roles)
        or any(role == "system" for role in roles[1:])
        or any(before == after == "user" for before, after in pairwise(roles))
        or (bool(roles) and roles[0] in ("assistant", "tool"))
    )
