"""`tether data show` and `data check` with a run file: what they look at is what that run trains on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Workplace
from data.samples import CHATML, assistant, user
from tether.config import build, load_run_file, trainer_class
from tether.data import example_from_row
from tether.data.audit.audit import Check
from tether.scoring import pack
from tether.scoring.batch import with_prompts
from tether.training.setup.data import RunData
from tether.training.setup.policy import config_of, processing_of

Tether = Callable[..., tuple[int, str, str]]
# Rows with the columns of several kinds: the run says which are read.
ROWS = [
    {
        "prompt": [user(f"film {n}")],
        "chosen": [assistant(f"good {n}"), user("more"), assistant("yes <new>")],
        "rejected": [assistant(f"bad {n * 7}"), user("more"), assistant("no")],
        "messages": [user(f"film {n}"), assistant(f"imitated {n}")],
    }
    for n in range(4)
]


@pytest.fixture
def run(workplace: Workplace) -> Workplace:
    """A run file whose model has no template, with a template, a new token, and turns of its own."""
    workplace.write_rows(ROWS)
    Path("chatml.jinja").write_text(CHATML, encoding="utf-8")
    workplace.edit("model: model", "model: {name: model, chat_template: chatml.jinja, add_tokens: [<new>]}")
    workplace.edit("  eval: held_out.jsonl\n", "")
    workplace.edit("max_length: 64", "max_length: 150, truncation_mode: keep_end")
    return workplace


@pytest.mark.parametrize(
    "loss",
    [
        "{loss: sigmoid}",
        "{loss: kto}",
        "{loss: orpo}",
        "{loss: simpo}",
        "{loss: sft}",
        "{loss: sft, completion_only_loss: false}",
        "{loss: reward}",
    ],
)
def test_what_is_shown_is_what_is_trained_on(
    loss: str, run: Workplace, tether: Tether, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids and scored tokens of a row against those of the run's own data and batches."""
    run.edit("objective: {beta: 0.1}", f"objective: {loss}")
    if loss == "{loss: reward}":
        run.edit("truncation_mode: keep_end", "truncation_mode: drop")
    elif loss != "{loss: sft, completion_only_loss: false}":
        run.edit("logging_steps: 1", "logging_steps: 1, turns: last")
    printed: list[list[Any]] = []
    monkeypatch.setattr("tether.cli.data.tables.print_tokens", lambda parts, row: printed.append(parts))
    code, _, err = tether("data", "show", "run.yaml", "--row", "2")
    assert code == 0, err

    asked = load_run_file("run.yaml")
    args, _, keywords = build(asked)
    algorithm = trainer_class(asked.objective.loss).algorithm_class(args, config_of("model", args))
    prepared = RunData(processing_of("model", args)[0], args).prepare("train", keywords["train_dataset"]).dataset
    rows = [row for row in prepared if row["source_row"] == 1]
    assert len(printed) == len(rows) == (2 if "kto" in loss else 1)
    for row, (prompt, *completions) in zip(rows, printed, strict=True):
        assert [token.id for token in prompt] == list(row["prompt_ids"])
        assert [[token.id for token in part] for part in completions] == [list(ids) for ids in row["completion_ids"]]
        batch = pack([example_from_row(row)])
        scored = (with_prompts(batch) if algorithm.needs.prompts else batch).targets.tolist()
        shown = [token.id for part in (*completions, prompt) for token in part if token.scored]
        if "reward" in loss:
            assert shown == [ids[-1] for ids in row["completion_ids"]]
        else:
            assert sorted(shown) == sorted(scored)
    text = "".join(token.text for part in printed[0] for token in part)
    assert ("imitated" in text) == ("sft" in loss)
    assert text.startswith("<|im_start|>")


