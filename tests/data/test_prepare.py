"""The whole way from rows to ids, and the report of what was found and done (INV-30, 32, 35, 37)."""

from __future__ import annotations

import gc
import json
from collections import Counter
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from data.samples import assistant, byte_level, chat, chat_tokenizer, pair, user
from tether.data import Prepared, example_from_row, overlap, prepare, truncated_lengths
from tether.data.prepare.job import paused_collector
from tether.data.prepare.report import DROPS, MarkerFinder, Tally, nothing_left
from tether.data.text.truncate import kept_prompt
from tether.errors import ConfigError, DataError


@pytest.fixture
def tokenizer(byte_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return byte_tokenizer


def run(rows: list[dict], tokenizer: PreTrainedTokenizerFast, **options: Any) -> Prepared:
    return prepare(rows, tokenizer, **{"max_length": None, **options})


def numbered(count: int) -> list[dict]:
    return [pair(f"{n} + {n} =", f" {2 * n}", f" {n}{n}") for n in range(1, count + 1)]


def test_the_data_set_has_int32_ids_and_source_rows_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    prepared = run([pair(), pair(chosen=" green."), pair("Why", " not", " yes")], tokenizer)
    assert {name: str(kind) for name, kind in prepared.dataset.features.items()} == {
        "prompt_ids": "List(Value('int32'))",
        "completion_ids": "List(List(Value('int32')))",
        "source_row": "Value('int64')",
    }
    assert prepared.dataset["source_row"][:] == [0, 2]
    example = example_from_row(prepared.dataset[1])
    assert tokenizer.decode(example.prompt_ids) == "Why"
    assert [tokenizer.decode(ids) for ids in example.completion_ids] == [" not<eos>", " yes<eos>"]
    assert example.source_row == 2


def test_inv_35_identical_and_empty_completions_are_dropped_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    report = run(
        [pair(), pair(chosen=" green."), pair(chosen=""), pair(rejected=" \n"), pair("Why?")], tokenizer
    ).report
    assert (report.rows, report.kept) == (5, 2)
    assert {reason: count for reason, count in report.dropped.items() if count} == {
        "identical": 1,
        "empty_completion": 2,
    }
    assert "train: dropped 1 with chosen equal to rejected, 2 with an empty completion" in report.lines()


def test_inv_35_empty_and_identical_messages_are_found(chatml: PreTrainedTokenizerFast) -> None:
    report = run([chat(), chat(good=""), chat(good="Same", bad="Same")], chatml).report
    assert (report.kept, report.dropped["identical"], report.dropped["empty_completion"]) == (1, 1, 1)


def test_inv_35_duplicates_are_kept_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    report = run([pair(), pair("Why?"), pair(), pair(), pair(chosen=" grey.")], tokenizer).report
    assert (report.kept, report.duplicates) == (5, 2)


def test_inv_35_training_rows_inside_the_evaluation_set_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    train = run([pair(), pair(), pair(chosen=" grey."), pair("Why?")], tokenizer)
    held_out = run([{"chosen": "The sky is blue.", "rejected": "The sky is green."}], tokenizer, name="eval")
    found = overlap(train, held_out)
    assert found.to_dict() == {"rows": 2, "prompts": 3, "train_rows": 4}


def test_inv_32_cut_and_dropped_rows_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair(), pair("The sky is " * 9 + "blue", " Yes", " No"), pair(chosen=" blue" * 20)]
    report = run(rows, tokenizer, max_length=10).report
    assert (report.kept, report.dropped["prompt_too_long"], report.cut_completions) == (2, 1, (1, 0))
    assert report.lengths["chosen"]["max"] + report.lengths["prompt"]["max"] <= 10
    ends = run(rows, tokenizer, max_length=10, truncation_mode="keep_end").report
    assert (ends.kept, ends.cut_prompts) == (3, 1)
    assert ends.cut_tokens["prompt"] > 0
    assert ends.cut_tokens["completions"] == report.cut_tokens["completions"] > 0
    assert run(rows, tokenizer, max_length=10, truncation_mode="drop").report.dropped["too_long"] == 2


