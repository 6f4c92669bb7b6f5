"""The one glue class over `transformers.Trainer`: it connects data, scoring, reference and objective to the steps."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_utils import EvalLoopOutput

from tether.errors import ConfigError
from tether.models import load_policy, load_tokenizer
from tether.models.structure import disable_dropout, evaluation_mode, transformers_model, unwrap
from tether.reference import (
    SAME,
    FrozenProbe,
    GuardResult,
    ReferenceSpec,
    Resolved,
    Scorer,
    TrainingProof,
    compare_with_start,
    require_start_equality,
    resolve,
)
from tether.reference.record import restore, write_record, write_tensors
from tether.scoring import Layout, choose_layout, pack, score
from tether.training.arguments import PreferenceConfig
from tether.training.callbacks import GuardCallback, MetricsFile
from tether.training.checkpoint import read_objective, refuse_silent_reanchoring, resume_folder, write_objective
from tether.training.datasets import Rows, RunData, probe_examples
from tether.training.kind import TrainerKind
from tether.training.metrics import MetricSums
from tether.training.progress import install_progress
from tether.training.reduce import reduce_loss, sum_and_count
from tether.training.setup import check_arguments, declared_meaning, loading, make_audible, source_of
from tether.types import LossOutput, Scores, ScoringBatch

logger = logging.getLogger("tether")
_PROBE_ROWS = 8
_TOKEN_LOSS = "part of the loss that is averaged over tokens"


class TetherTrainer(TrainerKind, Trainer):
    """Scores policy and reference with one function and lets `judge` combine them; see `DPOTrainer` for the
    arguments."""

    args: PreferenceConfig
    # What scoring the policy gives besides log-probs.

    def __init__(
        self,
        model: str | Path | nn.Module,
        ref_model: str | Path | nn.Module | None = None,
        args: PreferenceConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, ScoringBatch]] | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = check_arguments(args, self.config, train_dataset, eval_dataset)
        make_audible(args)
        source = str(model) if isinstance(model, (str, Path)) else source_of(model)
        if args.reference is None and ref_model is None and isinstance(model, (str, Path)):
            refuse_silent_reanchoring(source)
        meaning = declared_meaning(args, ref_model)
        if args.model_init_kwargs and not any(isinstance(one, (str, Path)) for one in (model, ref_model)):
            raise ConfigError("model_init_kwargs came with models in memory, which they cannot change. Leave them out.")
        # Data before weights: what is wrong with the rows is known in seconds.
        tokenizer = processing_class or load_tokenizer(source, **loading(args, tokenizer=True))
        self.data = RunData(tokenizer, args, self.arrange)
        train, evaluation = self.data.prepare_all(cast(Rows, train_dataset), eval_dataset)
        policy = self.load_model(source, args) if isinstance(model, (str, Path)) else model
        policy = self.add_adapter(policy, peft_config, args)
        if args.disable_dropout:
            disable_dropout(policy)
        proof = TrainingProof(policy)
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or self.collate,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # The loss is a share of the whole step's mean; transformers must not divide it again.
        self.model_accepts_loss_kwargs = True
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._new_tokens = 0
        self.restore_objective({})
        self.guard: GuardResult | None = None
        self._probe = pack(probe_examples(train, _PROBE_ROWS)).to(args.device)
        self.check_rows(self._probe)
        self.add_callback(MetricsFile(self.run_folder))
        self.add_callback(GuardCallback(proof, self._begin, args.reference_check_steps))
        self.layout, self._scorer = self._proved(policy, "")
        self._require_determinism()
        spec = self._reference_spec(meaning, ref_model, source)
        self.resolved: Resolved = resolve(
            spec, policy, self._probe, self._scorer, lambda other: self._proved(other, "reference ")[1]
        )
        logger.info(self.resolved.line)
        logger.info(self.convention())
        self._display = install_progress(self)
        self._write_data_report()

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _reference_spec(self, meaning: str, ref_model: Any, policy_source: str) -> ReferenceSpec:
        if isinstance(ref_model, (str, Path)):
            # A revision belongs to the policy's repository.
            options = {name: value for name, value in loading(self.args).items() if name != "revision"}
            source, ref_model = str(ref_model), load_policy(str(ref_model), **options)
        else:
            source = policy_source if ref_model is None else source_of(ref_model)
        if ref_model is not None:
            ref_model = ref_model.to(self.args.device)
        revision = getattr(transformers_model(ref_model or self.policy).config, "_commit_hash", None)
        return ReferenceSpec(meaning, self.args.reference_means, ref_model, source, revision)  # type: ignore[arg-type]

    def _proved(self, model: nn.Module, whose: str) -> tuple[Layout, Scorer]:
        """A model's layout, proved on real rows, and the scoring function in it, in the run's precision everywhere."""
        examples = probe_examples(cast(Dataset, self.train_dataset), 2, longest=True)
        with self.accelerator.autocast():
            choice = choose_layout(model, examples, requested=self.args.scoring_layout)
        logger.info(f"{whose}{choice.line}")

        def scorer(model: nn.Module, batch: ScoringBatch, **options: Any) -> Scores:
            with self.accelerator.autocast():
                return score(model, batch, layout=choice.layout, **options)

        return choice.layout, scorer

    def _probe_numbers(self) -> Tensor:
        return self._scorer(self.policy, self._probe).token_logps

    def _require_determinism(self) -> None:
        """With dropout disabled, training mode must compute what evaluation mode does."""
        if not self.args.disable_dropout:
            return
        with torch.no_grad():
            self.policy.train()
            training = self._probe_numbers()
            with evaluation_mode(self.policy):
                difference = (training - self._probe_numbers()).abs().max().item()
        if difference > SAME:
            raise ConfigError(
                f"With dropout disabled, {type(transformers_model(self.policy)).__name__} still differs between "
                f"training and evaluation mode, by {difference:.2g} nats. Set disable_dropout=False to train with its "
                "randomness."
            )

    def _begin(self, state: TrainerState) -> FrozenProbe | None:
        """Before the first step: the guards, and the record in the run folder."""
        reference = self.resolved.reference
        if reference.identity.meaning == "none":
            self._record(self.run_folder)
            return None
        model = self.policy
        if state.global_step == 0 and reference.identity.meaning == "start":
            self.guard = compare_with_start(model, reference, self._scorer, self._probe, SAME)
            logger.info(
                f"start equality: at most {self.guard.max_difference:.1e} nats between policy and reference on "
                f"{self.guard.rows} rows, {self.guard.tokens} tokens (allowed {SAME:.0e})"
            )
            require_start_equality(self.guard, reference)
        self._record(self.run_folder)
        return FrozenProbe(reference, self._probe, SAME)

    def _record(self, folder: Path) -> None:
        if self.is_world_process_zero():
            write_record(folder, self.resolved.reference, self.resolved.line, self.guard)

    def _write_data_report(self) -> None:
        if self.is_world_process_zero():
            self.run_folder.mkdir(parents=True, exist_ok=True)
            (self.run_folder / "data.json").write_text(json.dumps(self.data.reports, indent=2) + "\n", encoding="utf-8")

    @property
    def policy(self) -> nn.Module:
        """The model in training, outside wrappers of data parallelism."""
        return unwrap(cast(nn.Module, self.model))

    @property
    def run_folder(self) -> Path:
        """Where records, metrics and checkpoints go."""
        return Path(cast(str, self.args.output_dir))

    # -- steps -----------------------------------------------------------------------------------------------------

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train; see `transformers.Trainer.train`. Resuming restores the checkpoint's reference or refuses.

        Raises:
            ReferenceError: a guard found the reference wrong, moved, or another than the checkpoint's.
        """
        folder = resume_folder(resume_from_checkpoint, self.args.output_dir)
        self._sums["train"], self._new_tokens = MetricSums(), 0
        self.restore_objective(read_objective(folder))
        if folder is not None:
            self.guard = restore(folder, self.resolved.reference, self.policy)
        try:
            return super().train(resume_from_checkpoint=str(folder) if folder else None, **kwargs)
        finally:
            self._display.close()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """`[2]`: examples and loss tokens of the whole optimizer step, over its micro-batches and all processes."""
        if not batch_samples:
            return None
        batches = [_batch_of(inputs) for inputs in batch_samples]
        self.before_step(batches)
        counts = [sum(batch.num_examples for batch in batches), sum(self.loss_tokens(batch) for batch in batches)]
        return self.accelerator.reduce(torch.tensor(counts, device=device), reduction="sum")  # type: ignore[return-value]

    def _judge_batch(self, model: nn.Module, batch: ScoringBatch, mode: str) -> LossOutput:
        # The reference first: a snapshot swaps weights, and no activation of the policy may exist while it does.
        reference = self.reference_logps(batch)
        policy = self._scorer(model, batch, outputs=self.outputs)  # type: ignore[call-arg]
        output = self.judge(policy, Scores(reference, batch.completion_index, batch.num_completions), batch)
        self._sums[mode].add(output.metrics)
        return output

    def reference_logps(self, batch: ScoringBatch) -> Tensor:
        """The reference's `token_logps [N]` of a batch."""
        return self.resolved.reference.score(batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the step's mean loss."""
        batch = _batch_of(inputs).to(self.args.device)
        output = self._judge_batch(model, batch, "train")
        self._new_tokens += self.trained_tokens(batch)
        totals = num_items_in_batch
        if totals is None:
            totals = torch.tensor([batch.num_examples, self.loss_tokens(batch)], device=batch.targets.device)
        loss = reduce_loss(output.per_example, totals[0], self.accelerator.num_processes)
        if output.per_token is not None:
            loss = loss + reduce_loss(output.per_token, totals[1].clamp(min=1), self.accelerator.num_processes)
        return (loss, output) if return_outputs else loss

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
        for inputs in dataloader:
            batch = _batch_of(inputs).to(self.args.device)
            with torch.no_grad(), self.compute_loss_context_manager():
                output = self._judge_batch(model, batch, "eval")
            self._sums["eval"].add({"loss": sum_and_count(output.per_example)})
            if output.per_token is not None:
                self._sums["eval"].add({_TOKEN_LOSS: sum_and_count(output.per_token)})
            rows += len(output.per_example)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        means = self._sums["eval"].means(self.accelerator)
        if _TOKEN_LOSS in means:
            means["loss"] += means.pop(_TOKEN_LOSS)
        means = self.completed(means, "eval")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)  # type: ignore

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
            return super().evaluate(eval_dataset=cast(Any, eval_dataset), **kwargs)
        except BaseException:
            self._display.close()
            raise

    def _prepare_unseen(self, rows: Any, name: str = "eval") -> Any:
        if isinstance(rows, Mapping):
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step metrics, means since the last log, to a training log."""
        if "loss" in logs:
            logs |= self.completed(self._sums["train"].means(self.accelerator), "train")
            logs["num_tokens"] = float(self._count_tokens())
        super().log(logs, start_time)

    def _count_tokens(self) -> int:
        """Tokens trained on by all processes; kept in the trainer's state, which a checkpoint holds."""
        new = torch.tensor(self._new_tokens, device=self.args.device)
        self._new_tokens = 0
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(new, reduction="sum"))  # type: ignore[arg-type]
        return self.state.num_input_tokens_seen

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._count_tokens()
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        state = self.objective_state()
        if self.is_world_process_zero():
            self._record(folder)
            write_tensors(folder, self.resolved.reference, self.policy)
            write_objective(folder, state)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Two per parameter and token forward, four backward; the estimate that transformers makes."""
        batch = _batch_of(inputs)
        return 6 * batch.input_ids.numel() * transformers_model(self.policy).num_parameters(exclude_embeddings=True)


def _batch_of(inputs: Any) -> ScoringBatch:
    batch = inputs.get("batch") if isinstance(inputs, Mapping) else None
    if not isinstance(batch, ScoringBatch):
        raise ConfigError(
            f"The data collator returned {type(inputs).__name__}; it must return a dictionary with a "
            "ScoringBatch under 'batch', as tether.training.collate does. Leave data_collator out to pack the rows."
        )
    return batch