def test_what_is_checked_is_what_is_trained_on(run: Workplace, tether: Tether, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Check] = []
    monkeypatch.setattr("tether.cli.data.tables.print_check", found.append)
    for loss, kind in (("sigmoid", "pair"), ("sft", "completion"), ("kto", "unpaired")):
        run.edit("objective: {beta: 0.1}", f"objective: {{loss: {loss}}}")
        code, _, err = tether("data", "check", "run.yaml")
        assert code == 0, err
        run.edit(f"objective: {{loss: {loss}}}", "objective: {beta: 0.1}")
        assert found[-1].kind == kind
    args, _, keywords = build(load_run_file("run.yaml"))
    report = RunData(processing_of("model", args)[0], args).prepare("train", keywords["train_dataset"]).report
    measured = found[0].lengths
    assert measured is not None
    assert measured.quantiles["prompt"]["max"] == report.lengths["prompt"]["max"]
    assert measured.quantiles["completion"]["max"] == report.lengths["chosen"]["max"]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "completion"),
        ({"messages": [user("Hi"), assistant("Hello")]}, "completion"),
        ({"text": "film"}, "completion"),
        ({"prompt": "film", "completion": " good", "label": True}, "unpaired"),
        ({"prompt": "film", "completions": [" good", " bad"]}, "ranked"),
        ({"prompt": "film", "chosen": " good", "rejected": " bad"}, "pair"),
        ({"instruction": "Hi", "output": "Hello"}, "pair"),
    ],
)
def test_without_a_run_file_the_columns_say_the_kind(
    row: dict, kind: str, workplace: Workplace, tether: Tether
) -> None:
    workplace.write_rows([row], "rows.jsonl")
    Path("chatml.jinja").write_text(CHATML, encoding="utf-8")
    code, out, err = tether("data", "check", "rows.jsonl", "--json")
    if "instruction" in row:  # no kind: the message names the format that reads these columns
        assert code == 2
        assert "alpaca" in err
    else:
        assert code == 0, err
        assert json.loads(out)["sets"][0]["kind"] == kind


def test_a_chat_template_is_named_and_kept(run: Workplace, tether: Tether) -> None:
    """Trained with it, saved with it; what it spells that is no token is said; a wrong name is refused in words."""
    code, _, err = tether("train", "run.yaml", "train.max_steps=1")
    assert code == 0, err
    assert "chat template: <|im_end|>, <|im_start|> of 'chatml.jinja' are no tokens" in err
    assert (run.path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == CHATML
    run.edit("chat_template: chatml.jinja", "chat_template: none.jinja")
    code, _, err = tether("train", "run.yaml", "output=again")
    assert code == 2
    assert "there is no file 'none.jinja'" in err
    run.edit("chat_template: none.jinja", "chat_template: out")
    code, out, err = tether("data", "show", "run.yaml")
    assert code == 0, err
    assert "<|im_start|>" in out
    run.edit("chat_template: out", "chat_template: model")
    code, _, err = tether("data", "show", "run.yaml")
    assert code == 2
    assert "the tokenizer 'model' has none" in err
    run.edit("chat_template: model, ", "")
    code, _, err = tether("train", "run.yaml", "output=again")
    assert code == 2
    assert "`model: {chat_template: …}`" in err


@pytest.mark.usefixtures("no_weights")
def test_a_run_holds_its_rows_to_the_limits(workplace: Workplace, tether: Tether) -> None:
    """A limit of `data.check` that rows pass refuses the run before weights load; one that they keep is said."""
    workplace.write_rows([*workplace.pairs(9), {"prompt": "film:", "chosen": " same", "rejected": " same"}])
    workplace.edit("data:\n", "data:\n  check: {identical: 0.05}\n")
    code, _, err = tether("train", "run.yaml")
    assert code == 2
    assert "train: 10.00% of the rows completions are equal (identical); the limit is 5.00%" in err
    assert "Correct the rows, or raise the limits" in err
    workplace.edit("{identical: 0.05}", "{in_evaluation: 0}")
    code, _, err = tether("train", "run.yaml", "output=again")
    assert code == 2
    assert "train: 80.00% of the rows are in the evaluation set (in_evaluation); the limit is 0.00%" in err
    workplace.edit("{in_evaluation: 0}", "{in_evaluatoin: 0}")
    code, _, err = tether("train", "run.yaml", "output=again")
    assert code == 2
    assert "`in_evaluatoin` is not known" in err


def test_values_beside_a_run_file_count(workplace: Workplace, tether: Tether) -> None:
    shown = [tether("data", "show", "run.yaml", *values)[:2] for values in ((), ("train.max_length=10",))]
    assert [code for code, _ in shown] == [0, 0]
    assert ["completion 1: 3 tokens" in text for _, text in shown] == [False, True]


def test_one_answer_of_a_pair_is_no_prompt_alone(workplace: Workplace, tether: Tether) -> None:
    rows = [{("rejcted" if key == "rejected" else key): text for key, text in row.items()} for row in workplace.pairs()]
    workplace.write_rows(rows)
    for command in ("check", "show"):
        code, _, said = tether("data", command, "pairs.jsonl", "--tokenizer", "model")
        assert code == 2
        assert "the column `rejected` is missing" in said
