"""TRL's callbacks: what a policy writes, for prepared rows; the display, which is Tether's own."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import GenerationConfig, TrainerCallback

from tether.data import text_tokenizer
from tether.models.structure import evaluation_mode
from tether.training import TetherTrainer


class RichProgressCallback(TrainerCallback):
    """Does nothing: every run has a display already, and two would write over each other."""


class LogCompletionsCallback(TrainerCallback):
    """Has the policy complete prompts of the evaluation set, and keeps what it writes in `completions.jsonl`.

    Args:
        trainer: a trainer with one evaluation set.
        generation_config: of transformers; left out: the model's own.
        num_prompts: the first so many; left out: all.
        freq: steps between two rounds; left out: `eval_steps`.
    """

    def __init__(
        self,
        trainer: TetherTrainer,
        generation_config: GenerationConfig | None = None,
        num_prompts: int | None = None,
        freq: int | None = None,
    ) -> None:
        rows: Any = trainer.eval_dataset
        if rows is None or isinstance(rows, dict):
            raise ValueError("LogCompletionsCallback needs a trainer with one evaluation set.")
        count = len(rows) if num_prompts is None else min(num_prompts, len(rows))
        self._prompts = [list(rows[i]["prompt_ids"]) for i in range(count)]
        self._trainer, self._generation, self._freq = trainer, generation_config, freq

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write, on one process."""
        every = self._freq or state.eval_steps
        if not every or state.global_step % every or not state.is_world_process_zero:
            return
        policy: Any = self._trainer.policy
        tokenizer = text_tokenizer(self._trainer.processing_class)  # type: ignore[arg-type]
        with (
            evaluation_mode(policy),
            torch.no_grad(),
            (self._trainer.run_folder / "completions.jsonl").open("a") as file,
        ):
            for ids in self._prompts:
                tokens = torch.tensor([ids], device=args.device)
                mask = torch.ones_like(tokens)
                found = policy.generate(input_ids=tokens, attention_mask=mask, generation_config=self._generation)
                text = tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)
                line = {"step": state.global_step, "prompt": tokenizer.decode(ids), "completion": text}
                file.write(json.dumps(line) + "\n")
