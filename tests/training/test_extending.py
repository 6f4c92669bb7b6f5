"""docs/extending.md works as it stands, and its losses are what it says."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from datasets import Dataset

from tether import DPOConfig
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
TOKENIZER = tiny_tokenizer()


def test_the_page_changes_losses_in_training_and_evaluation(tmp_path):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        exec(block, names)
    for name, expected in (("Halved", math.log(2) / 2), ("WithMarginTrainer", math.log1p(math.e))):
        run = names[name](
            model=tiny_model(vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2),
            args=DPOConfig(output_dir=str(tmp_path / name), max_steps=1, per_device_train_batch_size=2, **QUIET),
            train_dataset=Dataset.from_list(pair_rows(6)),
            eval_dataset=Dataset.from_list(pair_rows(3)),
            processing_class=TOKENIZER,
            compute_metrics=names["quarter"],
        )
        metrics = run.evaluate()
        assert (metrics["eval_loss"], metrics["eval_clear"]) == (pytest.approx(expected, abs=1e-5), 0.0)
        run.train()
        assert next(log["loss"] for log in run.state.log_history if "loss" in log) == pytest.approx(expected, abs=1e-5)