@pytest.mark.parametrize("mode", ["keep_start", "keep_end", "middle"])
def test_inv_32_the_prepared_rows_are_those_of_the_pure_function(mode: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair(chosen=" blue" * n, rejected=" green" * (9 - n)) for n in range(1, 9)]
    cut = run(rows, tokenizer, max_length=8, truncation_mode=mode).dataset
    for whole, row in zip(run(rows, tokenizer).dataset, cut, strict=True):
        prompt, completions = whole["prompt_ids"], whole["completion_ids"]
        lengths = truncated_lengths(len(prompt), [len(ids) for ids in completions], 8, mode)
        assert lengths is not None
        assert row["prompt_ids"] == kept_prompt(prompt, lengths[0], mode)
        assert row["completion_ids"] == [ids[:kept] for ids, kept in zip(completions, lengths[1], strict=True)]
        assert row["source_row"] == whole["source_row"]


def test_inv_30_truncation_puts_no_end_of_turn_where_it_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    [row] = run([pair(chosen=" blue" * 20)], tokenizer, max_length=10).dataset
    assert tokenizer.eos_token_id not in row["completion_ids"][0]
    assert row["completion_ids"][1][-1] == tokenizer.eos_token_id


def test_completions_that_differ_only_beyond_max_length_are_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    same = pair(chosen=" blue" * 20 + ".", rejected=" blue" * 20 + "!")
    report = run([pair(), same], tokenizer, max_length=12).report
    assert (report.kept, report.dropped["identical_after_truncation"]) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [pair(chosen=" green.")],
            {},
            "none of the 1 rows can be used: 1 with chosen equal to rejected. To do: give completions that differ",
        ),
        (
            [pair("word " * 50)],
            {"max_length": 20},
            r"1 with a prompt that fills max_length. To do: raise max_length \(now 20\)",
        ),
        ([pair("")], {}, "1 with a prompt of no tokens. To do: give prompts that are not empty"),
        ([pair("The sky is ", "blue")], {"boundary": "drop"}, "1 with no exact prompt boundary"),
    ],
)
def test_no_row_left_is_an_error_that_says_why(
    rows: list[dict], options: dict, message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=message):
        run(rows, tokenizer, **options)


WRITES_LITTLE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "(message['content'].split('</think>')[-1] if message['content'] != 'secret' else '') + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}


@pytest.mark.parametrize(
    ("good", "bad", "reasons", "advice"),
    [
        (
            assistant("<think>well</think>So."),
            assistant("<think>badly</think>So."),
            "1 with completions that differ in the rows and not in tokens; the chat template does not write thoughts "
            "(of 1 rows)",
            "set a chat template, or a tokenizer, that writes what the completions differ in",
        ),
        (
            {**assistant(""), "tool_calls": [_CALL]},
            assistant("No."),
            "1 with a completion that the chat template does not write; the chat template does not write tool calls "
            "(of 1 rows)",
            "set a chat template that writes tool calls (chat_template_path, in a run file `model.chat_template`), or "
            "remove them from the rows",
        ),
        (
            assistant("secret"),
            assistant("No."),
            "1 with a completion that the chat template does not write; the chat template does not write assistant "
            "messages (of 1 rows)",
            "set a chat template that writes assistant messages (chat_template_path, in a run file "
            "`model.chat_template`), or remove them from the rows",
        ),
    ],
)
def test_what_the_template_leaves_out_is_the_cause_that_is_named(
    good: dict, bad: dict, reasons: str, advice: str
) -> None:
    with pytest.raises(DataError) as raised:
        run([pair([user("Hi")], [good], [bad])], chat_tokenizer(WRITES_LITTLE))
    assert str(raised.value) == f"train: none of the 1 rows can be used: {reasons}. To do: {advice}."


