"""What scripts written for TRL read from a trainer and call on it, besides `transformers.Trainer`'s own members."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from tether.compat.accelerate import uneven_batches
from tether.errors import ConfigError
from tether.models.partitioned import whole_weights
from tether.models.structure import transformers_model, unwrap
from tether.training.config import PreferenceConfig
from tether.training.evaluation import prepare_unseen
from tether.training.saving.stop import says_what_is_kept
from tether.training.setup.run import Run
from tether.training.step import MicroBatch, batch_of
from tether.training.surface.model_card import write_card
from tether.training.surface.refused import refuse_callback


class Members:
    """Read-only members under TRL's names, true of the run as it is; evaluations; and what is not offered."""

    run: Run
    model: Any
    args: PreferenceConfig
    accelerator: Any
    eval_dataset: Any
    policy: Any
    _display: Any
    _tag_names: list[str]

    @property
    def ref_model(self) -> nn.Module | None:
        """The second model that is the reference; None where the reference is the policy itself in another state."""
        return self.run.reference.live.model

    @property
    def is_peft_model(self) -> bool:
        """Whether an adapter of PEFT trains."""
        return isinstance(unwrap(cast(nn.Module, self.model)), PeftModel)

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the load-balancing loss of experts is a part of the loss."""
        return self.run.router_weight > 0

    @property
    def ref_adapter_name(self) -> str | None:
        """The adapter that is the reference, where one was named."""
        return self.args.reference_adapter

    @property
    def beta(self) -> float:
        """The configuration's."""
        return cast(Any, self.args).beta

    @property
    def loss_type(self) -> Any:
        """The configuration's."""
        return cast(Any, self.args).loss_type

    def compute_ref_log_probs(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """The reference's log-probabilities of chosen and of rejected completions.

        Args:
            inputs: what the trainer's data loaders give.

        Returns:
            `[B]` each, summed over tokens.

        Raises:
            ConfigError: there is no reference.
        """
        batch = inputs.batch if isinstance(inputs, MicroBatch) else batch_of(inputs)
        with torch.no_grad():
            scores = self.run.reference.score(batch.to(self.args.device))
        if scores is None:
            raise ConfigError("compute_ref_log_probs() has nothing to compute: this objective has no reference.")
        return scores.logps[0::2], scores.logps[1::2]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Rows are shared among processes without repeating or dropping some: each counts once."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            with uneven_batches(self.accelerator):
                return cast(Any, super()).get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluate(self, eval_dataset: Any = None, **kwargs: Any) -> dict[str, float]:  # type: ignore[override]
        """Evaluate on the evaluation set, or on rows that were not seen before; see `transformers.Trainer.evaluate`."""
        named = isinstance(eval_dataset, str) and isinstance(self.eval_dataset, dict)
        if eval_dataset is not None and not (named and eval_dataset in cast(Any, self.eval_dataset)):
            eval_dataset = prepare_unseen(self.run.data, eval_dataset)
        try:
            # Before training, a policy that was loaded in shards has no engine yet that would gather them.
            with whole_weights(self.model), says_what_is_kept(cast(Any, self)):
                return cast(Any, super()).evaluate(eval_dataset=cast(Any, eval_dataset), **kwargs)
        except BaseException:
            self._display.close()
            raise

    def floating_point_ops(self, inputs: Any) -> int:
        """Two per parameter and token forward, four backward; the estimate that transformers makes."""
        tokens = sum(part.batch.input_ids.numel() for part in inputs)
        return 6 * tokens * transformers_model(self.policy).num_parameters(exclude_embeddings=True)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback; see `transformers.Trainer.add_callback`.

        Raises:
            ConfigError: one of TRL's that reads what is not there.
        """
        refuse_callback(callback)
        cast(Any, super()).add_callback(callback)

    def predict(self, test_dataset: Any, *_: Any, **__: Any) -> Any:
        """Not offered: what a preference trainer predicts of rows are its metrics."""
        raise ConfigError(
            "predict() has no meaning here, as logits are never built. Use evaluate(rows); with `compute_metrics` it "
            "gives every row's log-probs and rewards to a function of yours."
        )

    def hyperparameter_search(self, *_: Any, **__: Any) -> Any:
        """Not offered: it needs a model made anew for each trial, and with it a reference."""
        raise ConfigError(
            "hyperparameter_search() is not offered: each trial needs a policy and a reference of its own. Make a "
            "trainer for each trial in your search's own loop, or run `tether train run.yaml train.learning_rate=…`."
        )

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        language: str | None = None,
        license: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` into the output folder: what was trained, on what, against which reference.

        The arguments are TRL's first, then those of `transformers.Trainer.create_model_card`.
        """
        trainer: Any = self
        if not trainer.is_world_process_zero():
            return
        folder = Path(cast(str, self.args.output_dir))
        named = [tags] if isinstance(tags, str) else list(tags or ())
        write_card(
            folder / "README.md",
            name=model_name or folder.name,
            base=finetuned_from or getattr(transformers_model(trainer.policy).config, "name_or_path", ""),
            datasets=dataset_name or dataset_tags or dataset,
            tags=list(dict.fromkeys([*named, *self._tag_names])),
            adapter=self.is_peft_model,
            objective=self.run.algorithm.describe(),
            reference=self.run.line,
            steps=trainer.state.global_step,
            figures=next((log for log in reversed(trainer.state.log_history) if "loss" in log), {}),
            language=language,
            license=license,
            tasks=tasks,
            dataset_args=dataset_args,
        )
