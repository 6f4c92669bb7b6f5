"""Rows of every kind come out as examples: ranked lists, labelled completions, texts, conversations, prompts."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import PreTrainedTokenizerFast

from data.samples import CHATML, PLAIN, THINKING, assistant, byte_level, chat, chat_tokenizer, metaspace, pair, user
from tether.data import Prepared, example_from_row, kind_of, overlap, prepare
from tether.errors import ConfigError, DataError

HISTORY = [user("Hi"), assistant("Hello there"), user("Who are you?"), assistant("A small model")]


def run(rows: Any, tokenizer: PreTrainedTokenizerFast, kind: str, **options: Any) -> Prepared:
    return prepare(rows, tokenizer, **{"max_length": None, "kind": kind, **options})


def said(tokenizer: PreTrainedTokenizerFast, row: Any) -> tuple[str, list[str]]:
    """Prompt and completions of a prepared row as text."""
    return tokenizer.decode(row["prompt_ids"]), [tokenizer.decode(ids) for ids in row["completion_ids"]]


def scored_text(tokenizer: PreTrainedTokenizerFast, row: Any, k: int = 0) -> str:
    ids, mask = row["completion_ids"][k], row["scored"][k]
    assert len(ids) == len(mask)
    return tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if on])


# -- ranked ------------------------------------------------------------------------------------------------------------


def test_equal_scores_are_counted(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """They stay in the order that they stand in, which nobody may have meant."""
    scores = [[1.0, 2.0, 1.0], [3, 1, 2], ["4", "4.0", "1"]]
    rows = [{"prompt": "Q", "completions": [" a", " b", " c"], "scores": one} for one in scores[:2]]
    prepared = run(rows, byte_tokenizer, "ranked")
    assert prepared.report.not_borne_out == 1
    said = "in 1 rows completions have equal `scores` and are ranked in the order that they stand in"
    assert f"train: {said}" in prepared.report.lines()
    text = [{**rows[0], "scores": one} for one in (scores[2], ["4", "2", "1"])]
    assert run(text, byte_tokenizer, "ranked").report.not_borne_out == 1


def test_a_ranked_list_keeps_its_order_and_its_length(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "The sky is", "completions": [" blue", " grey", " green"]}, {"prompt": "A", "completions": "xy"}]
    rows[1]["completions"] = [" x", " y"]
    prepared = run(rows, byte_tokenizer, "ranked")
    assert [said(byte_tokenizer, row)[1] for row in prepared.dataset] == [
        [" blue<eos>", " grey<eos>", " green<eos>"],
        [" x<eos>", " y<eos>"],
    ]
    assert prepared.report.lengths["completion"]["max"] == max(
        len(ids) for row in prepared.dataset for ids in row["completion_ids"]
    )


def test_scores_put_the_best_first_and_equal_scores_keep_their_order(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "The sky is", "completions": [" green", " blue", " grey", " red"], "scores": [0, 2.5, 1, 1]}
    [out] = run([row], byte_tokenizer, "ranked").dataset
    assert said(byte_tokenizer, out)[1] == [" blue<eos>", " grey<eos>", " red<eos>", " green<eos>"]


@pytest.mark.parametrize("given", [("9", "10"), (Decimal("0.9"), Decimal("1.1"))])
def test_scores_may_be_text_or_exact_numbers(given: tuple[object, object], byte_tokenizer: Any) -> None:
    """As JSON of other tools and tables of databases have them; 10 is more than 9, which its text is not."""
    row = {"prompt": "The sky is", "completions": [" green", " blue"], "scores": list(given)}
    [out] = run([row], byte_tokenizer, "ranked").dataset
    assert said(byte_tokenizer, out)[1] == [" blue<eos>", " green<eos>"]


@pytest.mark.parametrize("names", [["good", "bad"], ["bad", "good"], ["true", "false"], ["0", "1", "2"]])
def test_labels_that_are_classes_are_read_only_where_their_names_say_it(
    names: list[str], tmp_path: Path, byte_tokenizer: Any
) -> None:
    """Of the classes good and bad, 0 may be good: the number alone would turn every label over."""
    rows = {"prompt": ["A", "B"], "completion": [" x", " y"], "label": [0, 1]}
    for known, refused in ((names, True), (["False", "True"], False)):
        features = Features(prompt=Value("string"), completion=Value("string"), label=ClassLabel(names=known))
        held = Dataset.from_dict(rows, features=features)
        for part in ("a", "b"):
            held.to_parquet(tmp_path / f"{part}.parquet")
        for source, count in ((held, 2), (tmp_path / "a.parquet", 2), (tmp_path, 4)):
            if refused:
                with pytest.raises(
                    DataError, match=rf"`label` holds the classes `{known[0]}` \(0\), `{known[1]}` \(1\)"
                ):
                    run(source, byte_tokenizer, "unpaired")
            else:
                assert [row["label"] for row in run(source, byte_tokenizer, "unpaired").dataset] == [0, 1] * (
                    count // 2
                )


@pytest.mark.parametrize("label", ["1.0", "TRUE", "1", 1.0, Decimal(1)])
def test_labels_as_tables_write_them(label: object, byte_tokenizer: Any) -> None:
    row = {"prompt": "A", "completion": " x", "label": label}
    assert run([row], byte_tokenizer, "unpaired").dataset[0]["label"] == 1


def test_a_ranked_list_that_says_one_thing_twice_is_dropped(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "A", "completions": [" x", " y", " x"]}, {"prompt": "A", "completions": [" x", " y"]}]
    assert run(rows, byte_tokenizer, "ranked").report.dropped["identical"] == 1


# -- what a template is given ------------------------------------------------------------------------------------------


def test_arguments_that_a_template_does_not_know_are_named() -> None:
    """A misspelt `enable_thinking` changes nothing, and nothing said so."""
    tokenizer = chat_tokenizer("{% if enable_thinking %}{{ 'Think. ' }}{% endif %}" + CHATML)
    rows = [chat() | {"chat_template_kwargs": {name: True}} for name in ("enable_thinking", "enable_thinkng")]
    report = run(rows, tokenizer, "pair").report
    assert report.unwritten == {"argument `enable_thinkng`": 1}
    assert any(
        "not written by the chat template: argument `enable_thinkng` (of 1 rows)" in one for one in report.lines()
    )
    given = run([chat()], tokenizer, "pair", template_arguments={"thinking": True}).report
    assert given.unwritten == {"argument `thinking`": 1}


def test_arguments_of_calls_that_were_encoded_twice_are_the_object_that_they_hold() -> None:
    template = CHATML.replace(
        "+ message['content']", "+ (message.tool_calls | tojson if message.tool_calls else message.content)"
    )
    tokenizer, written = chat_tokenizer(template), []
    for arguments in ({"a": 1}, '{"a": 1}', json.dumps('{"a": 1}')):
        call = {**assistant(""), "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        row = {"prompt": [user("Hi")], "chosen": [call], "rejected": [assistant("No")]}
        written.append(said(tokenizer, run([row], tokenizer, "pair").dataset[0])[1][0])
    assert len(set(written)) == 1
    assert '{"a": 1}' in written[0]


# -- unpaired ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[True, False], [1, 0], [1.0, 0.0], ["true", "False"], ["1", "0"]])
def test_labels_become_1_and_0(labels: list, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "The sky is", "completion": " blue", "label": label} for label in labels]
    prepared = run(rows, byte_tokenizer, "unpaired")
    assert prepared.dataset["label"][:] == [1.0, 0.0]
    assert [example_from_row(row).values for row in prepared.dataset] == [{"label": 1.0}, {"label": 0.0}]
    assert prepared.report.values == {"label": 0.5}
    assert "train: 50.0% labelled desirable" in prepared.report.lines()


def test_pairs_are_read_as_two_labelled_rows_each(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair(), pair("Why?"), pair(chosen=" green.")]
    prepared = run(rows, byte_tokenizer, "unpaired")
    assert prepared.dataset["source_row"][:] == [0, 0, 1, 1]
    assert prepared.dataset["label"][:] == [1.0, 0.0, 1.0, 0.0]
    assert said(byte_tokenizer, prepared.dataset[1]) == ("The sky is", [" green.<eos>"])
    report = prepared.report
    assert (report.rows, report.kept, report.dropped["identical"]) == (6, 4, 2)
    as_pairs = run(rows, byte_tokenizer, "pair").dataset
    alone = [[row["completion_ids"][0]] for row in prepared.dataset]
    assert alone == [[ids] for row in as_pairs for ids in row["completion_ids"]]


def test_the_same_words_with_another_label_are_no_duplicate(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "The sky is", "completion": " blue", "label": True}
    prepared = run([row, row, {**row, "label": False}], byte_tokenizer, "unpaired")
    assert prepared.report.duplicates == 1
    assert overlap(prepared, run([row], byte_tokenizer, "unpaired")).to_dict()["rows"] == 2


# -- texts and conversations -------------------------------------------------------------------------------------------


def test_prompt_and_completion(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    [row] = run([{"prompt": "The sky is", "completion": " blue."}], byte_tokenizer, "completion").dataset
    assert said(byte_tokenizer, row) == ("The sky is", [" blue.<eos>"])


def test_a_text_is_scored_from_its_second_token_on(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    [row] = run([{"text": "The sky is blue."}], byte_tokenizer, "completion").dataset
    whole = byte_tokenizer("The sky is blue.")["input_ids"]
    assert (row["prompt_ids"], row["completion_ids"]) == (whole[:1], [[*whole[1:], byte_tokenizer.eos_token_id]])


def test_a_text_after_a_bos_token_is_scored_as_a_whole() -> None:
    tokenizer = metaspace()
    [row] = run([{"text": "The sky is blue."}], tokenizer, "completion").dataset
    assert row["prompt_ids"] == [tokenizer.bos_token_id]
    assert [*row["prompt_ids"], *row["completion_ids"][0]] == [
        *tokenizer("The sky is blue.")["input_ids"],
        tokenizer.eos_token_id,
    ]


def test_a_conversation_is_scored_as_a_whole_unless_told_otherwise(chatml: PreTrainedTokenizerFast) -> None:
    [row] = run([{"messages": HISTORY}], chatml, "completion").dataset
    whole = chatml.apply_chat_template(HISTORY, return_dict=False)
    assert [*row["prompt_ids"], *row["completion_ids"][0]] == whole[:-1]  # but for the newline after the last turn
    assert len(row["prompt_ids"]) == 1


@pytest.mark.parametrize("template", [CHATML, THINKING, PLAIN])
def test_only_what_the_assistant_says_is_scored(template: str) -> None:
    tokenizer = chat_tokenizer(template, eos_token="<|im_end|>")
    end = "\n" if template == PLAIN else "<|im_end|>"
    [row] = run([{"messages": HISTORY}], tokenizer, "completion", turns="assistant").dataset
    assert scored_text(tokenizer, row) in (
        f"Hello there{end}A small model{end}",
        f"Hello there{end}A small model{end}<|im_end|>",  # PLAIN writes no end of turn, so one was added
    )
    whole = tokenizer.decode(row["prompt_ids"] + row["completion_ids"][0])
    assert whole.startswith(tokenizer.apply_chat_template(HISTORY, tokenize=False).removesuffix("\n"))


def test_only_the_last_turn_is_scored(chatml: PreTrainedTokenizerFast) -> None:
    prepared = run([{"messages": HISTORY}], chatml, "completion", turns="last")
    assert scored_text(chatml, prepared.dataset[0]) == "A small model<|im_end|>"
    assert prepared.report.scored_tokens == sum(prepared.dataset[0]["scored"][0]) < prepared.report.completion_tokens


def test_turns_of_a_pair(chatml: PreTrainedTokenizerFast) -> None:
    chosen = [assistant("A"), user("And then?"), assistant("B")]
    row = pair([user("Hi")], chosen, [assistant("C")])
    [every], [last] = (run([row], chatml, "pair", turns=turns).dataset for turns in ("assistant", "last"))
    assert [scored_text(chatml, every, k) for k in (0, 1)] == ["A<|im_end|>B<|im_end|>", "C<|im_end|>"]
    assert [scored_text(chatml, last, k) for k in (0, 1)] == ["B<|im_end|>", "C<|im_end|>"]
    assert every["completion_ids"] == run([row], chatml, "pair").dataset[0]["completion_ids"]


def test_a_turn_that_is_continued_is_scored_from_where_it_is_continued(chatml: PreTrainedTokenizerFast) -> None:
    row = pair([user("Hi"), assistant("I am")], [assistant(" a model.")], [assistant(" the sea.")])
    [out] = run([row], chatml, "pair", turns="assistant").dataset
    assert scored_text(chatml, out) == " a model.<|im_end|>"


def test_a_template_that_drops_earlier_thoughts_still_masks_the_right_turns() -> None:
    """As Qwen3's does: the thoughts of all turns but the last are left out."""
    drops = (
        "{% for message in messages %}{% set text = message['content'] %}"
        "{% if not loop.last and '</think>' in text %}{% set text = text.split('</think>')[1] %}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + text + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = chat_tokenizer(drops)
    talk = [user("Hi"), assistant("<think>a</think>Hello"), user("Who?"), assistant("<think>b</think>A model")]
    [row] = run([{"messages": talk}], tokenizer, "completion", turns="assistant").dataset
    assert scored_text(tokenizer, row) == "Hello<|im_end|><think>b</think>A model<|im_end|>"


def test_rows_of_which_truncation_leaves_nothing_scored_are_dropped(chatml: PreTrainedTokenizerFast) -> None:
    long = [user("Hi"), assistant("A"), user("The sky is blue " * 20), assistant("B")]
    rows = [{"messages": long}, {"messages": HISTORY}]
    report = run(rows, chatml, "completion", turns="last", max_length=60).report
    assert (report.kept, report.dropped["nothing_scored"]) == (1, 1)


def test_truncation_cuts_the_mask_with_the_tokens(chatml: PreTrainedTokenizerFast) -> None:
    [whole] = run([{"messages": HISTORY}], chatml, "completion", turns="assistant").dataset
    length = len(whole["prompt_ids"]) + 5
    [cut] = run([{"messages": HISTORY}], chatml, "completion", turns="assistant", max_length=length).dataset
    assert cut["scored"] == [whole["scored"][0][:5]]
    assert (cut["prompt_ids"], cut["completion_ids"]) == (whole["prompt_ids"], [whole["completion_ids"][0][:5]])


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_alone_are_opened_for_an_answer(
    chatml: PreTrainedTokenizerFast, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    [row] = run([chat()], chatml, "prompt_only").dataset
    assert said(chatml, row) == ("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n", [])
    prepared = run([{"prompt": "The sky is", "solution": "blue"}], byte_tokenizer, "prompt_only")
    assert said(byte_tokenizer, prepared.dataset[0]) == ("The sky is", [])
    assert prepared.report.unused_columns == ("solution",)
    assert list(prepared.report.lengths) == ["prompt"]


# -- numbers, tools and arguments of the template ----------------------------------------------------------------------


def test_weight_and_margin_become_columns(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    prepared = run([pair(weight=2, margin="0.5"), pair("Why?", weight=0, margin="-1.5")], byte_tokenizer, "pair")
    assert prepared.dataset["weight"][:] == [2.0, 0.0]
    assert prepared.dataset["margin"][:] == [0.5, -1.5]
    assert "weight" not in run([pair(weight=None)], byte_tokenizer, "pair").dataset.column_names


WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call['function']['arguments'] | tojson }}{% endfor %}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + ('quiet' if quiet else '') }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def call(**arguments: Any) -> dict:
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


