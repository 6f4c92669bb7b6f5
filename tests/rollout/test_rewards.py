"""Rewards: signatures before a run, sync and async calls, None, time-outs, failures that name function and row."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
import time
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tether.errors import ConfigError, RewardError
from tether.rewards import (
    READY_MADE,
    Calling,
    Judged,
    ModelReward,
    as_rewards,
    call_rewards,
    check_signatures,
    python_function,
)
from tether.rewards.builtin import numeric_answer, think_format
from tiny import CONFIGS, tiny_tokenizer

JUDGED = Judged(
    prompts=["a", "a", "b", "b"],
    completions=["1", "22", "333", "4444"],
    completion_ids=[[1], [2, 2], [3, 3, 3], [4, 4, 4, 4]],
    columns={"answer": [1, 1, 3, 3], "finish": ["stop"] * 4},
    source_rows=[7, 7, 9, 9],
)


def characters(completions, **columns):
    return [len(one) for one in completions]


def called(functions, weights=None, calling=None, judged=JUDGED, **keywords):
    rewards = as_rewards(functions, weights)
    check_signatures(rewards, {"answer"})
    return call_rewards(rewards, judged, calling=calling or Calling(), **keywords)


def test_a_function_gets_what_it_names_and_nothing_else():
    """TRL #4939: no unexpected keyword; with `**columns` it gets all."""
    seen = {}

    def narrow(completions, answer):
        seen["narrow"] = answer
        return [0.5] * 4

    def wide(prompts, **rest):
        seen["wide"] = set(rest)
        return [None, 1, True, torch.tensor(2.0)]

    table = called([narrow, wide, characters], [1.0, 2.0, 0.5])
    expected = torch.tensor([[0.5, math.nan, 1], [0.5, 1, 2], [0.5, 1, 3], [0.5, 2, 4]])
    torch.testing.assert_close(table.values, expected, equal_nan=True)
    assert seen["narrow"] == [1, 1, 3, 3]
    names = {"completions", "completion_ids", "answer", "finish", "trainer_state", "log_metric", "log_extra"}
    assert seen["wide"] == names


def test_async_functions_run_together_also_where_a_loop_is_running():
    async def one(completions, **_):
        await asyncio.sleep(0.3)
        return [1.0] * len(completions)

    async def two(completions, **_):
        await asyncio.sleep(0.3)
        return [2.0] * len(completions)

    async def inside():
        begun = time.perf_counter()
        return called([one, characters, two]).values, time.perf_counter() - begun

    values, seconds = asyncio.run(inside())
    assert values[0].tolist() == [1.0, 1.0, 2.0]
    assert seconds < 0.55, "not one after the other"


def test_functions_log_metrics_and_columns_and_see_the_state():
    def logging(completions, log_metric, log_extra, trainer_state):
        log_metric("step", trainer_state)
        log_extra("seen", completions)
        return [0.0] * 4

    table = called(logging, state=5)
    assert table.metrics == {"step": [5.0]}
    assert table.extras == {"seen": ["1", "22", "333", "4444"]}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failure_names_function_and_row(asynchronous):
    def check(one):
        if one == "333":
            raise KeyError("gold")
        return 1.0

    def failing(completions):
        return [check(one) for one in completions]

    async def failing_later(completions):
        return [check(one) for one in completions]

    function = failing_later if asynchronous else failing
    with pytest.raises(RewardError, match=rf"'{function.__name__}' failed on row 9 .*'333'.*KeyError: 'gold'"):
        called([characters, function])
    with pytest.raises(RewardError, match=r"failed on 1 of 4 completions, more than the 10%"):
        called(function, calling=Calling(on_error="none"))
    many = Judged(*(part * 5 for part in (JUDGED.prompts, ["1"] * 4, JUDGED.completion_ids)), {}, [1] * 20)
    many.completions[13] = "333"
    table = call_rewards(as_rewards(function, None), many, calling=Calling(on_error="none"))
    assert table.failed == (1,)
    assert table.values[:, 0].isnan().nonzero().flatten().tolist() == [13]
    assert table.values.nansum() == 19


def ends(completions):
    raise SystemExit(3)


def on_the_way(completions):
    """Fails only when it is read."""
    for one in completions:
        if one == "333":
            raise KeyError("gold")
        yield 1.0


async def cancels_itself(completions):
    task = asyncio.ensure_future(asyncio.sleep(9))
    task.cancel()
    await task


async def late_itself(completions):
    raise TimeoutError("the endpoint is slow")


async def ends_later(completions):
    raise SystemExit(3)


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (ends, "on row 7 .*: SystemExit: 3"),
        (on_the_way, "on row 9 .*: KeyError: 'gold'"),
        (cancels_itself, "on row 7 .*: CancelledError"),
        (late_itself, "on 4 completions: the endpoint is slow"),
        (ends_later, "on row 7 .*: SystemExit: 3"),
    ],
)
def test_every_way_to_fail_is_named_by_its_own_reason(function, said, timeout):
    """R19: an exit, a failure of a generator, a cancelled task; and none is said to be late that is not."""
    with pytest.raises(RewardError, match=f"'{function.__name__}' failed {said}"):
        called([characters, function], calling=Calling(timeout=timeout))


