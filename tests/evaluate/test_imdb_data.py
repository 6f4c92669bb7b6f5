"""The demo's committed data is what its README says, and the rule that cuts samples does what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "imdb"
BUILT = json.loads((FOLDER / "build.json").read_text(encoding="utf-8"))


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a file of the demo."""
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def build_pairs() -> ModuleType:
    """The script that made the data."""
    spec = importlib.util.spec_from_file_location("imdb_build_pairs", FOLDER / "build_pairs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def test_files_hold_what_was_reported_and_are_small():
    assert len(rows("pairs.jsonl")) == BUILT["train"]["pairs"]
    assert len(rows("heldout.jsonl")) == BUILT["heldout"]["pairs"]
    assert len(rows("prompts.jsonl")) == BUILT["generation_prompts"]
    assert sum(path.stat().st_size for path in FOLDER.glob("*.json*")) < 1_000_000


def test_no_prompt_has_two_uses():
    prompts = [row["prompt"].lower() for name in ("pairs", "heldout", "prompts") for row in rows(f"{name}.jsonl")]
    assert len(set(prompts)) == len(prompts)


def test_every_pair_is_two_different_whole_sentences(build_pairs: ModuleType):
    for row in rows("pairs.jsonl") + rows("heldout.jsonl"):
        assert row["chosen"] != row["rejected"]
        assert build_pairs.trimmed(row["chosen"]) == row["chosen"]
        assert build_pairs.trimmed(row["rejected"]) == row["rejected"]


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_length_does_not_tell_the_chosen_side(name: str):
    figures = BUILT[name]
    assert abs(figures["chosen_is_longer"] - figures["chosen_is_shorter"]) < 0.05
    assert abs(figures["words_chosen_mean"] - figures["words_rejected_mean"]) < 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (' was great, and "I loved it." The actors', ' was great, and "I loved it."'),
        (" was a very good film.\nMore of the text. And", " was a very good film."),
        (" was rated 7.5 of 10 and it had no end", None),
        (" was good.", None),
        ("ary public of the last movie was there.", None),
        (" good good good good good good film.", None),
    ],
)
def test_samples_are_cut_after_their_last_sentence(build_pairs: ModuleType, text: str, expected: str | None):
    assert build_pairs.trimmed(text) == expected


def test_parts_of_the_reviews_do_not_overlap(build_pairs: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build_pairs, "JUDGE_REVIEWS", 4)
    monkeypatch.setattr(build_pairs, "JUDGE_TEST_REVIEWS", 2)
    reviews = [build_pairs.Review(f"review {number % 15} " + "word " * 30, 1) for number in range(30)]
    parts = build_pairs.split(reviews, {"heldout": 3, "train": 100})
    openings = [review.opening for part in parts.values() for review in part]
    assert {name: len(part) for name, part in parts.items()} == {"judge": 4, "judge_test": 2, "heldout": 3, "train": 6}
    assert len(set(openings)) == len(openings)
