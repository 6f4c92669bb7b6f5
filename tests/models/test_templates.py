"""Chat templates by name, as text and as a fallback, and special tokens: against the templates of TRL's own folder."""

from __future__ import annotations

from importlib import resources

import pytest

from tether.errors import ConfigError
from tether.models.chat_template import LIBRARY, use_chat_template
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
OF_TRL = {"llama3": "llama3", "gemma": "gemma", "phi3": "phi3", "qwen25": "qwen2_5"}


def written(source: str, messages: list[dict[str, str]], **how: bool) -> str:
    tokenizer = tiny_tokenizer()
    use_chat_template(tokenizer, source)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **how))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIBRARY)
def test_a_template_by_name_writes_what_its_model_was_trained_on(name: str) -> None:
    talks = [TALK, TALK[:1], *([] if name == "gemma" else [[*SYSTEM, *TALK]])]
    for talk in talks:
        for opening in (False, True):
            found = written(name, talk, add_generation_prompt=opening)
            if name in OF_TRL:
                pytest.importorskip("trl")
                text = resources.files("trl").joinpath("chat_templates", f"{OF_TRL[name]}.jinja").read_text()
                assert found == written(text, talk, add_generation_prompt=opening)
            else:
                end = "<|im_end|>" if name == "chatml" else tiny_tokenizer().eos_token
                assert found.count(end) == len(talk)
                assert found.endswith("assistant\n" if name == "chatml" else "<|assistant|>\n") == opening


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