def test_a_function_cannot_change_what_another_sees():
    def spoils(completions, completion_ids, answer):
        completions[0][0]["content"] = "other"
        completions.clear()
        completion_ids[0].clear()
        answer.clear()
        return [0.0] * 4

    seen = {}

    def looks(completions, completion_ids, answer):
        seen.update(completions=completions, completion_ids=completion_ids, answer=answer)
        return [0.0] * 4

    messages = [[{"role": "assistant", "content": one}] for one in JUDGED.completions]
    called([spoils, looks], judged=dataclasses.replace(JUDGED, completions=messages))
    assert [one[0]["content"] for one in seen["completions"]] == ["1", "22", "333", "4444"]
    assert seen["completion_ids"] == JUDGED.completion_ids
    assert seen["answer"] == [1, 1, 3, 3]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0], r"returned 1 rewards for 4 completions"),
        (3.0, r"returned 3.0; expected a list of 4 numbers"),
        ([1.0, math.nan, 1.0, 1.0], r"returned nan on row 7 .*finite"),
        ([1.0, 1.0, 1.0, "good"], r"returned 'good' on row 9"),
        ([1.0, 1.0, math.inf, 1.0], r"returned inf on row 9"),
        ([1.0, 1.0, 1e39, 1.0], r"returned 1e\+39 on row 9"),
        ([torch.ones(2)] * 4, r"returned tensor\(\[1., 1.\]\) on row 7"),
        ("1111", r"returned '1111'; expected a list of 4 numbers"),
        ({1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}, r"returned \{1: 1.0.*; expected a list of 4 numbers"),
        ([1.0, 1.0, Fraction(10**400), 1.0], r"returned Fraction.* on row 9"),
    ],
)
def test_what_is_no_reward_is_refused(returned, said):
    def odd(completions):
        return returned

    with pytest.raises(RewardError, match=f"'odd' {said}"):
        called(odd)


def test_numbers_of_every_kind_are_rewards():
    def kinds(completions):
        return [Decimal("0.5"), Fraction(1, 4), numpy.float16(2.0), torch.tensor([3.0], requires_grad=True)]

    assert called(kinds).values[:, 0].tolist() == [0.5, 0.25, 2.0, 3.0]


def test_sums_that_no_deviation_could_be_made_of_are_refused():
    """Each a number for itself; their squares would be infinite, and every advantage 0."""

    def large(completions):
        return [0.0, 0.0, 3e38, 0.0]

    with pytest.raises(RewardError, match=r"weighted sum of rewards is 3e\+38 in size on row 9 .*'333'"):
        called([characters, large])
    assert called([characters, large], [1.0, 1e-30]).values[2].tolist() == [3.0, pytest.approx(3e38)]


def test_a_call_that_takes_too_long_is_named(monkeypatch):
    release = threading.Event()

    def hanging(completions):
        release.wait(20)
        return [0.0] * 4

    async def waiting(completions):
        await asyncio.sleep(20)

    begun = time.perf_counter()
    with pytest.raises(
        RewardError, match=r"'hanging' failed on 4 completions: it took more than 0.1 seconds and was left"
    ):
        called(hanging, calling=Calling(timeout=0.1))
    with pytest.raises(RewardError, match=r"'waiting' .* 0.1 seconds and was cancelled"):
        called(waiting, calling=Calling(timeout=0.1))
    assert time.perf_counter() - begun < 5

    async def blocking(completions):  # never waits, so that it cannot be cancelled
        release.wait(20)

    with monkeypatch.context() as patch:
        patch.setattr("tether.rewards.call._CANCELLING", 0.1)
        with pytest.raises(RewardError, match=r"'blocking' .* blocked for more than 0.1 seconds and was left behind"):
            called([blocking, characters], calling=Calling(timeout=0.1))
    assert time.perf_counter() - begun < 6
    release.set()


def test_signatures_are_checked_before_a_run():
    """TRL #2644, #4939: a missing column is known at once, with what is there."""

    def wants(completions, gold):
        return []

    def by_place(completions, /):
        return []

    def alone(completions, prompt):
        return []

    with pytest.raises(ConfigError, match=r"'wants' needs 'gold', and the rows have the columns answer; besides these"):
        check_signatures(as_rewards(wants, None), {"answer"})
    check_signatures(as_rewards(wants, None), {"answer"}, further=True)
    with pytest.raises(ConfigError, match="'numeric_answer' needs 'gold'"):
        check_signatures(as_rewards(numeric_answer("gold"), None), {"answer"})
    with pytest.raises(ConfigError, match="by position alone"):
        check_signatures(as_rewards(by_place, None), {"answer"})
    with pytest.raises(ConfigError, match="Two reward functions are called 'characters'"):
        as_rewards([characters, characters], None)
    with pytest.raises(ConfigError, match="reward_weights has 1 numbers for 2 reward functions"):
        as_rewards([characters, by_place], [1.0])
    for weights in ([1.0, math.nan], [math.inf, 1.0], ["1", 1.0], [None, 1.0], [0.0, 0.0]):
        with pytest.raises(ConfigError, match=r"reward_weights has .*; expected finite numbers, of which one"):
            as_rewards([characters, wants], weights)
    with pytest.raises(ConfigError, match=r"'alone' needs 'prompt', and the rows have .*besides these, prompts"):
        check_signatures(as_rewards(alone, None), {"answer", "prompt"})
    assert as_rewards([partial(characters, completions=[])], None)[0].name == "characters"
    for wrong in ([], "numeric", 3):
        with pytest.raises(ConfigError, match="reward_funcs"):
            as_rewards(wrong, None)


