"""Evaluation, for every trainer: means over real rows, in memory that does not grow with the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from tether.data import is_origin
from tether.errors import ConfigError
from tether.models.partitioned import whole_weights
from tether.reference.methods.shards import is_sharded
from tether.training.batching import joined
from tether.training.checkpoint import RenamedCheckpoints
from tether.training.collate import batch_of
from tether.training.metrics import MetricSums
from tether.training.reduce import sum_and_count
from tether.types import LossOutput, ScoringBatch

if TYPE_CHECKING:
    from tether.training.batching import TokenBudget
    from tether.training.datasets import RunData

_TOKEN_LOSS = "part of the loss that is averaged over tokens"


class EvaluationLoop(RenamedCheckpoints):
    """What `TetherTrainer` is beside its steps."""

    data: RunData
    _sums: dict[str, MetricSums]
    _budget: TokenBudget
    _display: Any

    def _judge_batch(self, model: nn.Module, batch: ScoringBatch, mode: str | None) -> LossOutput:
        raise TypeError(f"{type(self).__name__} does not say how it judges.")

    def _take_part(self, model: nn.Module) -> None:
        raise TypeError(f"{type(self).__name__} does not say how it scores.")

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss and metrics over real pairs, in memory that does not grow with the data."""
        model = self._wrap_model(cast(nn.Module, self.model), training=False)
        model.eval()
        self._sums["eval"] = MetricSums()  # an evaluation that was interrupted left some behind
        rows = 0
        together = is_sharded(model)
        for part in joined(self._evaluated_parts(dataloader), self.accelerator, together=together):
            with torch.no_grad(), self.compute_loss_context_manager():
                if part is None:
                    self._take_part(model)
                    continue
                output = self._judge_batch(model, part.to(self.args.device), "eval")
            self._sums["eval"].add({"loss": sum_and_count(output.per_example)})
            if output.per_token is not None:
                self._sums["eval"].add({_TOKEN_LOSS: sum_and_count(output.per_token)})
            rows += len(output.per_example)
        means = self._sums["eval"].means(self.accelerator)
        if _TOKEN_LOSS in means:
            means["loss"] += means.pop(_TOKEN_LOSS)
        means = cast(Any, self).completed(means, "eval")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)  # type: ignore

    def _evaluated_parts(self, dataloader: DataLoader) -> Iterator[ScoringBatch]:
        for inputs in dataloader:
            yield from (part.batch for part in self._budget.split(batch_of(inputs)))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Rows are shared among processes without repeating some to even them out: each counts once."""
        settings = self.accelerator.dataloader_config
        before, settings.even_batches = settings.even_batches, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            settings.even_batches = before

    def evaluate(self, eval_dataset: Any = None, **kwargs: Any) -> dict[str, float]:  # type: ignore[override]
        """Evaluate on the evaluation set, or on rows that were not seen before; see `transformers.Trainer.evaluate`."""
        known = (
            isinstance(eval_dataset, str) and isinstance(self.eval_dataset, dict) and eval_dataset in self.eval_dataset
        )
        if eval_dataset is not None and not known:
            eval_dataset = self._prepare_unseen(eval_dataset)
        try:
            # Before training, a policy that was loaded in shards has no engine yet that would gather them.
            with whole_weights(self.model):
                return super().evaluate(eval_dataset=cast(Any, eval_dataset), **kwargs)
        except BaseException:
            self._display.close()
            raise

    def _prepare_unseen(self, rows: Any, name: str = "eval") -> Any:
        if isinstance(rows, Mapping) and not is_origin(rows):
            return {key: self._prepare_unseen(part, f"{name}_{key}") for key, part in rows.items()}
        if isinstance(rows, Dataset) and "prompt_ids" in rows.column_names:
            return rows
        return self.data.prepare(name, rows).dataset

    def predict(self, test_dataset: Any, *_: Any, **__: Any) -> Any:
        """Not offered: there are no predictions to keep.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("predict() came; a preference trainer predicts nothing. Use evaluate(rows), or tether.score.")