@pytest.mark.parametrize("make", [list, Dataset.from_list])
def test_tools_and_tool_calls_reach_the_template(make: Any) -> None:
    tokenizer = chat_tokenizer(WITH_TOOLS)
    rows = [
        pair([user("Hi")], [call(place="here")], [assistant("no")], tools=[TOOL]),
        pair([user("Hi")], [call(time="now")], [assistant("no")], tools=None),
    ]
    first, second = run(make(rows), tokenizer, "pair").dataset
    assert said(tokenizer, first)[0].startswith('<|im_start|>tools\n[{"type": "function"')
    assert said(tokenizer, second)[0].startswith("<|im_start|>user")
    assert [said(tokenizer, row)[1][0] for row in (first, second)] == [
        '{"place": "here"}<|im_end|>',
        '{"time": "now"}<|im_end|>',
    ]


def test_tools_may_be_spelled_out_as_json(chatml: PreTrainedTokenizerFast) -> None:
    tokenizer = chat_tokenizer(WITH_TOOLS)
    rows = [chat() | {"tools": [TOOL]}], [chat() | {"tools": json.dumps([TOOL])}]
    first, second = (run(one, tokenizer, "pair").dataset[:] for one in rows)
    assert first == second


def test_arguments_of_tool_calls_keep_their_nulls_and_may_differ_in_type() -> None:
    tokenizer = chat_tokenizer(WITH_TOOLS)
    rows = [pair([user("Hi")], [call(place=place)], [assistant("no")]) for place in (None, 3, "here", ["a"])]
    said_by_tools = [said(tokenizer, row)[1][0] for row in run(rows, tokenizer, "pair").dataset]
    assert said_by_tools == [f'{{"place": {place}}}<|im_end|>' for place in ("null", "3", '"here"', '["a"]')]


