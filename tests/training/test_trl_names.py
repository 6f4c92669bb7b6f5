"""Every name that TRL exports is here, and computes the same, or is refused with what to write in its place."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset

import tether
import tether.trl as ours
from tether.errors import ConfigError
from tiny import tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "u"), ("assistant", "a"), ("assistant", "b"))
)


def test_every_name_of_trl_is_there_or_refused_with_a_sentence() -> None:
    names = {name for name in dir(trl) if name[0].isalpha() and name not in ("import_utils",)}
    names |= {"ORPOTrainer", "CPOConfig"}  # of earlier versions
    names = {name for name in names if not isinstance(getattr(trl, name, None), type(sys))}
    missing = names - set(ours.__all__) - ours.ABSENT.keys()
    assert missing == set()
    for module in (ours, tether):
        for name in names & set(ours.__all__):
            assert getattr(module, name) is getattr(ours, name)
        for name in ours.ABSENT:
            with pytest.raises(ImportError, match=f"has no {name}. "):
                getattr(module, name)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        ours.no_such_name  # noqa: B018
    assert not hasattr(tether, "no_such_name")
    for module, name in (
        ("experimental.orpo", "ORPOTrainer"),
        ("experimental.cpo", "CPOConfig"),
        ("scripts", "TrlParser"),
    ):
        assert getattr(importlib.import_module(f"tether.trl.{module}"), name) is getattr(ours, name)
    with pytest.raises(
        ModuleNotFoundError, match=r"no module tether\.trl\.trainer\. TRL's names are in one place here"
    ):
        importlib.import_module("tether.trl.trainer")
    with pytest.raises(ModuleNotFoundError, match=r"there are cpo, kto, online_dpo and orpo"):
        importlib.import_module("tether.trl.experimental.gkd")
    with pytest.raises(
        ModuleNotFoundError, match=r"experimental\.bco\. Use DPOTrainer with loss_type='bco_pair' on pairs"
    ):
        importlib.import_module("tether.trl.experimental.bco")
    from trl.rewards import _import_structure

    from tether.trl import rewards

    assert {name for group in _import_structure.values() for name in group} == set(rewards.__all__)


ROWS: list[dict[str, Any]] = [
    {"messages": [USER, GOOD]},
    {"prompt": [USER]},
    {"prompt": [USER, {"role": "assistant", "content": "so"}], "completion": [GOOD]},
    {"prompt": [USER], "completion": [GOOD], "label": True},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "text", "chosen": " a", "rejected": " b"},
]


@pytest.mark.parametrize("row", ROWS)
def test_helpers_of_rows_are_trls(row: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert ours.is_conversational(row) == trl.is_conversational(row)
    assert ours.maybe_apply_chat_template(row, tokenizer) == trl.maybe_apply_chat_template(row, tokenizer)
    assert ours.maybe_extract_prompt(row) == trl.maybe_extract_prompt(row)
    assert ours.maybe_convert_to_chatml(row) == trl.maybe_convert_to_chatml(row)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("The sky is blue.", "The sky is green."), ("same", "same"), ("ab", "abc"), ([USER, GOOD], [USER, BAD])],
)
def test_a_shared_prompt_is_trls(chosen: Any, rejected: Any) -> None:
    row = {"chosen": chosen, "rejected": rejected}
    assert ours.extract_prompt(row) == trl.extract_prompt(row)


def test_sets_and_images_are_trls() -> None:
    pairs = Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b", "n": 1}] * 2)
    for rows in (pairs, Dataset.from_list([{"text": "x"}])):
        mine, theirs = ours.maybe_unpair_preference_dataset(rows), trl.maybe_unpair_preference_dataset(rows)
        assert mine.to_list() == theirs.to_list()
    talk = [{"role": "system", "content": "s"}, USER, GOOD, USER]
    assert ours.prepare_multimodal_messages(talk, ["x"]) == trl.prepare_multimodal_messages(talk, ["x"])
    assert ours.prepare_multimodal_messages(talk) == trl.prepare_multimodal_messages(talk)
    with pytest.raises(ValueError, match="There are 2 images, and 1 places"):
        ours.prepare_multimodal_messages([{"role": "user", "content": [{"type": "image"}]}], ["x", "y"])
    old = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert ours.maybe_convert_to_chatml(old) == trl.maybe_convert_to_chatml(old)
    with pytest.raises(ConfigError, match="got a row with completion"):
        ours.apply_chat_template({"completion": [GOOD]}, tiny_tokenizer())


def test_a_template_is_cloned_as_trl_clones_it(tmp_path: Any) -> None:
    source = tiny_tokenizer()
    source.chat_template = TEMPLATE
    source.add_tokens(["<|turn|>"])
    source.eos_token = "<|turn|>"
    source.save_pretrained(tmp_path)
    found = []
    for module in (ours, trl):
        torch.manual_seed(0)
        tokenizer = tiny_tokenizer()
        model = tiny_model(vocab_size=len(tokenizer))
        model, tokenizer, new = module.clone_chat_template(model, tokenizer, str(tmp_path), 16)
        rows = model.get_input_embeddings().weight.shape
        found.append((tokenizer.chat_template, tokenizer.eos_token, tokenizer.get_vocab(), new, rows))
    assert found[0] == found[1]


def test_a_frozen_copy_shares_nothing() -> None:
    model = tiny_model()
    copy = ours.create_reference_model(model)
    assert not copy.training
    pairs = list(zip(model.parameters(), copy.parameters(), strict=True))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() and not b.requires_grad for a, b in pairs)
    assert all(one.requires_grad for one in model.parameters())
    with pytest.raises(ConfigError, match="layers that are shared would move"):
        ours.create_reference_model(model, num_shared_layers=1)
    assert ours.get_training_chat_template(tiny_tokenizer()) is None


def test_rewards_are_trls() -> None:
    from trl import rewards as theirs

    from tether.trl import rewards

    ids = [[1, 2, 3, 1, 2, 3], [5] * 9, [1], list(range(12))]
    for name, options in (("get_repetition_penalty_reward", (2, -0.5)), ("get_soft_overlong_punishment", (10, 4))):
        mine, other = getattr(rewards, name)(*options), getattr(theirs, name)(*options)
        assert mine.__name__ == other.__name__
        assert mine(completion_ids=ids) == pytest.approx(other(completion_ids=ids))
    texts = ["<think>a</think>b", "<think>a", "a</think>b", "<think><think></think>", "<think>\n</think>\n"]
    said = [[{"role": "assistant", "content": text}] for text in texts]
    assert rewards.think_format_reward(said) == theirs.think_format_reward(said)
    with pytest.raises(ConfigError, match="max_penalty is 1"):
        rewards.get_repetition_penalty_reward(3, 1)


def test_accuracy_is_trls_where_math_verify_is_installed() -> None:
    from trl import rewards as theirs

    from tether.trl import rewards

    if importlib.util.find_spec("math_verify") is None:
        with pytest.raises(ConfigError, match="pip install math-verify"):
            rewards.accuracy_reward([[{"content": "1"}]], ["1"])
        return
    said = [r"so \boxed{\frac{1}{3}}", r"</think> \boxed{2}", "none"]
    talk, right = [[{"content": one}] for one in said], [r"\frac{1}{3}", "3", "no formula at all"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("accuracy_reward", "reasoning_accuracy_reward"):
            assert getattr(rewards, name)(talk, right) == getattr(theirs, name)(talk, right)
        mine, other = rewards.get_cosine_scaled_reward(100), theirs.get_cosine_scaled_reward(100)
        ids = [[1] * 50, [1] * 20, [1]]
        assert mine(talk, right, ids) == pytest.approx(other(talk, right, ids))
