"""INV-35: what is known to spoil training is found and counted, with the numbers of the rows."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from data.samples import assistant, chat, pair, user
from tether.cli.data.tables import notes
from tether.data import load_rows
from tether.data.audit import groups
from tether.data.audit import language as languages
from tether.data.audit import near_duplicates as near
from tether.data.audit.audit import FINDINGS, check
from tether.data.audit.language import is_in_another_language, language, script
from tether.data.audit.lengths import Limited, measured
from tether.data.audit.limits import check_limits, passed
from tether.data.audit.near_duplicates import HASHES, NearDuplicates, jaccard, signed, words_of
from tether.data.rows.schema import preferences, read_preferences
from tether.errors import ConfigError


def found(rows: list[dict], **options: Any) -> dict[str, tuple[int, ...]]:
    """Findings that hold, with the rows they hold for."""
    result = check(load_rows(rows), **options)
    return {name: one.rows for name, one in result.findings.items() if one.count}


def distinct(n: int, **more: Any) -> dict:
    return pair(f"Question {n}, about {n * 7}?", f" answer {n * 3} yes", f" reply {n * 5} no", **more)


def near_duplicates(texts: list[str]) -> list[int]:
    """Numbers, from 0, of the texts that are almost like an earlier one."""
    seen = NearDuplicates(len(texts))
    rows = [(text, "") for text in texts]
    seen.add(list(range(len(texts))), rows)
    alike, others = seen.alike(lambda numbers: [rows[number] for number in numbers], len(texts))
    assert not others.any()
    return alike.nonzero()[0].tolist()


def test_clean_rows_show_nothing_but_lengths() -> None:
    assert set(found([distinct(n) for n in range(5)])) <= {"longer_chosen"}


@pytest.mark.parametrize(
    ("row", "finding"),
    [
        (pair(chosen=" green."), "identical"),
        (pair(chosen=" "), "empty"),
        (distinct(0), "duplicates"),
        (pair("Question 0, about 0?", " reply 0 no", " answer 0 yes"), "contradictions"),
        (pair("[INST] Hi [/INST]"), "markers"),
        (pair(score_chosen=1.0, score_rejected=1.5), "not_borne_out"),
        (pair("What is the sky like?", " 天空是蓝色的。", " It is green."), "other_script"),
        (
            pair(
                "What is the colour of the sea, and what is it for?",
                " Das ist nicht die See, die ich mit dem meine.",
                " no",
            ),
            "other_language",
        ),
        (pair("Do it.", " I'm sorry, but I can't.", " Done."), "refusals"),
        (pair("Do it.", " Done.", " As an AI language model, I cannot."), "refusals_rejected"),
        (pair("Do it.", None, " Done."), "broken"),
    ],
)
def test_each_thing_is_found_in_the_row_it_is_in(row: dict, finding: str) -> None:
    rows = [distinct(n) for n in range(4)]
    assert finding not in found(rows)
    assert found([*rows, row])[finding] == (5,)


def test_faults_are_said_in_words_and_the_other_rows_are_looked_at() -> None:
    result = check(load_rows([pair(chosen=None), distinct(1), distinct(1)]))
    assert result.faults == ("row 1: `chosen` is missing (null); it must be text or a list of messages",)
    assert result.findings["duplicates"].rows == (3,)
    assert result.findings["broken"].share == pytest.approx(1 / 3)


def test_turns_in_an_odd_order_are_found() -> None:
    system = {"role": "system", "content": "Be kind."}
    good = [system, user("Hi")]
    for prompt in ([user("Hi"), system], [user("Hi"), user("Hi?")], [{"role": "narrator", "content": "x"}, user("Hi")]):
        rows = [pair(good, [assistant("A")], [assistant("B")]), pair(prompt, [assistant("C")], [assistant("D")])]
        assert found(rows)["odd_roles"] == (2,)


def test_train_rows_inside_evaluation() -> None:
    words = " ".join(f"word{n}" for n in range(60))
    rows = [distinct(0), pair("Question 1, about 7?", " else", " other"), pair(words, " yes", " no"), distinct(3)]
    held = [distinct(0), distinct(1), pair(words, " yes", " nope")]
    leaks = found(rows, evaluation=[load_rows(held)])
    assert leaks["in_evaluation"] == (1,)
    assert leaks["prompts_in_evaluation"] == (1, 2, 3)
    assert leaks["near_evaluation"] == (3,)


def test_contradicting_labels() -> None:
    row = {"prompt": "Why?", "completion": " So.", "label": True}
    assert found([row, {**row, "label": False}], kind="unpaired")["contradictions"] == (2,)
    ranked = [
        {"prompt": "Why?", "completions": [" a", " b", " c"]},
        {"prompt": "Why?", "completions": [" c", " x", " a"]},
    ]
    assert found(ranked, kind="ranked")["contradictions"] == (2,)


def test_length_bias_is_the_accuracy_of_preferring_the_longer() -> None:
    rows = [pair(f"{n}", " long answer", " no") for n in range(3)] + [
        pair("a", " no", " long answer"),
        pair("b", " x", " y"),
    ]
    bias = check(load_rows(rows)).length_bias
    assert bias["longer_wins"] == 0.75
    assert bias["characters_prompt"] == 1.0


def test_lengths_and_limits(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = load_rows([pair(), pair("word " * 600), pair(chosen=" blue" * 600)])
    records = preferences(rows, schema := read_preferences(rows))
    lengths = measured(records, len(records), schema, byte_tokenizer, Limited(20))
    assert lengths.limits[512].dropped == pytest.approx(1 / 3)
    assert lengths.limits[512].cut == pytest.approx(1 / 3)
    assert lengths.truncated == pytest.approx(2 / 3)
    ids = [len(byte_tokenizer(row["prompt"])["input_ids"]) for row in rows]  # type: ignore[arg-type]
    assert lengths.sequence_tokens - lengths.tokens == sum(ids)
    assert check(rows, tokenizer=byte_tokenizer, max_length=20).findings["truncated"].count == 2


def test_a_sample_is_drawn_evenly_and_keeps_row_numbers() -> None:
    rows = [distinct(n) for n in range(99)] + [pair(chosen=None)]
    result = check(load_rows(rows), sample=50)
    assert (result.rows, result.total) == (50, 100)
    assert (
        check(load_rows(rows[1:]), sample=33).findings["broken"].rows == (99,) or result.findings["broken"].count == 0
    )


def test_limits() -> None:
    result = check(load_rows([pair(chosen=" green."), *(distinct(n) for n in range(9))]))
    assert passed([result], {"identical": 0.1}) == []
    assert passed([result], {"identical": 0.05, "duplicates": 0.0}) == [
        "data: 10.00% of the rows completions are equal (identical); the limit is 5.00%"
    ]
    with pytest.raises(ConfigError, match="check: `identcal` is not known"):
        check_limits({"identcal": 0.1})
    with pytest.raises(ConfigError, match=r"check\.identical is 2; it must be a share from 0 to 1"):
        check_limits({"identical": 2})


def test_the_result_is_plain_json(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = json.loads(
        json.dumps(check(load_rows([distinct(n) for n in range(3)]), tokenizer=byte_tokenizer).to_dict())
    )
    assert plain["lengths"]["limits"]["512"] == {"cut": 0.0, "dropped": 0.0}
    assert set(plain["findings"]) <= set(FINDINGS)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Hello", "latin"),
        ("12 + 3", ""),
        ("Привет", "cyrillic"),
        ("你好", "chinese"),
        ("안녕", "korean"),
        ("שלום", "hebrew"),
    ],
)
def test_scripts(text: str, name: str) -> None:
    assert script(text) == name


SAID = {
    "english": "What is the name of that city, and what is it for?",
    "french": "Le chat est dans la maison, et il est avec les enfants pour une heure.",
    "spanish": "El gato está en la casa con los niños y no se va por una hora más.",
    "portuguese": "O gato não está em casa, mas na rua com os meninos, e é para você que ele vem.",
    "dutch": "De kat is niet in het huis, maar op het dak met een van de vogels die er ook zijn.",
    "russian": "Это очень хороший ответ на ваш вопрос, и я согласен.",
    "ukrainian": "Це дуже гарна відповідь на ваше запитання. Дякую.",
    "danish": "Hvad er navnet på den by, og hvad er den kendt for?",
    "bokmal": "Hva er navnet på den byen, og hva er den kjent for?",
}


REAL = {
    "english": "The committee decided yesterday that the new library would open in spring, although some had doubts.",
    "german": "Der Ausschuss hat gestern beschlossen, dass die neue Bücherei im Frühling öffnet, obwohl manche zögern.",
    "chinese": "委员会昨天决定新图书馆将在春天开放。几位成员希望有更多时间仔细研究计划。",
}


def test_one_look_at_a_text_says_what_linguas_own_questions_say() -> None:
    """Of each text lingua is asked once; its own functions for the same are the oracle."""
    from lingua import LanguageDetectorBuilder

    all_of_them = LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode()
    oracle = all_of_them.with_minimum_relative_distance(0.25).build()
    texts = [*SAID.values(), *REAL.values(), "Paris, London", "42", "", "qzx wvk pfft", *(t[:9] for t in SAID.values())]
    told = {text: oracle.detect_language_of(text) for text in texts}
    assert {text: language(text) for text in texts} == {
        text: one.name.lower() if one is not None else "" for text, one in told.items()
    }
    assert {language(text) for text in REAL.values()} == REAL.keys()
    for answer in texts:
        for question in texts:
            asked, spoken = told[question], told[answer]
            apart = asked is not None and spoken not in (None, asked)
            likely = apart and max(
                oracle.compute_language_confidence(answer, asked), oracle.compute_language_confidence(question, spoken)
            )
            assert is_in_another_language(answer, question) == (apart and likely < 0.02), (answer, question)


def test_of_many_rows_an_even_part_is_read_for_languages_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [distinct(n) for n in range(9)]
    for place in (1, 3, 6):  # of every third row, two
        own[place] = pair(f"{place} {SAID['english']}", f" {place} {REAL['german']}", " no")
    whole = check(load_rows(own))
    assert (whole.findings["other_language"].count, whole.languages) == (3, 9)
    assert not any(line.startswith("languages: read") for line in notes(whole))
    monkeypatch.setattr("tether.data.audit.collector.LANGUAGE_ROWS", 3)
    part = check(load_rows(own))
    assert part.languages == 3
    finding = part.findings["other_language"]
    assert (finding.count, finding.rows) == (6, (4, 7))
    assert finding.share == pytest.approx(2 / 3)
    assert "languages: read of 3 of the rows, drawn evenly" in notes(part)


@pytest.mark.parametrize(("name", "text"), [*SAID.items(), ("", "Paris, London"), ("", "def f(x):\n    return x + 1")])
def test_languages(name: str, text: str) -> None:
    assert language(text) == name


def test_near_languages_and_what_is_no_language_are_no_other_language() -> None:
    near = [("danish", "bokmal"), ("bokmal", "danish")]
    for one, text in SAID.items():
        for other, answer in SAID.items():
            assert is_in_another_language(answer, text) == (one != other and (one, other) not in near), (one, other)
        assert not is_in_another_language("def f(x):\n    return x + 1", text)
        assert not is_in_another_language("42", text)


def test_without_its_library_languages_are_left_out_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load_rows([pair(SAID["english"], SAID["dutch"], " no")])
    assert check(rows).findings["other_language"].rows == (1,)
    monkeypatch.setattr(languages, "detector", lambda: None)
    monkeypatch.setattr("tether.data.audit.row_findings.detector", lambda: None)
    monkeypatch.setattr("tether.data.audit.limits.detector", lambda: None)
    monkeypatch.setattr("tether.cli.data.tables.detector", lambda: None)
    without = check(rows)
    assert "other_language" not in without.findings
    assert any("install tether[language]" in line for line in notes(without))
    with pytest.raises(ConfigError, match=r"no library tells languages: install tether\[language\]"):
        check_limits({"other_language": 0.1})


# -- near duplicates ---------------------------------------------------------------------------------------------------


def test_near_duplicates_are_exactly_those_of_comparing_all_with_all() -> None:
    """The index against its oracle: every text compared with every earlier one."""
    import random

    generator = random.Random(0)
    words = [f"w{n}" for n in range(500)]
    texts = [" ".join(generator.choices(words, k=80)) for _ in range(60)]
    for text in list(texts):
        changed = text.split()
        for _ in range(generator.choice([0, 1, 3, 8, 20])):
            changed[generator.randrange(80)] = "other"
        texts.append(" ".join(changed))
    sets = [{tuple(text.split()[place : place + 3]) for place in range(78)} for text in texts]
    alike = [[len(own & other) / len(own | other) >= 0.8 for other in sets] for own in sets]
    pairwise = [n for n, row in enumerate(alike) if any(row[:n])]
    assert 10 < len(pairwise) < 60
    assert near_duplicates(texts) == pairwise


def test_signatures_agree_as_often_as_texts_are_alike() -> None:
    """Of 64 places the share that agrees is the similarity of two sets, with the spread of 64 independent draws."""
    import random

    generator, differences = random.Random(1), []
    for _ in range(150):
        words = [f"w{generator.randrange(10**6)}" for _ in range(generator.choice([12, 60, 300]))]
        other = [word if generator.random() < 0.93 else "x" + word for word in words]
        one, two = (frozenset(zip(text, text[1:], text[2:], strict=False)) for text in (words, other))
        expected = len(one & two) / len(one | two)
        signatures = signed([(" ".join(words), ""), (" ".join(other), "")])
        spread = max((expected * (1 - expected) / HASHES) ** 0.5, 1e-9)
        differences.append(((signatures[0] == signatures[1]).mean() - expected) / spread)
    assert abs(np.mean(differences)) < 0.3
    assert 0.8 < np.std(differences) < 1.25
    [one, two, other] = signed([("a b c d e", ""), ("a b c d e", ""), ("a b c d e", "image")])
    assert (one == two).all()
    assert (one == other).mean() < 0.1
    long = [" ".join(f"{n}" for n in range(10_000)), " ".join(f"{n}" for n in range(10_000, 0, -1))]
    assert (signed([(long[0], "")]) == signed([(long[0], "")])).all()
    assert (signed([(long[0], "")])[0] == signed([(long[1], "")])[0]).mean() < 0.1


@pytest.mark.parametrize(
    "spoken", ["天空是蓝色的因为空气散射光线而大海是绿色的", "ท้องฟ้าเป็นสีฟ้าเพราะอากาศกระจายแสงและทะเลเป็นสีเขียว"]
)
def test_scripts_without_spaces_are_compared_by_characters(spoken: str) -> None:
    long = spoken * 3
    assert near_duplicates([long, long[:-1] + "x", spoken[::-1] * 3, long[: len(spoken)] + spoken[::-1] * 2]) == [1]
    assert len(words_of(spoken)) == len(spoken)


def test_half_a_character_is_compared_like_any_other() -> None:
    assert near_duplicates(["a b c \ud83d d", "something else here", "a b c \ud83d d"]) == [2]


def test_many_texts_that_are_half_alike_are_compared_with_few() -> None:
    """A long system prompt in every row makes all of them half alike; the work must not grow with their square."""
    texts = [" ".join([*(f"s{n}" for n in range(60)), *(f"{row}-{n}" for n in range(40))]) for row in range(400)]
    compared: list[int] = []

    def counted(first: np.ndarray, second: np.ndarray) -> float:
        compared.append(1)
        return jaccard(first, second)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tether.data.audit.near_duplicates.jaccard", counted)
        assert near_duplicates([*texts, texts[399]]) == [400]
    assert 0 < len(compared) < 40


def test_a_check_in_pieces_on_disk_finds_what_one_in_memory_finds(tmp_path, monkeypatch) -> None:
    """Every finding that a row shares with others; and nothing is left of the pieces."""
    words = [" ".join(f"w{(n * k) % 97}" for k in range(1, 60)) for n in range(40)]
    rows = [pair(f"{text} {n}", f" yes {text}", f" no {n}") for n, text in enumerate(words)]
    rows += [
        rows[3],
        pair(rows[5]["prompt"], rows[5]["rejected"], rows[5]["chosen"]),
        pair(words[7] + " x", " a", " b"),
    ]
    rows += [pair(f"{words[9]} 9 more", f" yes {words[9]}", " no 9"), pair(words[11], None, " broken")]
    held = [rows[1], pair(f"{words[2]} 2 else", f" yes {words[2]}", " no 2"), pair(rows[4]["prompt"], " p", " q")]
    whole = check(load_rows(rows), evaluation=[load_rows(held[:1]), load_rows(held[1:])])
    # The same by two processes, in batches of a few rows.
    monkeypatch.setattr("tether.data.audit.collector.BATCH_ROWS", 4)
    monkeypatch.setattr("tether.data.audit.audit._BATCHES_OF_A_PROCESS", 1)
    for processes in (1, 2):
        shared = check(load_rows(rows), evaluation=[load_rows(held[:1]), load_rows(held[1:])], processes=processes)
        assert shared.to_dict() == whole.to_dict()
    for name in ("PIECE", "_WAITING"):
        monkeypatch.setattr(groups, name, 7)
    monkeypatch.setattr(near, "_PAIRS", 3)
    monkeypatch.setattr(near, "_READ", 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pieces = check(load_rows(rows), evaluation=[load_rows(held[:1]), load_rows(held[1:])])
    assert pieces.to_dict() == whole.to_dict()
    holding = {name: one.rows for name, one in whole.findings.items() if one.count}
    assert holding["duplicates"] == (41,)
    assert holding["contradictions"] == (42,)
    assert holding["near_duplicates"] == (42, 43, 44)
    assert holding["in_evaluation"] == (2,)
    assert holding["prompts_in_evaluation"] == (2, 5)
    assert holding["near_evaluation"] == (3, 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "one", "two words", "   "])
def test_short_texts_are_compared_too(text: str) -> None:
    assert near_duplicates([text, "something else here", text]) == [2]


def test_conversations_are_looked_at_like_text(chatml: PreTrainedTokenizerFast) -> None:
    result = check(load_rows([chat(), chat(), chat(question="What is <|im_end|>?")]), tokenizer=chatml)
    assert result.findings["duplicates"].rows == (2,)
    assert result.markers == {"<|im_end|>": 1}
    assert result.lengths is not None
    assert result.lengths.inexact_boundaries == 0
