"""The two judges of sentiment."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tether.errors import ConfigError
from tether.evaluate.judges import TfidfJudge, VaderJudge, pieces

GOOD = ["a wonderful and moving film", "great acting, I loved it", "wonderful, I was moved", "I loved the great cast"]
BAD = ["a boring and stupid film", "awful acting, I hated it", "boring, I fell asleep", "I hated the awful cast"]


def test_the_trained_judge_tells_good_from_bad():
    pytest.importorskip("sklearn")
    judge = TfidfJudge([*GOOD, *BAD], [1] * 4 + [0] * 4)
    scores = judge.score(["a wonderful cast, I loved it", "an awful and boring story"])
    assert scores[0] > 0.5 > scores[1]
    assert ((scores > 0) & (scores < 1)).all()
    assert judge.score([]).shape == (0,)


def test_the_trained_judge_needs_both_labels():
    pytest.importorskip("sklearn")
    with pytest.raises(ConfigError, match=r"labels \[1\]. Allowed are both"):
        TfidfJudge(GOOD, [1] * 4)


def test_the_judge_of_words_tells_good_from_bad():
    pytest.importorskip("vaderSentiment")
    scores = VaderJudge().score([" was great, I loved it.", " was awful.", " the table"])
    assert scores[0] > 0.5
    assert scores[1] < 0
    assert scores[2] == 0
    assert np.abs(scores).max() <= 1


@pytest.mark.parametrize(
    ("package", "make"), [("sklearn", lambda: TfidfJudge(GOOD, [1] * 4)), ("vaderSentiment", VaderJudge)]
)
def test_a_missing_package_is_named_with_its_remedy(package: str, make: object, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install tether\[demo\]"):
        make()  # type: ignore[operator]


def test_pieces_are_32_words_without_markup_and_a_short_rest_is_left_out():
    words = [f"w{number}" for number in range(70)]
    text = "<br /><br />".join([" ".join(words[:10]), " ".join(words[10:])])
    assert list(pieces(text)) == [" ".join(words[:32]), " ".join(words[32:64])]
    assert list(pieces("too short")) == ["too short"]
    assert list(pieces(" ".join(words[:44])))[1] == " ".join(words[32:44])
