"""The one class over `transformers.Trainer`: it takes a run's batches through scoring and loss to a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate import Accelerator
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from tether.compat.trainer import (
    announce_prediction_step,
    checkpoint_folder,
    deepspeed_engine,
    expect_summed_loss,
    keeps_shards,
    reports_more,
    train_batch_size,
    use_averages,
    use_live_weights,
    wrapped_for_evaluation,
)
from tether.compute.precision import require_same_precision, write_precision
from tether.data.prepare.report import write_reports
from tether.files import write_whole
from tether.models.partitioned import on_whole_weights, whole_weights
from tether.models.structure import transformers_model, unwrap
from tether.reference import FrozenProbe, GuardResult
from tether.reference.base import frozen_pass
from tether.reference.methods.shards import held_by, is_sharded
from tether.reference.record import restore, write_record, write_tensors
from tether.report.live import PageWriter
from tether.training.algorithms.base import Algorithm, Passes
from tether.training.budget import accumulate_only, joined
from tether.training.callbacks import GuardCallback, MetricsFile, ThreadsCallback
from tether.training.checkpoint import (
    best_checkpoint,
    load_checkpoint,
    read_objective,
    refuse_second_run,
    require_parts,
    resume_folder,
    write_objective,
)
from tether.training.config import PreferenceConfig
from tether.training.evaluation import (
    announce_best,
    checked_outputs,
    evaluate,
    evaluated_names,
    require_metric,
    user_metrics,
)
from tether.training.health import Watch, facts_of
from tether.training.metrics import MetricSums, read_window, write_window
from tether.training.noise import SequenceNoise
from tether.training.progress import install_progress
from tether.training.saving.atomic_checkpoint import save_whole
from tether.training.saving.checked_save import whole_save
from tether.training.saving.preflight import check_optimizer, clear_rehearsals, rehearse
from tether.training.saving.rank_status import Whereabouts
from tether.training.saving.resume_check import identity_of, require_same_run, write_identity
from tether.training.saving.saving import Saving
from tether.training.saving.shared_folder import require_one_checkpoint
from tether.training.saving.stop import StopOnSignal, one_run_at_a_time, says_what_is_kept
from tether.training.setup.data import Rows
from tether.training.setup.lora_plus import check_lora_plus, part_rates
from tether.training.setup.reference import check_start, shard_reference
from tether.training.setup.restart import Attempts
from tether.training.setup.run import Given, Run, build_run, build_step, whole_step
from tether.training.step import Context, MicroBatch, Step, batch_of, collate, reduce_loss, with_term
from tether.training.store import StoreCallback, StoreFill, fill_ahead, verify_store
from tether.training.surface.refused import accepted_arguments, overrides, refuse_callback, refuse_overrides
from tether.training.surface.resolved_config import CONFIG, described
from tether.training.surface.trl_members import Members
from tether.types import LossOutput, Scores, ScoringBatch


class TetherTrainer(Members, Trainer):  # type: ignore[misc]  # its card takes TRL's arguments first
    """Scores policy and reference with one function and lets an `Algorithm` combine them; see `DPOTrainer` for the
    arguments."""

    algorithm_class: ClassVar[type[Algorithm[Any]]]
    algorithm_parts: Mapping[str, Any] = {}
    args: PreferenceConfig

    @on_whole_weights
    def __init__(
        self,
        model: str | Path | nn.Module,
        ref_model: str | Path | nn.Module | None = None,
        args: PreferenceConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, ScoringBatch]] | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        **others: Any,
    ) -> None:
        refuse_overrides(self)
        others, processing_class = accepted_arguments(others, self, processing_class)
        for callback in callbacks or ():
            refuse_callback(callback)

        def start(args: Any, policy: nn.Module, train: Any, evaluation: Any, tokenizer: Any) -> Accelerator:
            check_optimizer(args, optimizers[0])
            check_lora_plus(args, policy, own)
            # A nested function has no first argument that a bare `super()` could take for the trainer.
            super(TetherTrainer, self).__init__(
                model=policy,
                args=args,
                data_collator=data_collator or collate,
                train_dataset=train,
                eval_dataset=evaluation,
                processing_class=tokenizer,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                **others,
            )
            return self.accelerator

        own = optimizers != (None, None) or "optimizer_cls_and_kwargs" in others
        rows = train_dataset, eval_dataset, processing_class
        more = quantization_config, peft_config, self.algorithm_parts, data_collator, own
        given = Given(model, ref_model, args, *rows, *more)
        self.run: Run = build_run(self.algorithm_class, given, start, lambda: self.policy)
        self.run.algorithm.attach(self._passes())
        expect_summed_loss(self)
        self._sums, self._new_tokens, self._attempts = MetricSums(), 0, Attempts()
        self.guard: GuardResult | None = None
        self._tag_names = ["tether", self.algorithm_class.__name__.lower()]
        self._saving = Saving(self.run, self.args, self.accelerator, self.processing_class)
        self._display = install_progress(self)
        self._identity = identity_of(self.run, self.args, self.policy)
        self._signals = StopOnSignal(self.accelerator)
        self._resumed: Path | None = None
        # What `config.yaml` in the run folder says; a command puts its run file there.
        self.described = described(type(self).__name__, given, self.args)
        _follow(self)

    @property
    def policy(self) -> nn.Module:
        """The model in training, outside wrappers of data parallelism."""
        return unwrap(cast(nn.Module, self.model))

    @property
    def run_folder(self) -> Path:
        """Where records, metrics and checkpoints go."""
        return Path(cast(str, self.args.output_dir))

    @property
    def saves_at_end(self) -> bool:
        """Whether `train` leaves the trained adapter or model in the run folder; not where nothing is to be saved."""
        return self.args.save_strategy != "no"

    def precompute_reference(self, part: tuple[int, int] | None = None) -> StoreFill:
        """Compute what the store lacks of the training set and every evaluation set, see `tether.training.store`."""
        run, order = self.run, self._order()
        return fill_ahead(run.stored, run.source, self.eval_dataset, self.args, self.accelerator, order, part)

    # -- a step ----------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of a step, split into micro-batches; their `Step` travels as `num_items_in_batch`."""
        use_live_weights(self.optimizer)  # an evaluation may have left averages in the model
        source, mark = self.run.source, self.run.source.mark()
        with says_what_is_kept(self, lambda: source.rewind(mark)):
            inputs = list(islice(epoch_iterator, num_batches))
        if not inputs:
            return [], None
        step = self._with_context(build_step(inputs, self.run, self.accelerator, device))
        # Empty ones in front: transformers counts `num_batches` also where the end of a pass has fewer.
        return [*[()] * (num_batches - len(inputs)), *step.shares], step

    def _with_context(self, step: Step) -> Step:
        context = self.run.algorithm.begin_step(step, self._passes())
        self._sums.add(context.metrics)
        return replace(step, context=context)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch of a batch after the other; their gradients add up."""
        step, parts = num_items_in_batch, inputs  # as `get_batch_samples` gave them
        if not isinstance(step, Step):  # called outside the loop, with what the collator returned
            step = self._with_context(build_step([inputs], self.run, self.accelerator, self.args.device))
            (parts,) = step.shares
        loss = torch.zeros((), device=self.args.device)
        for part in parts[:-1]:
            with accumulate_only(self.accelerator, model):
                loss += super().training_step(model, cast(Any, part), cast(Any, step))
        for part in parts[-1:]:
            loss = loss + super().training_step(model, cast(Any, part), cast(Any, step))
        self._saving.finite.saw(loss)
        if parts is step.shares[-1]:  # the last batch of the step
            self.run.algorithm.end_step(step.context, self._passes())
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        # A micro-batch is known by itself until it is computed, which moves it to the device.
        return inputs if isinstance(inputs, MicroBatch) else super()._prepare_inputs(inputs)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the step's loss."""
        step, part = num_items_in_batch, inputs
        if not isinstance(step, Step):  # called outside the loop: the batch is all of its step, and one micro-batch
            step = build_step([inputs], self.run, self.accelerator, self.args.device)
            part = inputs if isinstance(inputs, MicroBatch) else MicroBatch(self.run.scored(batch_of(inputs)))
            step = self._with_context(replace(step, shares=((part,),)))
        output = self._scored_loss(model, part, step.context, predictions=step.evaluates)
        if part.counts and not step.evaluates:
            self._sums.add(output.metrics)
            self._new_tokens += self.run.algorithm.trained_tokens(part.batch)
        loss = reduce_loss(output, step.totals, self.accelerator.num_processes)
        loss = loss if part.counts else loss * 0.0
        if deepspeed_engine(self) is not None and self.is_in_train:  # its engine updates inside the backward
            self._saving.finite.saw(loss)
            self._saving.finite.check_step(None, self.state.global_step)
        return (loss, output) if return_outputs else loss

    def _scored_loss(
        self, model: nn.Module, part: MicroBatch, context: Context, *, predictions: bool = False
    ) -> LossOutput:
        """The two passes over a micro-batch, and the loss of their scores."""
        run, needs = self.run, self.run.algorithm.needs
        moved = part.to(self.args.device)
        # The reference first: a snapshot swaps weights, and no activation of the policy may exist while it does.
        reference = run.algorithm.reference(part, context, lambda: run.reference.score(moved.batch, needs.reference))
        outputs = (*needs.policy, "aux_loss") if run.router_weight else needs.policy
        policy = run.scorer(model, moved.batch, outputs=outputs)
        output = run.algorithm.loss(policy, reference, moved, context)
        if run.router_weight and policy.aux_loss is not None:
            output = with_term(output, "aux_loss", policy.aux_loss, run.router_weight, moved.batch.num_examples)
        if predictions and self.compute_metrics is not None:
            output = replace(output, predictions=run.algorithm.predictions(policy, reference, moved.batch))
        return output

    def _passes(self) -> Passes:
        return Passes(
            policy=self._frozen_scores,
            reference=lambda batch: self.run.reference.score(batch, self.run.algorithm.needs.reference),
            accelerator=self.accelerator,
            model=lambda: self.policy,
            split=lambda batch: self.run.budget.split(batch, self.accelerator),
            state=lambda: self.state,
        )

    def _frozen_scores(self, batch: ScoringBatch, outputs: tuple[str, ...] = ()) -> Scores:
        model = cast(nn.Module, self.model_wrapped)
        with frozen_pass(model):
            return self.run.scorer(model, batch, outputs=outputs)

    def _take_part(self, model: nn.Module) -> None:
        """Make the forwards of a micro-batch whose outcome nobody reads, for the others' sake."""
        batch = self.run.scored(self.run.probe)
        if self.run.algorithm.scores_reference:
            self.run.reference.score(batch)
        self.run.scorer(model, batch)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called right before the update, whatever is clipped or logged.
        norm = super()._get_grad_norm(model, grad_norm)
        self._saving.finite.check_step(None if self.accelerator.scaler else norm, self.state.global_step)
        return norm

    # -- evaluation ------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss and metrics over real rows, in memory that does not grow with the data."""
        model = wrapped_for_evaluation(self)
        model.eval()
        use_averages(self.optimizer)
        context = self.run.algorithm.begin_evaluation(self._passes())
        own, kept = overrides(self, TetherTrainer.compute_loss), []

        def outputs() -> Iterator[tuple[MicroBatch, LossOutput, Tensor | None]]:
            for part in joined(self._evaluated_parts(dataloader), self.accelerator, together=is_sharded(model)):
                with torch.no_grad(), self.compute_loss_context_manager():
                    if part is None:
                        self._take_part(model)
                        continue
                    step = whole_step(part, self.run, context, self.accelerator.num_processes)
                    loss, output = checked_outputs(self.compute_loss(model, cast(Any, part), True, step))
                if self.compute_metrics is not None:
                    kept.append(output.predictions)
                yield part, output, loss if own else None

        means, rows = evaluate(outputs(), self.run.algorithm, context, self.run.router_weight, self.accelerator)
        if self.is_in_train:
            self._saving.finite.check_evaluation(means["loss"], self.state.global_step)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        if self.compute_metrics is not None:
            metrics |= user_metrics(self.compute_metrics, kept, metric_key_prefix)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)  # type: ignore

    def _evaluated_parts(self, dataloader: DataLoader) -> Iterator[MicroBatch]:
        for inputs in self.run.source.evaluated(dataloader):
            for part in self.run.budget.split(batch_of(inputs)):
                yield MicroBatch(self.run.scored(part.batch))
            announce_prediction_step(self)

    # -- a run -----------------------------------------------------------------------------------------------------

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train; see `transformers.Trainer.train`. Resuming restores the checkpoint's reference or refuses.

        Raises:
            ReferencePolicyError: a guard found the reference wrong, moved, or another than the checkpoint's.
        """
        refuse_overrides(self)  # once more: something may have been put on it since
        resume = resume_from_checkpoint if resume_from_checkpoint is not None else self.args.resume_from_checkpoint
        run, folder = self.run, resume_folder(resume, self.args.output_dir)
        refuse_second_run(self.state.global_step, folder)
        require_one_checkpoint(folder, self.args)
        self._resumed = folder
        self._attempts = Attempts()
        run.algorithm.load_state(read_objective(folder))
        with whole_weights(self.policy):
            if folder is not None:
                require_parts(folder, self.args)
                require_same_precision(folder, self.args.mixed_precision)
                self.guard = restore(folder, run.reference.live, self.policy)
                require_same_run(folder, self._identity)
                if run.stored is not None:
                    verify_store(run.stored, run.source.known)
            if self.args.precompute_ref_log_probs:
                self.precompute_reference()
        try:
            with (
                one_run_at_a_time(self.run_folder, main=self.args.should_save),
                self._signals,
                Whereabouts(self) as where,
            ):
                self.add_callback(where)
                if self.args.should_save:
                    clear_rehearsals(self.run_folder)
                if self.is_world_process_zero():
                    write_whole(self.run_folder / CONFIG, self.described)
                result = super().train(resume_from_checkpoint=str(folder) if folder else None, **kwargs)
                self._signals.refuse_to_go_on(checkpoint_folder(self))
                self._saving.begin(self.policy, self.optimizer, "the run ends with nothing saved of its last steps")
                if self.saves_at_end:
                    self.save_model()
            return result
        finally:
            self._display.close()
            run.source.close()
            run.reference.flush()

    def _before_first_step(self, state: TrainerState) -> FrozenProbe | None:
        """Before the first step: the guards, and the record in the run folder."""
        run = self.run
        engine = deepspeed_engine(self)
        if engine is not None:
            # Made by now; it gathers what a forward needs.
            held_by(self.policy, engine)
        shard_reference(run.reference.live, self.accelerator)
        if self._resumed is not None and state.global_step < state.max_steps:
            read_window(self, self._resumed, self._sums)
        # Weights that were cut into shards since then may also have been given another dtype.
        fresh = state.global_step == 0 and not run.proof.updates and engine is None and not is_sharded(self.policy)
        unmoved = run.as_made if fresh else None
        if unmoved is not None:
            unmoved.check(0)
        if state.global_step == 0:
            updates = run.proof.updates
            self.guard = check_start(self.policy, run.reference.live, run.scorer, run.probe, updates) or self.guard
        self._record(self.run_folder)
        if self.args.should_save:
            write_reports(self.run_folder, run.data.reports)
        return unmoved or FrozenProbe.of(run.reference, run.probe)

    def _prove_layout(self, updates: int) -> None:
        self.run.prove_again(self.policy, updates)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that `optim` names, with the learning rates of LoRA+ where they are asked for."""
        first = self.optimizer is None
        made = super().create_optimizer(model)
        if first and self.args.loraplus_lr_ratio is not None:
            part_rates(made, model or self.policy, self.args)
        return made

    def get_train_dataloader(self) -> DataLoader:
        """The source's own, where it has one; see `tether.training.source`."""
        own = self.run.source.loader(self._order(), self.accelerator.process_index, cast(Any, self.data_collator))
        return super().get_train_dataloader() if own is None else cast(DataLoader, own)

    def _inner_training_loop(  # type: ignore[override]
        self, batch_size: int | None = None, **keywords: Any
    ) -> Any:
        # Called again where memory has ended, see `auto_find_batch_size`.
        self._sums, self._new_tokens = MetricSums(), 0
        if self.args.auto_find_batch_size:
            self.run.algorithm.load_state(
                read_objective(resume_folder(keywords.get("resume_from_checkpoint"), self.args.output_dir))
            )
            batch_size = self._attempts.begin(self, self.policy, self.run.budget, cast(int, batch_size))
        return super()._inner_training_loop(batch_size=batch_size, **keywords)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        found = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None and self.state.global_step >= max_steps:
            return num_train_epochs, 0  # all steps were made: no epoch is left to begin
        if resume_from_checkpoint is None or not self.run.source.keeps_position:
            return found
        # The loader begins where the checkpoint stands: the loop has nothing to skip.
        return self.run.source.resume(Path(resume_from_checkpoint), skip=not self.args.ignore_data_skip), 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step metrics, means since the last log, to a training log."""
        if "loss" in logs:
            logs |= self.run.algorithm.complete(self._sums.means(self.accelerator))
            logs["num_tokens"] = float(self._count_tokens())
            logs |= self._display.measured(logs["num_tokens"], self.args.device)
        super().log(logs, start_time)

    def _count_tokens(self) -> int:
        """Tokens trained on by all processes; kept in the trainer's state, which a checkpoint holds."""
        new = torch.tensor(self._new_tokens, device=self.args.device)
        self._new_tokens = 0
        self.state.num_input_tokens_seen += int(self.accelerator.reduce(new, reduction="sum"))  # type: ignore[arg-type]
        return self.state.num_input_tokens_seen

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._count_tokens()

        def write(folder: Path) -> None:
            super(TetherTrainer, self)._save_checkpoint(model, trial)
            main = self.args.should_save  # with `save_on_each_node`, one process of each
            self._record(folder)
            write_tensors(folder, self.run.reference.live, write=main)
            if main:
                write_precision(folder, self.args.mixed_precision)
                write_objective(folder, self.run.algorithm.state())
                write_identity(folder, self._identity)
            write_window(self, folder, self._sums)
            self.run.source.save(folder, self.accelerator.process_index)

        save_whole(self, trial, write)

    def _record(self, folder: Path) -> None:
        if self.args.should_save:
            write_record(folder, self.run.reference, self.run.line, self.guard)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        inner = model or cast(nn.Module, self.model)
        if keeps_shards(self) or not load_checkpoint(inner, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        use_averages(self.optimizer)  # what is loaded are averages, and must not be taken for live weights
        best = str(best_checkpoint(str(self.state.best_model_checkpoint), self.run_folder, self._resumed))
        self.state.best_model_checkpoint = best
        if keeps_shards(self) or not load_checkpoint(cast(nn.Module, self.model), best):
            super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; what is loaded from the folder is compared with the one in memory, but in checkpoints.

        Raises:
            TetherError: a weight is not finite, a trained tensor is in no file, or another model would be loaded.
        """
        folder = Path(output_dir or self.run_folder)
        self._saving.begin(self.policy, self.optimizer, f"nothing was saved in {folder}")
        super().save_model(str(folder), _internal_call=True)
        if not _internal_call:
            self._saving.prove(self.policy, folder, shards=keeps_shards(self))
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or str(self.args.output_dir)
        with whole_save(cast(nn.Module, self.model), folder, self.args, self.run.settings, state_dict) as state:
            super()._save(output_dir, state)

    def _order(self) -> Any:
        return self.run.source.order(
            self.args,
            train_batch_size(self),
            self.accelerator.num_processes,
            split_batches=self.accelerator.split_batches,
        )


class ReferenceFreeTrainer(TetherTrainer):
    """A trainer without `ref_model`; see `DPOTrainer` for the other arguments."""

    def __init__(
        self,
        model: str | Path | nn.Module,
        args: PreferenceConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, ScoringBatch]] | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        **others: Any,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **others,
        )


def _follow(trainer: TetherTrainer) -> None:
    """What goes along with a run: its files, guards, rows and displays, and what is tried before the first step."""
    if callable(tagged := getattr(transformers_model(trainer.policy), "add_model_tags", None)):
        tagged(trainer._tag_names)
    trainer.add_callback(MetricsFile(trainer.run_folder))
    trainer.add_callback(PageWriter(trainer.run_folder))
    trainer.add_callback(Watch(trainer.run_folder, lambda: facts_of(trainer.args, trainer.policy)))
    trainer.add_callback(trainer._signals)
    check = trainer.args.reference_check_steps
    trainer.add_callback(GuardCallback(trainer.run, trainer._before_first_step, check, trainer._prove_layout))
    if trainer.args.cpu_threads == "auto" and trainer.args.computes_on_cpu():
        trainer.add_callback(ThreadsCallback())
    if trainer.args.neftune_noise_alpha is not None:
        trainer.add_callback(SequenceNoise(trainer))
    if trainer.run.stored is not None:
        verify_store(trainer.run.stored, trainer.run.source.known)
        trainer.add_callback(StoreCallback(trainer.run.stored, trainer.run.source, trainer.accelerator))
    for callback in trainer.run.source.callbacks(
        trainer.run.data, trainer.run_folder, main=trainer.is_world_process_zero()
    ):
        trainer.add_callback(callback)
    # Only where it is asked for: the evaluation of a few rows would be in a store that the run fills.
    wanted = trainer.args.metric_for_best_model if trainer.eval_dataset is not None else None
    if wanted is not None and not reports_more(trainer, TetherTrainer):
        names = evaluated_names(
            trainer.run, trainer._scored_loss, trainer.policy, trainer._passes(), trainer.accelerator
        )
        require_metric(wanted, names, trainer.eval_dataset)
    if wanted is not None:
        announce_best(trainer.args)
    rehearse(trainer._save, trainer._saving.prove_start, trainer.policy, trainer.args)