def test_arguments_of_the_template_are_per_row() -> None:
    tokenizer = chat_tokenizer(WITH_TOOLS)
    rows = [chat() | {"chat_template_kwargs": {"quiet": quiet}} for quiet in (True, False)]
    quiet, loud = run(rows, tokenizer, "prompt_only").dataset
    assert said(tokenizer, quiet)[0].endswith("assistant\nquiet")
    assert said(tokenizer, loud)[0].endswith("assistant\n")
    rows = [chat(), chat() | {"chat_template_kwargs": {"quiet": False}}]
    whole, own = run(rows, tokenizer, "prompt_only", template_arguments={"quiet": True}).dataset
    assert [whole["prompt_ids"], own["prompt_ids"]] == [quiet["prompt_ids"], loud["prompt_ids"]]
    with pytest.raises(ConfigError, match="sets `tokenize`, which Tether sets itself"):
        run(rows, tokenizer, "prompt_only", template_arguments={"tokenize": True})
    with pytest.raises(ConfigError, match="the row is text, which no chat template writes"):
        run([{"prompt": "x"}], tokenizer, "prompt_only", template_arguments={"quiet": True})


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "row", "fault"),
    [
        (
            "ranked",
            {"prompt": "A", "completions": [" x"]},
            "`completions` is a list of one item; it must be a list of two",
        ),
        ("ranked", {"prompt": "A", "completions": " x"}, "`completions` is text"),
        ("ranked", {"prompt": "A", "completions": [" x", None]}, r"`completions\[2\]` is missing \(null\)"),
        ("ranked", {"prompt": "A", "completions": [" x", " y"], "scores": [1]}, "has 1 numbers for 2 completions"),
        ("ranked", {"prompt": "A", "completions": [" x", " y"], "scores": ["a", "b"]}, r"`scores\[1\]` is text"),
        ("ranked", {"prompt": "A", "completions": [" x", " y"], "scores": [1, None]}, r"`scores\[2\]` is missing"),
        ("ranked", {"prompt": "A", "completions": [" x", " y"], "scores": ["1", "inf"]}, "a number that is not finite"),
        (
            "unpaired",
            {"prompt": "A", "completion": " x", "label": 2},
            r"`label` is a number \(2\); it must be true or f",
        ),
        ("unpaired", {"prompt": "A", "completion": " x", "label": None}, r"`label` is missing \(null\)"),
        ("unpaired", {"prompt": "A", "completion": " x", "label": "good"}, "`label` is text"),
        ("pair", pair(weight=-1), r"`weight` is a number \(-1\); it must be 0 or more"),
        ("pair", pair(margin="wide"), "`margin` is text .'wide'.; it must be a number"),
        ("pair", pair(margin=float("nan")), r"`margin` is a number .nan.; it must be a finite number"),
        ("pair", pair(tools=[TOOL]), "`tools` is given, but the row is text"),
        ("pair", chat() | {"tools": "f"}, "`tools` is text .'f'.; it must be a list of objects"),
        ("pair", chat() | {"chat_template_kwargs": {"tokenize": True}}, "sets `tokenize`, which Tether sets itself"),
        ("completion", {"text": 5}, r"`text` is a number \(5\)"),
        (
            "completion",
            {"prompt": [user("Hi")], "completion": [user("Hi")]},
            "the last message of `completion` is from the",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said(kind: str, row: dict, fault: str) -> None:
    with pytest.raises(DataError, match=f"row 1: .*{fault}"):
        run([row], chat_tokenizer(), kind)


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("pair", ["prompt", "completion", "label"], "these columns speak for rows of kind `unpaired`"),
        ("unpaired", ["prompt", "completion"], "`label` is missing. .* speak for rows of kind `completion`"),
        ("ranked", ["prompt", "chosen", "rejected"], "`completions` is missing. .* kind `pair`"),
        ("completion", ["body"], "A row has `prompt` and `completion`, or `messages`, or `text`; rename"),
        ("prompt_only", ["prompts"], "`prompts` looks like `prompt`"),
    ],
)
def test_columns_of_another_kind_are_recognised(kind: str, columns: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run([dict.fromkeys(columns, "a")], byte_level(eos_token="<eos>"), kind)


def test_masks_need_turns(byte_tokenizer: PreTrainedTokenizerFast, chatml: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="turns is `last`, but the rows are text, which has no turns"):
        run([pair()], byte_tokenizer, "pair", turns="last")
    with pytest.raises(DataError, match="row 1: `messages` has no answer of the assistant"):
        run([{"messages": [user("Hi")]}], chatml, "completion", turns="assistant")
    with pytest.raises(ConfigError, match="turns is 'first'; it must be `all`, `assistant`, `last`"):
        run([pair()], byte_tokenizer, "pair", turns="first")
    with pytest.raises(ConfigError, match="kind is 'pairs'; it must be `pair`, `ranked`"):
        run([pair()], byte_tokenizer, "pairs")


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["prompt", "chosen", "rejected", "messages"], "pair"),
        (["chosen", "rejected"], "pair"),
        (["prompt", "completions"], "ranked"),
        (["prompt", "completion", "label"], "unpaired"),
        (["prompt", "completion"], "completion"),
        (["prompt", "messages"], "completion"),
        (["text"], "completion"),
        (["prompt", "answer"], "prompt_only"),
        (["question"], None),
    ],
)
def test_columns_speak_for_a_kind(columns: list[str], kind: str | None) -> None:
    assert kind_of(columns) == kind