def test_ready_made_rewards():
    """Their examples are doctests; here messages, templates that open the thought, and what has no answer."""
    chat = [[{"role": "assistant", "content": "so 7"}], [{"role": "assistant", "content": "eight"}]]
    assert numeric_answer()(completions=chat, answer=["7", None]) == [1.0, None]
    thought = think_format()
    texts = ["a</think> b", "<think>a</think>", "<think>a<think>b</think> c", "no", "<think>a</think>\nb"]
    assert thought(prompts=[[{"role": "user", "content": "Q"}]] * 5, completions=texts) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert set(READY_MADE) == {
        *("numeric_answer", "exact_answer", "regex", "think_format", "length", "soft_overlong", "repetition")
    }
    with pytest.raises(ConfigError, match="pattern '\\('"):
        READY_MADE["regex"]("(")
    with pytest.raises(ConfigError, match="'length' has target 0"):
        READY_MADE["length"](0)


def test_a_function_in_a_file(tmp_path):
    (tmp_path / "mine.py").write_text("def short(completions, **_):\n    return [-len(one) for one in completions]\n")
    function = python_function(f"{tmp_path / 'mine.py'}:short")
    assert called(function).values[:, 0].tolist() == [-1.0, -2.0, -3.0, -4.0]
    with pytest.raises(ConfigError, match="has no function 'long'; it has short"):
        python_function(f"{tmp_path / 'mine.py'}:long")
    with pytest.raises(ConfigError, match="expected a Python file and a function"):
        python_function("mine")
    with pytest.raises(ConfigError, match=r"'ours.py:short', and there is no file ours.py. Correct the path"):
        python_function("ours.py:short")
    for text, said in (
        ("x = 1\ndef short(completions)\n", r"mine.py cannot be run: SyntaxError: .*line 2"),
        ("x = 1\n\nimport no_such_module\n", r"mine.py cannot be run at line 3: ModuleNotFoundError: No module"),
    ):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(ConfigError, match=said):
            python_function(f"{tmp_path / 'mine.py'}:short")


def test_a_server_that_is_gone_is_no_fault_of_a_completion():
    """It is asked once, and not for each completion again."""
    asked = []

    def judged_elsewhere(completions):
        asked.append(completions)
        raise RewardError("The server cannot be reached. Check that it runs.")

    with pytest.raises(RewardError, match=r"failed on 4 completions: The server .* Check that it runs\.$"):
        called(judged_elsewhere)
    assert len(asked) == 1


def test_a_model_scores_the_last_real_token(tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForSequenceClassification(LlamaConfig(**{**CONFIGS["llama"][1], **sizes}, num_labels=1)).eval()
    reward = ModelReward(model, tokenizer)
    texts = [("The film", " was good"), ("It", " was")]
    found = called(reward, judged=Judged(*zip(*texts, strict=True), [[1], [1]], {}, [0, 1])).values[:, 0]
    for value, (prompt, completion) in zip(found, texts, strict=True):
        ids = tokenizer(prompt + completion, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            assert value.item() == pytest.approx(model(**ids).logits[0, 0].item(), abs=1e-5)
    chat = [{"role": "user", "content": "good?"}], [{"role": "assistant", "content": "yes"}]
    whole = tokenizer.apply_chat_template([*chat[0], *chat[1]], tokenize=False)
    assert reward([chat[0]], [chat[1]]) == pytest.approx(reward([whole], [""]), abs=1e-5)
    many = [("the film" + " was" * (k % 5), " good" * (1 + k % 3)) for k in range(20)]
    each = [reward([prompt], [completion])[0] for prompt, completion in many]
    assert reward(*zip(*many, strict=True)) == pytest.approx(each, abs=1e-5), "in parts, as few at once as fit"
    with pytest.raises(ConfigError, match=r"'numeric_answr' is none of .* \(did you mean numeric_answer\?\), and no"):
        ModelReward("numeric_answr")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    assert ModelReward(str(tmp_path))([whole], [""]) == pytest.approx(reward([whole], [""]), abs=1e-5)
    model.config.num_labels = 2
    with pytest.raises(ConfigError, match="has 2 labels"):
        ModelReward(model, tokenizer)
