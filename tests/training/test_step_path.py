"""What a reader must open to follow one DPO step, counted while a step runs.

What a step *does* is told in `training`, `reference` and `objectives`; how a forward is computed (`models`, `scoring`,
`compute`, `compat`) is behind `score` and is not counted.

`make check` runs it, by itself: in a worker of pytest-xdist, beside the threads that it has, a profile function once
made Python 3.11 go round at the entry of a function for ever.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig

from tether import DPOConfig, DPOTrainer
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TOLD_IN = ("tether.training", "tether.reference", "tether.objectives")
MOST = {"tether.training": 7, "tether.reference": 2, "tether.objectives": 6}


class Visited(DPOTrainer):
    """Notes the modules that compute during the second micro-batch, when nothing is prepared any more."""

    batches = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The step, watched once."""
        self.batches += 1
        if self.batches != 2:
            return super().training_step(*args, **kwargs)
        self.modules: set[str] = set()
        before = sys.getprofile()
        sys.setprofile(self.note)
        try:
            return super().training_step(*args, **kwargs)
        finally:
            sys.setprofile(before)

    def note(self, frame: FrameType, event: str, argument: Any) -> None:
        """Remember whose function is called."""
        if event == "call":
            self.modules.add(frame.f_globals.get("__name__", ""))


@pytest.mark.slow
def test_a_step_is_read_in_few_files(tmp_path):
    model = tiny_model(vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    run = Visited(
        model=model,
        args=DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, **QUIET),
        train_dataset=Dataset.from_list(pair_rows(8)),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    run.train()
    told = {room: sorted(name for name in run.modules if name.startswith(room)) for room in TOLD_IN}
    assert {"tether.training.trainer", "tether.training.algorithms.dpo"} <= set(told["tether.training"])
    assert "tether.objectives.losses.pairwise" in told["tether.objectives"]
    assert {room: len(names) for room, names in told.items() if len(names) > MOST[room]} == {}, told