def test_every_reason_has_its_own_advice() -> None:
    """Of all reasons at once, each is named, and nothing is said of a limit that does not exist."""
    said = nothing_left(Tally(dropped=Counter(list(DROPS))), "train", len(DROPS), 20, "pair")
    said_of_each = [nothing_left(Tally(dropped=Counter([reason])), "train", 1, 20, "pair") for reason in DROPS]
    assert all(words in said for words in DROPS.values())
    assert all(one.partition("To do: ")[2].removesuffix(".") in said for one in said_of_each)
    assert len(set(said_of_each)) == len(DROPS)
    limited = {reason for reason, one in zip(DROPS, said_of_each, strict=True) if "max_length (now 20)" in one}
    assert limited == {
        *("prompt_too_long", "too_long", "image_cut", "identical_after_truncation", "nothing_scored"),
    }


def test_inv_29_boundaries_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair(), pair("The sky is ", "blue", "green")]
    report = run(rows, tokenizer).report
    assert report.boundaries == {"exact": 1, "split": 1}
    assert "train: 1 rows have no exact prompt boundary (policy split)" in report.lines()
    assert run(rows, tokenizer, boundary="drop").report.dropped["boundary"] == 1


def test_inv_31_template_markers_in_text_are_reported(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        pair("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        pair(rejected=" no<eos> way"),
        pair(chosen=" <b>[1]</b> blue<eos>"),  # markup and an end of sequence in its place are no markers
    ]
    report = run(rows, tokenizer).report
    assert report.marker_rows == 2
    assert report.markers == {"<eos>": 1, "<|im_end|>": 1, "<|im_start|>": 1}
    assert "train: 2 rows carry template markers: <eos>, <|im_end|>, <|im_start|>" in report.lines()


def test_inv_31_template_markers_inside_messages_are_reported(chatml: PreTrainedTokenizerFast) -> None:
    assert run([chat(), chat(question="What is <|im_end|>?")], chatml).report.markers == {"<|im_end|>": 1}


def test_completions_that_repeat_the_prompt_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        pair("Why?", "Why? So.", "Why? No."),
        pair("Why is the sky blue?", "Why is the sky blue? So.", "No."),
        pair("Oh", "Oh yes.", "No."),  # an answer that begins as a short prompt does
        pair(),
    ]
    report = run(rows, tokenizer).report
    assert (report.repeated_prompts, report.unevenly_repeated) == (1, 1)
    lines = report.lines()
    assert "train: in 1 rows both completions repeat the prompt" in lines
    assert "train: in 1 rows one completion repeats the prompt and another does not" in lines


def test_scores_that_do_not_bear_out_the_order_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    """Training goes by the order; what the rows say of it themselves is read for this alone."""
    scores = [(7.0, 3.0), (3.0, 7.0), (5.0, 5.0), ("8", "7.5"), (None, 2.0), ("bad", "good")]
    rows = [pair(f"Q{k}") | {"score_chosen": a, "score_rejected": b} for k, (a, b) in enumerate(scores[:3])]
    prepared = run(rows, tokenizer)
    assert prepared.report.not_borne_out == 2
    assert "train: in 2 rows the score of the chosen completion is not above the rejected one's" in (
        prepared.report.lines()
    )
    names = {"chosen-rating": 0, "rejected-rating": 1}
    text = [
        pair(f"Q{k}") | {name: both[i] and str(both[i]) for name, i in names.items()} for k, both in enumerate(scores)
    ]
    assert run(text, tokenizer).report.not_borne_out == 2
    # Negative controls: columns that are no scores, and one without the other.
    for columns in ({"chosen_model": "a", "rejected_model": "b"}, {"score_chosen": 1.0}):
        assert run([pair() | columns], tokenizer).report.not_borne_out == 0


