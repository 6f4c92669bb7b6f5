"""Ends and masks on the real chat templates that the installed TRL ships: all of them, by what they write.

What is expected of each: a completion is the assistant's own text and one end; a mask holds what the assistant says
and nothing that a user, a system or a tool says; and what a template does not write is named. `FAMILIES` says, read off
each template's text, with what an answer ends in the midst of a conversation, at its end, and after a tool call. Where
TRL ships a variant of a template that marks what the assistant says, the mask that Tether measures for the plain one
covers those words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trl
from jinja2.exceptions import UndefinedError
from transformers import PreTrainedTokenizerFast

from data.samples import assistant, byte_level, pair, user
from tether.data import prepare
from tether.data.images.inputs import parts_template
from tether.data.text.template import chat_template
from tether.errors import DataError
from tether.models.chat_template import TURNS, use_chat_template

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
# Control tokens are written in angle brackets; what the templates hold of them is made special, as in the models' own
# tokenizers.
CONTROLS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    *("<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|observation|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_response>", "<tool_response|>", "<|tool>", "<tool|>", "<|channel>", "<channel|>", "<|think|>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    *("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|tool_call_start|>", "<|tool_call_end|>"),
    *(f"<\uff5c{word}\uff5c>" for word in ("User", "Assistant")),
    *(f"<\uff5c{word}\u2581of\u2581sentence\uff5c>" for word in ("begin", "end")),
    *(f"<\uff5ctool\u2581{word}\uff5c>" for word in ("calls\u2581begin", "call\u2581begin", "sep", "call\u2581end")),
    "<\uff5ctool\u2581calls\u2581end\uff5c>",
    "<|eot|>",
    *("<end_of_utterance>", "<tool_call>", "</tool_call>", "<think>", "</think>", "[gMASK]", "<sop>"),
)
# Beginning of a template's name to the end of an answer inside a conversation, at its end, and of one that calls a tool
# (None: the template writes no calls). GLM-4.5 writes no end, so that its last answer gets the tokenizer's; DeepSeek's
# end of sentence is its end of turn; Gemma 4 hands over to the tool, but for the one version that closes the turn.
_TURN, _IM, _EOT, _SENTENCE = (
    "<|END_OF_TURN_TOKEN|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
FAMILIES: dict[str, tuple[str, str, str | None]] = {
    "cohere": (_TURN, _TURN, None),
    "cohere2": (f"<|END_RESPONSE|>{_TURN}", f"<|END_RESPONSE|>{_TURN}", None),
    "deepseek_r1": (_SENTENCE, _SENTENCE, None),
    "deepseekv3": (_SENTENCE, _SENTENCE, f"<\uff5ctool\u2581calls\u2581end\uff5c>{_SENTENCE}"),
    "diffusion_gemma": ("<turn|>", "<turn|>", "<tool_call|><|tool_response>"),
    "gemma": ("<end_of_turn>", "<end_of_turn>", None),
    "gemma4": ("<turn|>", "<turn|>", "<tool_call|><|tool_response>"),
    "gemma4_v2": ("<turn|>", "<turn|>", "<tool_call|><turn|>"),
    "glm4moe": ("", "</s>", "</tool_call></s>"),
    "gptoss": ("<|end|>", "<|return|>", '{"city": "PARIS"}<|call|>'),
    "idefics3": ("<end_of_utterance>", "<end_of_utterance>", None),
    "lfm2": (_IM, _IM, None),
    "lfm2_2_5": (_IM, _IM, f"<|tool_call_end|>{_IM}"),
    "lfm2_v2": (_IM, _IM, f"<|tool_call_end|>{_IM}"),
    "llama3": (_EOT, _EOT, None),
    "llama3_1": (_EOT, _EOT, '"parameters": {"city": "PARIS"}}' + _EOT),
    "llama3_2": (_EOT, _EOT, '"parameters": {"city": "PARIS"}}' + _EOT),
    "llava_next": ("</s>", "</s>", None),
    "muse_glimmer": ("<|eot|>", "<|eot|>", "</atem:function_calls><|eot|>"),
    "nemotron_3": (_IM, _IM, f"</tool_call>\n{_IM}"),
    "phi3": ("<|end|>", "<|end|>", None),
    "qwen2_5": (_IM, _IM, f"</tool_call>{_IM}"),
    "qwen2_5_vl": (_IM, _IM, None),
    "qwen3": (_IM, _IM, f"</tool_call>{_IM}"),
    "smolvlm": ("<end_of_utterance>", "<end_of_utterance>", None),
}
TALK = [user("UONE asks"), assistant("AONE says"), user("UTWO asks"), assistant("ATWO says")]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Which"}}},
        },
    }
]


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {**assistant(""), "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}]}


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return byte_level(special=CONTROLS, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def use(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with a template; where it reads content in parts alone, as a processor's rows are given it."""
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = source
    try:
        written = tokenizer.apply_chat_template(TALK[:2], tokenize=False)
    except UndefinedError:
        written = ""
    if "AONE" not in str(written):
        tokenizer.chat_template = parts_template(source)
    return tokenizer


