"""Judges of completions: a served model in both orders, a function, ratings and wins as rewards."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tether.errors import ConfigError, RewardError
from tether.reference import RemoteOptions
from tether.rewards import (
    Calling,
    EndpointJudge,
    FunctionJudge,
    Judged,
    as_rewards,
    call_rewards,
    judge_reward,
    win_rate,
)


@contextmanager
def answering(answer):
    """An endpoint whose answers are a function of what it is asked; gives its address and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            said = answer(body["messages"][0]["content"])
            data = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def parts(text):
    first = text.split("<answer_a>\n")[1].split("\n</answer_a>")[0]
    return first, text.split("<answer_b>\n")[1].split("\n</answer_b>")[0]


def longer(text):
    first, second = parts(text)
    return "Reasons.\n" + ("A" if len(first) > len(second) else "B" if len(first) < len(second) else "TIE")


def judge(url, **changes):
    return EndpointJudge(RemoteOptions(url=url, model="wise", retries=0), **changes)


def test_a_served_judge_is_asked_in_both_orders():
    with answering(longer) as (url, asked):
        said = judge(url).compare(["p", "p", "q"], ["long one", "x", "aa"], ["s", "longer", "bb"])
        assert [one.first for one in said] == [1.0, 0.0, 0.5]
        assert not any(one.turned for one in said)
        assert len(asked) == 6
        assert {body["temperature"] for body in asked} == {0.0}
        assert {tuple(sorted(parts(body["messages"][0]["content"]))) for body in asked} == {
            ("long one", "s"),
            ("longer", "x"),
            ("aa", "bb"),
        }


def test_a_judge_that_prefers_a_place_says_nothing():
    """Negative control of both orders: always A is a tie, and known as one that the order decided."""
    with answering(lambda text: "A") as (url, _):
        (said,) = judge(url).compare(["p"], ["one"], ["two"])
    assert said.first == 0.5
    assert said.turned
    with answering(lambda text: "I cannot decide") as (url, _):
        (said,) = judge(url).compare(["p"], ["one"], ["two"])
    assert said.first is None


def test_wins_against_the_others_of_the_prompt_are_a_reward():
    """Equal completions tie and are not asked for; a completion without a rival has none."""
    with answering(longer) as (url, asked):
        reward = win_rate(judge(url))
        found = reward(prompts=["p", "p", "p", "p", "q"], completions=["a", "bb", "bb", "cccc", "alone"])
    assert found == [0.0, pytest.approx(0.5), pytest.approx(0.5), 1.0, None]
    assert len(asked) == 2 * 3, "three distinct pairs"
    again = win_rate(FunctionJudge(lambda prompt, first, second: float(len(first) > len(second))))
    assert again(prompts=["p", "p"], completions=["a", "bb"]) == [0.0, 1.0]
    with pytest.raises(RewardError, match="returned 'yes'; expected a number from 0 to 1"):
        FunctionJudge(lambda prompt, first, second: "yes").compare(["p"], ["a"], ["b"])


def test_ratings_are_a_reward_between_0_and_1():
    answers = {"good": "**10**", "bad": "It is poor.\n1/10", "odd": "eleven"}
    with answering(lambda text: answers[text.split("<answer>\n")[1].split("\n</answer>")[0]]) as (url, asked):
        judged = Judged(["p"] * 4, ["good", "bad", "odd", "good"], [[1]] * 4, {}, [0] * 4)
        table = call_rewards(as_rewards(judge_reward(judge(url)), None), judged, calling=Calling())
    assert table.values[:, 0].nan_to_num(nan=-1).tolist() == [1.0, 0.0, -1.0, 1.0]
    assert len(asked) == 3, "equal questions are asked once"


def test_completions_cannot_write_into_the_question():
    with answering(longer) as (url, asked):
        judge(url).compare(["{first}"], ["{second}"], ["x"])
    questions = [one["messages"][0]["content"] for one in asked]  # both orders, at the same time
    assert any("<answer_a>\n{second}\n</answer_a>" in question for question in questions)
    assert all("<prompt>\n{first}\n</prompt>" in question for question in questions)


def test_what_a_judge_cannot_do_is_said():
    with pytest.raises(ConfigError, match=r"no \{first\}"):
        judge("http://127.0.0.1:1", instructions="{prompt}?")
    with pytest.raises(ConfigError, match=r"no \{second\}"):
        judge("http://127.0.0.1:1", instructions="{prompt} {first}").compare(["p"], ["a"], ["b"])
    with pytest.raises(RewardError, match="failed after 1 attempts"):
        judge("http://127.0.0.1:1").rate(["p"], ["a"])


def test_a_function_with_other_arguments_is_no_judge():
    """Known when a run is made, and not when its first completions are there."""
    FunctionJudge(lambda prompt, first, second, more=None: 1)
    with pytest.raises(ConfigError, match=r"The judge 'max_two' must take three arguments.*: too many positional"):
        FunctionJudge(max_two)


def max_two(prompt, first):
    return 1