def test_the_report_is_plain_json_and_its_totals_add_up(chatml: PreTrainedTokenizerFast) -> None:
    named = {**assistant("A"), "weight": 1}
    prepared = run([chat(origin := "Hi") | {"origin": origin}, pair([user("Hi")], [named], [assistant("B")])], chatml)
    plain = json.loads(json.dumps(prepared.report.to_dict()))
    assert plain["unused_columns"] == ["origin"]
    assert plain["message_fields"] == ["weight"]
    assert (plain["form"], len(plain["template_hash"]), plain["max_length"]) == ("conversational", 16, None)
    rows = list(prepared.dataset)
    completions = sum(len(ids) for row in rows for ids in row["completion_ids"])
    assert plain["completion_tokens"] == completions
    assert plain["tokens"] == completions + sum(len(row["prompt_ids"]) for row in rows)
    assert prepared.report.lines()[0].startswith("train: 2 of 2 pairs, ")


def test_a_clean_data_set_is_reported_in_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(run([pair()], tokenizer).report.lines()) == 1


def test_inv_37_equal_rows_have_an_equal_fingerprint_and_other_ids_another(tokenizer: PreTrainedTokenizerFast) -> None:
    first, again = run(numbered(9), tokenizer), run(numbered(9), byte_level(eos_token="<eos>"))
    assert first.report.fingerprint == again.report.fingerprint == first.dataset._fingerprint
    assert run(numbered(8), tokenizer).report.fingerprint != first.report.fingerprint
    assert run(numbered(9), tokenizer, max_length=6).report.fingerprint != first.report.fingerprint


def test_several_batches_and_processes_give_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = numbered(2100)
    alone, shared = run(rows, tokenizer), run(rows, tokenizer, num_proc=2)
    assert alone.dataset["source_row"][:] == list(range(2100))
    assert (shared.report, shared.row_digests) == (alone.report, alone.row_digests)
    assert shared.dataset[:] == alone.dataset[:]


def test_a_shuffled_and_formatted_data_set_is_read_by_its_own_order(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_list(numbered(5)).select([4, 2]).with_format("torch")
    prepared = prepare(rows, tokenizer, max_length=None)
    assert [tokenizer.decode(row["prompt_ids"]) for row in prepared.dataset] == ["5 + 5 =", "3 + 3 ="]
    assert prepared.dataset["source_row"][:] == [0, 1]


def test_a_processor_gives_its_tokenizer() -> None:
    class Processor:
        tokenizer = chat_tokenizer()

    assert run([chat()], Processor()).dataset[:] == run([chat()], Processor.tokenizer).dataset[:]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_length": 1}, "max_length is 1"),
        ({"truncation_mode": "ends"}, "truncation_mode is 'ends'"),
        ({"boundary": "merge"}, "boundary is 'merge'; it must be `split`, `drop` or `error`"),
        ({"num_proc": 0}, "num_proc is 0; it must be at least 1"),
    ],
)
def test_wrong_options_are_refused_before_rows_are_read(option: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare("no/such/file.jsonl", byte_level(), **{"max_length": 8, **option})


def test_the_search_for_cycles_is_paused_for_a_batch_and_goes_on(tokenizer, monkeypatch):
    seen = []
    plain = Tally.add

    def watched(self, other):
        seen.append(gc.isenabled())
        plain(self, other)

    looked = MarkerFinder.find
    inside = []
    monkeypatch.setattr(Tally, "add", watched)
    monkeypatch.setattr(MarkerFinder, "find", lambda *all_of: inside.append(gc.isenabled()) or looked(*all_of))
    run(numbered(3), tokenizer)
    assert (seen, set(inside)) == ([True], {False})
    with pytest.raises(ZeroDivisionError), paused_collector():
        raise ZeroDivisionError
    assert gc.isenabled()
    gc.disable()
    try:
        run(numbered(1), tokenizer)
        assert not gc.isenabled(), "who has switched it off finds it off"
    finally:
        gc.enable()
