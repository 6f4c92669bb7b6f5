"""Judges of sentiment for the demo: one ranks the training pairs, the other, made in another way, reports."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from tether.errors import ConfigError

_WORDS_PER_PIECE = 32
_FEWEST_WORDS = 12
_PIECES_PER_TEXT = 8
_MARKUP = re.compile(r"<[^>]{1,20}>")


class TfidfJudge:
    """Logistic regression on the TF-IDF weights of words and word pairs.

    It is trained on pieces of texts, as long as what it is going to judge: whole reviews would teach it that only many
    words together are telling.

    Args:
        texts: texts to learn from.
        labels: 1 for a positive text, 0 for a negative one.

    Raises:
        ConfigError: scikit-learn is not installed, or the texts are not of both labels.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[int]) -> None:
        features = _optional("sklearn.feature_extraction.text")
        linear = _optional("sklearn.linear_model")
        pairs = [
            (piece, label)
            for text, label in zip(texts, labels, strict=True)
            for piece in list(pieces(text))[:_PIECES_PER_TEXT]
        ]
        found = {label for _, label in pairs}
        if found != {0, 1}:
            raise ConfigError(
                f"The judge was given texts with the labels {sorted(found)}. Allowed are both 0 (negative) and 1 "
                "(positive), each at least once: give texts of both."
            )
        self._features: Any = features.TfidfVectorizer(
            ngram_range=(1, 2), min_df=1 if len(pairs) < 1000 else 3, sublinear_tf=True
        )
        self._model: Any = linear.LogisticRegression(C=3.0, max_iter=300)
        self._model.fit(self._features.fit_transform([piece for piece, _ in pairs]), [label for _, label in pairs])

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """The probability that each text is positive.

        Args:
            texts: N texts.

        Returns:
            float64 `[N]`, from 0 to 1.
        """
        if not texts:
            return np.zeros(0)
        return self._model.predict_proba(self._features.transform(list(texts)))[:, 1]


class VaderJudge:
    """The compound score of VADER: a list of words with human ratings, and rules. Learns nothing from any data.

    Raises:
        ConfigError: vaderSentiment is not installed.
    """

    def __init__(self) -> None:
        self._analyzer: Any = _optional("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """How positive each text is.

        Args:
            texts: N texts.

        Returns:
            float64 `[N]`, from -1 (negative) to 1 (positive); 0 is neutral.
        """
        return np.array([self._analyzer.polarity_scores(text)["compound"] for text in texts], dtype=np.float64)


def pieces(text: str) -> Iterator[str]:
    """A text without markup, in pieces of 32 words; a last piece of fewer than 12 is left out if it is not the only.

    Args:
        text: any text.

    Yields:
        The pieces in order.
    """
    words = _MARKUP.sub(" ", text).split()
    for start in range(0, len(words), _WORDS_PER_PIECE):
        piece = words[start : start + _WORDS_PER_PIECE]
        if start == 0 or len(piece) >= _FEWEST_WORDS:
            yield " ".join(piece)


def _optional(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"This judge needs the package that holds '{name}', which is not installed. Judges are part of the "
            "demo's extra: install them with 'pip install tether[demo]'."
        ) from error