@pytest.fixture(params=NAMES)
def tokenizer(request: pytest.FixtureRequest, plain: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return use(request.param, plain)


def texts(rows: list[dict], tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[tuple[str, list[str]]]:
    found = prepare(rows, tokenizer, max_length=None, **options).dataset.with_format(None).to_list()
    return [(tokenizer.decode(r["prompt_ids"]), [tokenizer.decode(ids) for ids in r["completion_ids"]]) for r in found]


def scored(rows: list[dict], tokenizer: PreTrainedTokenizerFast, turns: str) -> list[str]:
    """The runs of scored tokens of a conversation, as text."""
    row = prepare(rows, tokenizer, max_length=None, kind="completion", turns=turns).dataset.with_format(None)[0]
    runs: list[list[int]] = []
    before = False
    for token, on in zip(row["completion_ids"][0], row["scored"][0], strict=True):
        if on and not before:
            runs.append([])
        if on:
            runs[-1].append(token)
        before = on
    return [tokenizer.decode(run) for run in runs]


def ends(completion: str) -> list[str]:
    """The control tokens behind the words of an answer."""
    words = completion[completion.rindex("says") + len("says") :]
    return [token for token in (*CONTROLS, "</s>") if token in words]


def test_there_are_templates_of_many_families() -> None:
    assert len(NAMES) >= 20


@pytest.mark.sweep(12)
def test_a_completion_is_the_answer_and_one_end(tokenizer: PreTrainedTokenizerFast) -> None:
    [(prompt, both)] = texts([pair([user("UONE asks")], [assistant("AONE says")], [assistant("ATWO says")])], tokenizer)
    for said, completion in zip(("AONE says", "ATWO says"), both, strict=True):
        assert said in completion
        assert "UONE" not in completion
        assert said not in prompt
        behind = completion[completion.index(said) + len(said) :]
        found = ends(completion)
        # Cohere closes the answer and then the turn; each of the two is written once.
        assert found
        assert behind.count(found[-1]) == 1
        assert behind.replace("<|END_RESPONSE|>", "").strip() in found


def family(name: str) -> tuple[str, str, str | None]:
    """Of the longest beginning of a template's name."""
    return FAMILIES[max((one for one in FAMILIES if name.startswith(one)), key=len)]


@pytest.mark.sweep(12)
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_training")])
def test_answers_end_as_the_family_ends_them(name: str, plain: PreTrainedTokenizerFast) -> None:
    inside, last, called = family(name)
    tokenizer = use(name, plain)
    first, second = scored([{"messages": TALK}], tokenizer, "assistant")
    assert first.endswith(f"AONE says{inside}")
    assert second.endswith(f"ATWO says{last}")
    rows = [
        pair([user("UONE asks")], [assistant("AONE says")], [assistant("ATWO says")]),
        pair([user("Weather?")], [call({"city": "PARIS"})], [assistant("It says no")], tools=TOOLS),
    ]
    said = texts(rows, tokenizer)
    assert [one[-len(f"AONE says{last}") :] for one in said[0][1]] == [f"AONE says{last}", f"ATWO says{last}"]
    assert (len(said) == 1) == (called is None)
    if called is not None:
        assert said[1][1][0].endswith(called)


@pytest.mark.sweep(12)
@pytest.mark.parametrize("turns", ["assistant", "last"])
def test_only_what_the_assistant_says_is_scored(tokenizer: PreTrainedTokenizerFast, turns: str) -> None:
    runs = scored([{"messages": TALK}], tokenizer, turns)
    whole = "".join(runs)
    said = ["AONE says", "ATWO says"] if turns == "assistant" else ["ATWO says"]
    assert [one for one in ("UONE", "AONE", "UTWO", "ATWO") if one in whole] == [one[:4] for one in said]
    assert len(runs) == len(said)
    for run, words in zip(runs, said, strict=True):
        assert words in run
        # No header of the next turn: nothing but the end follows the words.
        behind = run[run.index(words) + len(words) :]
        assert "user" not in behind.lower().replace("<|user|>", "")
        assert "asks" not in behind


@pytest.mark.sweep(12)
@pytest.mark.parametrize("name", sorted(TURNS))
def test_answers_of_a_family_in_the_table_are_scored_with_their_end(name: str, plain: PreTrainedTokenizerFast) -> None:
    turns = TURNS[name]
    while "answer" not in turns:
        turns = TURNS[turns["like"]]
    end = turns["answer"].partition("{}")[2].replace("{eos}", "</s>").strip()
    known = end in ("", "</s>", *CONTROLS)
    tokenizer = (
        plain if known else byte_level(special=(*CONTROLS, end), bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    )
    use_chat_template(tokenizer, name)
    first, second = scored([{"messages": TALK}], tokenizer, "assistant")
    # Of an answer that no token ends, the header of the next turn is no part.
    assert first.strip() == f"AONE says{end}"
    # An answer that ends in no token gets the tokenizer's end, behind the blanks that the template writes.
    assert "".join(second.split()) == f"ATWOsays{end or '</s>'}"


@pytest.mark.parametrize("name", [name for name in NAMES if f"{name}_training" in NAMES])
def test_measured_masks_cover_what_the_marked_variant_marks(name: str, plain: PreTrainedTokenizerFast) -> None:
    runs = []
    for one in (name, f"{name}_training"):
        found = scored([{"messages": TALK}], use(one, plain), "assistant")
        # Empty thoughts are where the two variants may differ, and GLM's ends, which one of them writes alone.
        bare = ["".join(run.replace("<think>", "").replace("</think>", "").split()) for run in found]
        runs.append([run[: run.index("says") + len("says")] for run in bare])
    measured, marked = runs
    assert measured == marked


@pytest.mark.sweep(12)
def test_a_tool_call_is_written_once_and_ends_once_or_the_row_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        pair([user("Weather?")], [call(arguments)], [assistant("It says no")], tools=TOOLS)
        for arguments in ({"city": "PARIS"}, '{"city": "PARIS"}')
    ]
    try:
        prepared = prepare(
            [*rows, pair([user("Hi")], [assistant("A says")], [assistant("B says")])], tokenizer, max_length=None
        )
    except DataError as error:
        pytest.skip(f"the template refuses tool calls: {str(error)[:80]}")
    dropped = prepared.report.dropped["unwritten"]
    assert dropped in (0, 2)
    if dropped:
        assert prepared.report.unwritten["tool calls"] == 2
        assert any("tool calls (of 2 rows)" in line for line in prepared.report.lines())
        return
    found = prepared.dataset.with_format(None).to_list()
    made = [tokenizer.decode(row["completion_ids"][0]) for row in found[:2]]
    assert made[0] == made[1]
    assert made[0].count("PARIS") == 1
    assert '\\"' not in made[0]
    behind = made[0][made[0].index("PARIS") + len("PARIS") :]
    last = [token for token in (*CONTROLS, "</s>") if made[0].endswith(token)]
    assert len(last) == 1
    # Where the template ends the call in a token of its own, the tokenizer's end is not added behind it.
    if any(token in behind for token in ("<|call|>", "<|tool_response>", "<|im_end|>", "<|eot_id|>")):
        assert behind.count(last[0]) == 1
        assert "</s>" not in behind


@pytest.mark.sweep(12)
def test_what_is_not_written_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair([user("Weather?")], [assistant("A says")], [assistant("B says")], tools=TOOLS)]
    report = prepare(rows, tokenizer, max_length=None).report
    written = tokenizer.apply_chat_template(
        rows[0]["prompt"], tools=TOOLS, tokenize=False, chat_template=chat_template(tokenizer)
    )
    assert ("tools" in report.unwritten) == ("get_weather" not in written)
    assert json.dumps(report.to_dict())
