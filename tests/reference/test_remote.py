"""The method `remote`: what a server says is what would be computed here, or it is refused (INV-2, 3, 8, 10, 11)."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from completions_server import serving
from policies import PROBE, continued_adapter, resolved, take_steps, with_lora
from tether.errors import ConfigError, ReferencePolicyError
from tether.reference import SAME, ReferenceSpec, RemoteOptions, resolve
from tether.reference.record import read_record, restore, write_record, write_tensors
from tether.scoring import score
from tiny import VOCABULARY, tiny_model


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr("tether.reference.methods.transport._FIRST_PAUSE", 0.001)


@pytest.fixture
def server():
    with serving(tiny_model()) as running:
        yield running


def remote(server, **changes):
    return RemoteOptions(**{"url": server.url, "retries": 2, "tolerance": 1e-4, **changes})


def served(server, policy, meaning="model", **changes):
    return resolved(policy, meaning=meaning, method="remote", remote=remote(server, **changes))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_a_served_model_gives_what_it_gives_here(server, ending, concurrency):
    """Token ids are sent, one token at most is generated, and the values are those of the one scoring function."""
    reference = served(server, tiny_model(seed=1), url=server.url + ending, concurrency=concurrency)
    expected = score(tiny_model(), PROBE).token_logps.detach()
    found = reference.score(PROBE).token_logps
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.dtype == torch.float32
    for body in server.bodies:
        assert body["max_tokens"] == 1
        assert body["prompt_logprobs"] == 0
        assert all(isinstance(token, int) for token in body["prompt"])


@pytest.mark.parametrize("build", [tiny_model, with_lora, continued_adapter])
def test_a_served_start_is_proved_and_stays(build):
    """INV-1, 2: compared with the start computed here; the same fingerprint as every other method of it."""
    policy = build()
    with serving(copy.deepcopy(policy)) as server:
        found = resolve(
            ReferenceSpec("start", "remote", remote=remote(server)), policy, PROBE, score, lambda model: score
        )
        local = resolved(policy)
        expected = local.score(PROBE).token_logps
        assert "nats from the same computed here on 4 rows" in found.line
        assert found.reference.identity.fingerprint == local.identity.fingerprint
        take_steps(policy)
        torch.testing.assert_close(found.reference.score(PROBE).token_logps, expected, atol=1e-5, rtol=0)


def test_another_model_than_the_start_is_refused(server):
    """INV-11, negative control: the parity check on rows."""
    with pytest.raises(ReferencePolicyError, match="is not the reference 'start': on 4 rows"):
        served(server, tiny_model(seed=1), "start")
    with pytest.raises(ReferencePolicyError, match="is not the reference 'base'"):
        served(server, tiny_model(seed=1), "base")


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"truncate": 1}, "it truncates or changes the prompt"),
        ({"without_prompt_logprobs": True}, "gives no prompt log-probabilities"),
        ({"wrong_tokens": True}, "reads other tokens than were sent"),
        ({"shifted": True}, "more tokens follow"),
        ({"context": 5}, "maximum context length is 5 tokens"),
        ({"vocabulary": VOCABULARY - 1}, "is out of vocabulary"),
        ({"not_finite": True}, "which is not a log-probability"),
        ({"fail_first": 1000}, "failed after 3 attempts: 503"),
        ({"key": "secret"}, "failed after 1 attempts: 401"),
    ],
)
def test_a_server_that_cannot_be_the_reference_is_refused(server, faults, words):
    """One clear error for each, at the start of the run."""
    for name, value in faults.items():
        setattr(server.faults, name, value)
    with pytest.raises(ReferencePolicyError, match=words):
        served(server, tiny_model())


def test_a_shift_is_found_by_parity_too(server):
    server.faults.noise = -1e-3
    with pytest.raises(ReferencePolicyError, match=r"differs by 0\.00"):
        served(server, tiny_model(), "start")
    server.faults.noise = 0.0
    assert served(server, tiny_model(), "start").identity.method == "remote"


def test_a_key_goes_to_the_named_server_alone_and_into_no_message(server, monkeypatch):
    """INV-51: it follows no redirect, and a server that repeats it does not bring it into a message or a log."""
    monkeypatch.setenv("SERVER_KEY", "sk-very-secret")
    with serving(tiny_model()) as other:
        server.faults.redirect = other.url
        with pytest.raises(ReferencePolicyError, match=r"redirects to http.* which is not followed"):
            served(server, tiny_model(), api_key_env="SERVER_KEY")
        assert set(server.keys) == {"Bearer sk-very-secret"}
        assert other.keys == []
    server.faults.redirect, server.faults.echo = None, True
    with pytest.raises(ReferencePolicyError, match=r"bad request.*Bearer \[key\]") as caught:
        served(server, tiny_model(), api_key_env="SERVER_KEY")
    assert "sk-very-secret" not in str(caught.value)
    server.faults.echo, server.faults.key = False, "sk-very-secret"
    assert served(server, tiny_model(), api_key_env="SERVER_KEY").identity.method == "remote"
    monkeypatch.setenv("SERVER_KEY", "two\nlines")
    with pytest.raises(ConfigError, match="line break") as caught:
        served(server, tiny_model(), api_key_env="SERVER_KEY", retries=0)
    assert "two" not in str(caught.value)


def test_an_answer_without_an_end_is_given_up(server):
    server.faults.endless = True
    with pytest.raises(ReferencePolicyError, match=r"answered with more than 1[0-9]* bytes"):
        served(server, tiny_model(), retries=0)


def test_failures_that_pass_are_tried_again(server):
    server.faults.fail_first = 2
    reference = served(server, tiny_model(), concurrency=1)
    server.faults.fail_first = 2
    expected = score(tiny_model(), PROBE).token_logps.detach()
    torch.testing.assert_close(reference.score(PROBE).token_logps, expected, atol=1e-5, rtol=0)


def test_a_server_that_is_gone_is_named():
    with serving(tiny_model()) as server:
        reference = served(server, tiny_model())
    with pytest.raises(ReferencePolicyError, match="failed after 3 attempts"):
        reference.score(PROBE)
    with pytest.raises(ReferencePolicyError, match="Check that it runs"):
        resolved(
            tiny_model(), meaning="model", method="remote", remote=RemoteOptions(url="http://127.0.0.1:9", retries=0)
        )


def test_the_served_name_is_checked():
    """INV-11: another name, or several and none chosen."""
    with serving(tiny_model(), "one", "two") as server:
        with pytest.raises(ReferencePolicyError, match="serves one, two, and three was asked for"):
            served(server, tiny_model(), model="three")
        with pytest.raises(ReferencePolicyError, match="no name was asked for"):
            served(server, tiny_model())
        reference = served(server, tiny_model(), model="two")
        assert reference.identity.source == f"'two' at {server.url}/v1"
        other = served(server, tiny_model(), model="one")
        assert reference.identity.fingerprint != other.identity.fingerprint


def test_a_key_comes_from_the_environment(server, monkeypatch):
    server.faults.key = "secret"
    with pytest.raises(ConfigError, match="TETHER_TEST_KEY has no key"):
        served(server, tiny_model(), api_key_env="TETHER_TEST_KEY")
    monkeypatch.setenv("TETHER_TEST_KEY", "secret")
    assert math.isfinite(
        float(served(server, tiny_model(), api_key_env="TETHER_TEST_KEY").score(PROBE).token_logps.sum())
    )


def test_a_served_model_that_changes_between_two_runs_is_refused(server, tmp_path):
    """INV-8: the same name with other weights; the checkpoint holds what the server said of the probe."""
    policy = tiny_model(seed=1)
    first = served(server, policy)
    write_record(tmp_path, first, "line", None)
    write_tensors(tmp_path, first)
    assert read_record(tmp_path) == (first.identity, None)
    assert restore(tmp_path, served(server, policy), policy) is None
    server.model = tiny_model(seed=2).eval()
    with pytest.raises(ReferencePolicyError, match="has changed since the checkpoint was written"):
        restore(tmp_path, served(server, policy), policy)


@pytest.mark.parametrize(
    "changes",
    [
        {"concurrency": 0},
        {"retries": -1},
        {"timeout": 0},
        {"tolerance": -1.0},
        {"url": "ftp://x"},
        {"url": "http://user:word@host"},
    ],
)
def test_options_outside_their_range_are_refused(changes):
    with pytest.raises(ConfigError, match=r"^remote:"):
        RemoteOptions(**{"url": "http://x", **changes})


def test_the_policys_dtype_decides_what_may_differ(server):
    assert served(server, tiny_model(), tolerance=None).tolerance == pytest.approx(2e-4)
    assert resolved(tiny_model()).tolerance == SAME
