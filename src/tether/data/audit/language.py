"""What can be told of a text by itself: its script and language, whether it refuses, whether turns are in an odd order.
Called by `audit`."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from tether.types import Messages

if TYPE_CHECKING:
    from lingua import Language, LanguageDetector

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
# A language is told where it is likelier than the next by this much; near ones (Malay and Indonesian) are taken for
# each other, so that a text is in another language only where it is hardly in the first.
_AHEAD, _HARDLY = 0.25, 0.02
# Of more rows, an even part of at most so many is read: a text of no language takes lingua 9 ms, one of people 1 to 3.
LANGUAGE_ROWS = 2_000
EXTRA = "install tether[language] (lingua-language-detector) to tell in which languages rows are asked and answered"
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


@cache
def detector() -> LanguageDetector | None:
    """What tells languages, all 75 that lingua knows, in its mode for speed; None where lingua is not installed."""
    try:
        from lingua import LanguageDetectorBuilder
    except ModuleNotFoundError:
        return None
    return LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()


def language(text: str) -> str:
    """The language of a text's beginning, in English; empty where it cannot be told, or lingua is not installed."""
    known = detector()
    found = None if known is None else _told(_likelihoods(known, text))
    return found.name.lower() if found else ""


def is_in_another_language(answer: str, question: str) -> bool:
    """Whether an answer is plainly not in the language of its question."""
    known = detector()
    if known is None:
        return False
    of_question = _likelihoods(known, question)
    asked = _told(of_question)
    if asked is None:
        return False
    of_answer = _likelihoods(known, answer)
    spoken = _told(of_answer)
    return spoken not in (None, asked) and max(of_answer[asked], of_question[spoken]) < _HARDLY


def _likelihoods(known: LanguageDetector, text: str) -> dict[Language, float]:
    """How likely each language is for a text's beginning, the likeliest first."""
    return _answered(known, text[:_READ_CHARACTERS])


@lru_cache(
    maxsize=512
)  # prompts come again, and so do a set's rows: in its evaluation, in the next trainer of a script
def _answered(known: LanguageDetector, start: str) -> dict[Language, float]:
    # One question for all languages, as lingua reads the text anew for each.
    return {one.language: one.value for one in known.compute_language_confidence_values(start)}


def _told(likelihoods: dict[Language, float]) -> Language | None:
    """The likeliest language, where it is ahead of the next."""
    (first, most), (_, next_most) = islice(likelihoods.items(), 2)
    return first if most - next_most >= _AHEAD else None


def is_odd(messages: Messages) -> bool:
    """A system message after the first place, a role that is not known, or a user who speaks twice in a row."""
    roles = [message["role"] for message in messages]
    return (
        any(role not in _KNOWN_ROLES for role in roles)
        or any(role == "system" for role in roles[1:])
        or any(before == after == "user" for before, after in pairwise(roles))
        or (bool(roles) and roles[0] in ("assistant", "tool"))
    )
