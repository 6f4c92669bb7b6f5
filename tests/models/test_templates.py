"""Chat templates by name, as text and as a fallback, and special tokens: against the templates of TRL's own folder."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from tether.errors import ConfigError
from tether.models.chat_template import LIBRARY, TURNS, use_chat_template
from tether.models.spec import check_special_tokens, use_tokens
from tiny import tiny_tokenizer

TALK = [
    {"role": "user", "content": "2 + 2 ="},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "and 3?"},
    {"role": "assistant", "content": "7"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]
# Name to the file that TRL keeps of the same template.
OF_TRL = {
    "cohere": "cohere",
    "gemma": "gemma",
    "gemma3": "gemma3",
    "llama3": "llama3",
    "phi3": "phi3",
    "qwen2_vl": "qwen2_5_vl",
    "qwen25": "qwen2_5",
    "qwen3": "qwen3",
}
# Those that TRL has no file of: the talk with a system message before it, and what opens an answer after it.
WRITTEN = {
    "alpaca": (
        "<s>Be brief.\n\n### Instruction:\n2 + 2 =\n\n### Response:\n4</s>\n\n### Instruction:\nand 3?\n\n"
        "### Response:\n7</s>",
        "\n\n### Response:\n",
    ),
    "deepseek_v2": (
        "<s>Be brief.\n\n<\uff5cUser\uff5c>2 + 2 =<\uff5cAssistant\uff5c>4</s>"
        "<\uff5cUser\uff5c>and 3?<\uff5cAssistant\uff5c>7</s>",
        "<\uff5cAssistant\uff5c>",
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]2 + 2 =\n[|assistant|]4[|endofturn|]\n[|user|]and 3?\n"
        "[|assistant|]7[|endofturn|]\n",
        "[|assistant|]",
    ),
    "falcon_h1": (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2 =<|im_end|>\n<|im_start|>assistant\n4"
        "<|im_end|>\n<|im_start|>user\nand 3?<|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "phi3_older": (
        "<s><|system|>\nBe brief.<|end|>\n<|user|>\n2 + 2 =<|end|>\n<|assistant|>\n4<|end|>\n<|user|>\nand 3?<|end|>\n"
        "<|assistant|>\n7<|end|>\n",
        "<|assistant|>\n",
    ),
}
NO_SYSTEM = ("gemma",)
# What LLaMA-Factory 0.9.5 and Axolotl 0.19 write for families whose turns stand in a table, in their own code: with a
# system message, without one, and with an answer opened; where neither has one, from the family's documentation.
TURNS_WRITTEN: dict[str, list[str]] = json.loads(
    (Path(__file__).parents[1] / "support" / "turns.json").read_text(encoding="utf-8")
)


def written(source: str, messages: list[dict[str, Any]], **how: bool) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    use_chat_template(tokenizer, source)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **how))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(LIBRARY) - TURNS.keys()))
def test_a_template_by_name_writes_what_its_model_was_trained_on(name: str) -> None:
    talks = [TALK, TALK[:1], *([] if name in NO_SYSTEM else [[*SYSTEM, *TALK]])]
    for talk in talks:
        for opening in (False, True):
            found = written(name, talk, add_generation_prompt=opening)
            if name in OF_TRL:
                pytest.importorskip("trl")
                text = resources.files("trl").joinpath("chat_templates", f"{OF_TRL[name]}.jinja").read_text()
                assert found == written(text, talk, add_generation_prompt=opening)
            elif name in WRITTEN:
                whole, opened = WRITTEN[name]
                if talk is (TALK if name in NO_SYSTEM else talks[-1]):
                    assert found == whole + opened * opening
                if name not in ("alpaca", "exaone"):
                    assert whole.endswith(written(name, TALK[2:]).removeprefix("<s>"))
            elif name == "llama3_2_vision":
                theirs = resources.files("trl").joinpath("chat_templates", "llama3_2.jinja").read_text()
                assert found == written(theirs, talk, add_generation_prompt=opening)
            else:
                end = "<|im_end|>" if name == "chatml" else "</s>"
                assert found.count(end) == len(talk)
                assert found.endswith("assistant\n" if name == "chatml" else "<|assistant|>\n") == opening


@pytest.mark.filterwarnings("ignore")
def test_the_turns_of_a_family_are_those_that_the_tools_write() -> None:
    assert TURNS_WRITTEN.keys() == TURNS.keys()
    for name, (told, bare, opened) in TURNS_WRITTEN.items():
        assert written(name, [*SYSTEM, *TALK]).rstrip("\n") == told, name
        assert written(name, TALK).rstrip("\n") == bare, name
        assert written(name, TALK[:1], add_generation_prompt=True).rstrip("\n") == opened, name


def test_what_a_template_has_no_place_for_is_refused_or_left_out() -> None:
    for name in NO_SYSTEM:
        with pytest.raises(TemplateError, match="this template has"):
            written(name, [*SYSTEM, *TALK])
    thinking = [*TALK[:3], {"role": "assistant", "content": "<think>\n3 + 4\n</think>\n\n7"}]
    theirs = resources.files("trl").joinpath("chat_templates", "qwen3.jinja").read_text()
    assert written("qwen3", thinking) == written(theirs, thinking)
    assert written("qwen3", [*thinking, TALK[0]]) == written(theirs, [*thinking, TALK[0]])
    asked = {"add_generation_prompt": True, "enable_thinking": False}
    assert written("qwen3", TALK[:1], **asked) == written(theirs, TALK[:1], **asked)
    seen = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A film?"}]}]
    vision = written("llama3_2_vision", seen)
    assert vision == "<s><|start_header_id|>user<|end_header_id|>\n\n<|image|>A film?<|eot_id|>"
    assert written("pixtral", seen) == "<s>[INST][IMG]A film?[/INST]"
    assert written("llava", seen) == "USER: <image>\nA film? "
    with pytest.raises(TemplateError, match="no place for a system message beside images"):
        written("llama3_2_vision", [*SYSTEM, *seen])
    for name, messages, problem in (
        ("jamba", seen, "writes no images"),
        ("llama4", [{"role": "tool", "content": "4"}], "has places for system, user and assistant"),
    ):
        with pytest.raises(TemplateError, match=problem):
            written(name, messages)
    for name in ("gemma3", "qwen2_vl"):
        theirs = resources.files("trl").joinpath("chat_templates", f"{OF_TRL[name]}.jinja").read_text()
        assert written(name, seen) == written(theirs, seen)


def test_a_fallback_is_taken_where_there_is_none() -> None:
    for own, expected in ((None, "<|im_start|>user\n2 + 2 =<|im_end|>\n"), ("{{ 'own' }}", "own")):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = own
        use_chat_template(tokenizer, "fallback:chatml")
        assert tokenizer.apply_chat_template(TALK[:1], tokenize=False) == expected


def test_special_tokens_are_set_and_those_that_are_new_are_added() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    assert use_tokens(tokenizer, ["<new>"], {"eos_token": "<end>", "bos_token": "<new>"}) == [size, size + 1]
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token) == ("<end>", size + 1, "<new>")
    with pytest.raises(ConfigError, match="special_tokens has 'end': 'x'; allowed are bos_token"):
        check_special_tokens({"end": "x"})
