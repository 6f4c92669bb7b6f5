"""The base of trainers that compare with no reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from tether.training.datasets import Rows
from tether.training.reference_free_arguments import ReferenceFreeConfig
from tether.training.trainer import TetherTrainer
from tether.types import ScoringBatch


class ReferenceFreeTrainer(TetherTrainer):
    """A trainer without `ref_model`; see `DPOTrainer` for the other arguments."""

    def __init__(
        self,
        model: str | Path | nn.Module,
        args: ReferenceFreeConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, ScoringBatch]] | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
