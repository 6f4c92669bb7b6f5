"""What is shown of sampled completions: the table, how far the reward has come, lines on runs that learn nothing."""

from __future__ import annotations

import io
import logging
import math

import pyarrow.parquet as parquet
import pytest
import torch
from rich.console import Console

from tether import GRPOConfig
from tether.errors import ConfigError, RewardError
from tether.training.health.rules import Facts, Health
from tether.training.online import table
from tether.training.online.reward_gain import Progress
from tether.training.online.table import Completions, as_table
from training.online import PROMPTS, SETTINGS, even, steps, trainer


def printed(found, step=1, shown=None):
    console = Console(width=100, record=True, file=io.StringIO())
    panel = as_table(found, step, shown)
    if panel is None:
        return ""
    console.print(panel)
    return console.export_text()


def test_the_table_has_the_columns_and_values_of_the_rollout(tmp_path, capsys):
    """TRL's files, names and columns; texts, rewards and extras are those of the kept rollout."""

    def odd(completion_ids, log_extra):
        log_extra("tokens", [len(ids) for ids in completion_ids])
        return [None if len(ids) % 2 else 1.0 for ids in completion_ids]

    made = trainer(
        tmp_path,
        rewards=[even, odd],
        log_completions=True,
        num_completions_to_print=0,
        eval_dataset=PROMPTS[:2],
        eval_strategy="steps",
        eval_steps=1,
    )
    made.train()
    files = sorted(path.name for path in (tmp_path / "completions").iterdir())
    assert files == [f"completions_{step:05d}.parquet" for step in (1, 2, 3)]
    for step in (1, 3):
        shown = parquet.read_table(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        assert shown.column_names == ["step", "prompt", "completion", "even", "odd", "tokens", "advantage"]
        shown = shown.to_pydict()
        kept = parquet.read_table(tmp_path / "rollouts" / f"{step - 1:06d}-0.parquet").to_pydict()
        assert shown["step"] == [step] * 8
        assert shown["completion"] == kept["text"]
        assert shown["prompt"] == [PROMPTS[row]["prompt"] for row in kept["source_row"]]
        assert shown["tokens"] == [len(ids) for ids in kept["completion_ids"]]
        assert shown["odd"] == [None if tokens % 2 else 1.0 for tokens in shown["tokens"]]
        total = torch.tensor([e + (o or 0.0) for e, o in zip(shown["even"], shown["odd"], strict=True)]).view(2, 4)
        expected = (total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(torch.tensor(shown["advantage"]), expected.flatten(), atol=1e-4, rtol=1e-4)
    assert "Step 1" not in capsys.readouterr().err


def test_a_table_shows_texts_as_they_are_and_as_many_as_are_wanted(monkeypatch, tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    found = Completions(
        [messages, "[bold]two"], [[{"role": "assistant", "content": "hi"}], "2"], {"f": [0.5, None]}, [1.25, -1.25], {}
    )
    text = printed(found, step=42)
    for said in ("Step 42", "user: hello", "assistant: hi", "[bold]two", "0.50", "1.25", "-1.25"):
        assert said in text
    one = printed(found, shown=1)
    assert ("user: hello" in one) != ("[bold]two" in one)
    assert one == printed(found, shown=1), "which are shown is a function of the step"
    assert printed(found, shown=0) == ""
    four = Completions(["p", "p", "q", "q"], ["one", "two", "three", "four"], {}, [0.0] * 4, {})
    unique = as_table(four, 1, unique=True)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(unique)
    text = console.export_text()
    assert [said in text for said in ("one", "two", "three", "four")] == [True, False, True, False]
    with pytest.raises(RewardError, match=r"log_extra\('x'\) had 1 values for 2 completions"):
        Completions(["a", "b"], ["c", "d"], {}, [0, 0], {"x": [1]})
    with pytest.raises(RewardError, match=r"log_extra\('step'\) is the name of another column"):
        Completions(["a", "b"], ["c", "d"], {}, [0, 0], {"step": [1, 2]})
    with pytest.raises(ConfigError, match="no completions are logged"):
        GRPOConfig(output_dir="unused", **SETTINGS, num_completions_to_print=2)
    panels = []
    monkeypatch.setattr(table, "console", lambda: type("To", (), {"print": lambda self, one: panels.append(one)})())
    made = trainer(tmp_path, log_completions=True, num_completions_to_print=3, max_steps=2)
    made.train()
    assert [(one.title, one.renderable.row_count) for one in panels] == [("Step 1", 3), ("Step 2", 3)]
    made = trainer(tmp_path / "unique", log_completions=True, log_unique_prompts=True, max_steps=1)
    made.train()
    assert panels[-1].renderable.row_count == 2, "of each of two prompts with four completions one"
    assert parquet.read_table(tmp_path / "unique/completions/completions_00001.parquet").num_rows == 8


def test_the_delta_and_its_error_are_those_of_the_groups(tmp_path):
    """Against a computation from the kept rollouts, over logs of two steps; a resumed run goes on with its start."""
    settings = {"logging_steps": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    made = trainer(tmp_path, **settings)
    made.train()
    groups = []
    for number in range(6):
        ids = parquet.read_table(tmp_path / "rollouts" / f"{number:06d}-0.parquet").to_pydict()
        wanted = [PROMPTS[row]["want"] for row in ids["source_row"]]
        groups.append(torch.tensor(even(ids["completion_ids"], wanted)).double().view(2, 4).mean(1))
    first, *later = [torch.cat(groups[at : at + 2]) for at in (0, 2, 4)]
    logs = steps(made)
    assert logs[0]["reward/delta"] == 0.0
    assert "reward/delta_error" not in logs[0]
    for log, one in zip(logs[1:], later, strict=True):
        assert log["reward/delta"] == pytest.approx((one.mean() - first.mean()).item(), abs=1e-6)
        assert log["reward/delta_error"] == pytest.approx(math.sqrt(one.var() / 4 + first.var() / 4), abs=1e-6)
    again = trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert steps(again)[-1]["reward/delta"] == pytest.approx(logs[-1]["reward/delta"], abs=1e-9)
    assert steps(again)[-1]["reward/delta_error"] == pytest.approx(logs[-1]["reward/delta_error"], abs=1e-9)


def test_unscorable_groups_and_single_ones():
    progress = Progress()
    progress.add(torch.tensor([torch.nan, torch.nan]), 2)
    assert progress.since() == {}
    progress.add(torch.tensor([1.0, torch.nan]), 2)
    assert progress.since() == {"reward/delta": 0.0}
    progress.add(torch.tensor([4.0, 2.0]), 2)
    assert progress.since() == {"reward/delta": 2.0}, "one group has no error"


GOOD = {"loss": 0.1, "entropy": 2.0, "frac_reward_zero_std": 0.5, "completions/clipped_ratio": 0.9, "kl": 0.9}


@pytest.mark.parametrize(
    ("bad", "first", "said"),
    [
        ({"completions/clipped_ratio": 1.0}, 2, "every completion was cut off"),
        ({"rewards/one/not_applicable": 1.0, "rewards/two/not_applicable": 1.0}, 2, "no reward applied to any"),
        ({"frac_reward_zero_std": 0.95}, 11, "in more than 90% of the groups all rewards have been equal for 10 steps"),
        ({"entropy": 0.19}, 2, "the entropy has fallen from 2 to 0.19"),
        ({"kl": 1.1}, 2, "the KL divergence from the reference is 1.1 nats a token"),
    ],
)
def test_a_line_comes_when_it_holds_and_once(bad, first, said):
    health = Health(Facts())
    assert health.look(GOOD, 1) == []
    heard = []
    for step in range(2, 20):
        heard += [(step, found.line) for found in health.look({**GOOD, **bad}, step)]
    assert [step for step, _ in heard] == [first]
    assert said in heard[0][1]
    assert health.look(GOOD, 20) == []
    later = [step for step in range(21, 40) if health.look({**GOOD, **bad}, step)]
    assert later == [19 + first], "it has passed, and is said again"


@pytest.mark.slow
def test_a_reward_that_never_changes_is_named_and_one_that_did_is_not(tmp_path, caplog):
    def fixed(completion_ids):
        return [0.25] * len(completion_ids)

    made = trainer(tmp_path, rewards=[even, fixed], max_steps=12)
    with caplog.at_level(logging.WARNING, "tether"):
        made.train()
    lines = [one.getMessage() for one in caplog.records if one.getMessage().startswith("health: ")]
    constant = [line for line in lines if "has been" in line]
    assert constant == [
        "health: step 10: the reward fixed has been 0.25 for every completion from the start. Look at the function. "
        "(docs/health.md#rewards-constant)"
    ]
    assert sum("a loss of 0 is normal" in line for line in lines) == 1
