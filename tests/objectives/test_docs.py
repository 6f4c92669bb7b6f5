"""The pages on objectives: the table has not drifted, and the way to add an objective works as it is written."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from objectives import formulae, test_contract
from tether import DPOConfig, DPOTrainer
from tether.objectives import OBJECTIVES
from tether.objectives.describe import BEGIN, END, describe, every_row, rewritten
from tether.objectives.metrics import preference_metrics
from tether.types import Scores
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

DOCS = Path(__file__).parents[2] / "docs"
CHOOSING = DOCS / "choosing_an_objective.md"
ADDING = DOCS / "adding_an_objective.md"


def test_the_table_of_objectives_has_not_drifted():
    """After a change of a row or docstring: python -m tether.objectives.describe docs/choosing_an_objective.md"""
    text = CHOOSING.read_text(encoding="utf-8")
    assert rewritten(text) == text
    assert rewritten(f"front\n{BEGIN}\nold\n{END}\nback").startswith(f"front\n{BEGIN}\n\n## Pairs")
    with pytest.raises(ValueError, match="add these two lines"):
        rewritten("a page without marks")


@pytest.mark.parametrize("row", every_row(), ids=lambda row: f"{row.algorithm} {row.name}")
def test_every_docstring_says_what_the_page_needs(row):
    """A summary with the formula, the meaning of every number and option, and where it comes from."""
    said = describe(row)
    assert "`" in said.summary
    assert said.arguments.keys() == inspect.signature(row.function).parameters.keys()
    assert re.search(r"arXiv:\d{4}\.\d{5}|\(\d{4}\)", said.reference)


def test_every_name_that_the_pages_mention_exists():
    """Losses in backticks in the hand-written part are rows of the table."""
    front = CHOOSING.read_text(encoding="utf-8").split(BEGIN)[0]
    listed = front.split("Where to begin:")[1].split("Several losses")[0]
    named = set(re.findall(r"`\[?([a-z_, ]+)\]?`", listed))
    names = {name.strip() for group in named for name in group.split(",")}
    assert names - {"label_smoothing", "ld_alpha", "margin"} <= OBJECTIVES["dpo"].keys()


def test_every_metric_is_in_the_list():
    """The module's table has a line for each name, the length buckets by their first."""
    import tether.objectives.metrics as module

    lengths = torch.tensor([2])
    scores = Scores(torch.zeros(2), torch.arange(2), 2, torch.zeros(2), torch.zeros(2).bool(), torch.zeros(2))
    found = preference_metrics(scores, scores, scores.logps, scores.logps, scores.logps, lengths)
    listed = set(re.findall(r"`([a-z_]+(?:/[\w-]+)*)`", module.__doc__))
    found.pop("rewards/margins_square")  # of which an evaluation makes `rewards/margins_std`
    by_length = {name for name in found if name.endswith("_tokens")}
    assert found.keys() - by_length == {name for name in listed if name in found} - by_length
    assert "rewards/margins/1-64_tokens" in listed & by_length


def test_adding_an_objective_as_the_page_does(tmp_path, monkeypatch):
    """Runs the page's code, puts the row in the table, holds it to the contract, and trains with it."""
    blocks = re.findall(r"```python\n(.*?)```", ADDING.read_text(encoding="utf-8"), flags=re.DOTALL)
    space: dict = {}
    for block in blocks:
        exec(compile(block, str(ADDING), "exec"), space)
    row, formula = space["row"], space["formula"]
    monkeypatch.setitem(OBJECTIVES["dpo"], row.name, row)
    monkeypatch.setitem(formulae.FORMULAE, row.name, formulae.rows(formula))
    for check in (
        test_contract.test_value_and_gradient_are_the_formula,
        test_contract.test_gradcheck,
        test_contract.test_order_of_the_batch,
        test_contract.test_every_option_changes_the_number,
        test_contract.test_the_row_says_what_its_options_may_be,
    ):
        check(row.name)
    test_contract.test_extremes_are_finite(row.name, torch.float32)
    assert rewritten(CHOOSING.read_text(encoding="utf-8")).count("### cal_dpo") == 1
    tokenizer = tiny_tokenizer()
    trainer = DPOTrainer(
        model=tiny_model(
            num_hidden_layers=1, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2
        ),
        args=DPOConfig(output_dir=str(tmp_path), loss_type=["cal_dpo", "sft"], max_steps=1, **QUIET),
        train_dataset=Dataset.from_list(pair_rows(4)),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    # Before the first step policy and reference are the same, and the likelihood is that of the logged tokens.
    tokens = [one for one in trainer.train_dataset["completion_ids"]]
    likelihood = -logged["logps/chosen"] * len(tokens) / sum(len(pair[0]) for pair in tokens)
    assert logged["loss"] == pytest.approx(formula(0.0, 0.0, 0.1) + likelihood, rel=1e-5)
