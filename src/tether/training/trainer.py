"""The one glue class over `transformers.Trainer`: it connects data, scoring, reference and objective to the steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerState,
)

from tether.compute.cpu_matmul import compute_by_products
from tether.data import text_tokenizer
from tether.errors import ConfigError
from tether.models.partitioned import on_whole_weights, whole_weights
from tether.models.spec import add_tokens, embed_tokens
from tether.models.structure import evaluation_mode, transformers_model, unwrap
from tether.reference import (
    SAME,
    FrozenProbe,
    GuardResult,
    ReferenceSpec,
    Resolved,
    Scorer,
    TrainingProof,
    compare_with_start,
    live_reference,
    require_start_equality,
    resolve,
)
from tether.reference.methods.shards import held_by
from tether.reference.record import restore, write_record, write_tensors
from tether.scoring import Layout, choose_layout, pack
from tether.training.batching import MicroBatch, accumulate_only, without_repeated_rows
from tether.training.callbacks import GuardCallback, MetricsFile
from tether.training.checkpoint import (
    read_objective,
    resume_folder,
    write_objective,
)
from tether.training.collate import batch_of, collate
from tether.training.config import PreferenceConfig
from tether.training.datasets import Rows, RunData, probe_examples
from tether.training.kind import TrainerKind
from tether.training.memory import choose_budget
from tether.training.metrics import MetricSums
from tether.training.precision import choose_precision, require_same_precision, write_precision
from tether.training.progress import install_progress
from tether.training.reduce import add_to_each, reduce_loss
from tether.training.reference_setup import declared_meaning, reference_spec
from tether.training.setup import (
    at_the_start,
    check_arguments,
    check_policy,
    config_of,
    learning_tokens,
    make_audible,
    policy_spec,
    router_coefficient,
    source_of,
)
from tether.training.sharded_reference import shard_reference
from tether.training.stored import Filled, flush_store, install_store, precompute, prepare_store, with_store
from tether.training.streaming import StreamedTraining, write_reports
from tether.types import LossOutput, Scores, ScoringBatch

logger = logging.getLogger("tether")
_PROBE_ROWS = 8


class TetherTrainer(TrainerKind, StreamedTraining):
    """Scores policy and reference with one function and lets `judge` combine them; see `DPOTrainer` for the
    arguments."""

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
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = check_arguments(args, self.config, train_dataset, eval_dataset, quantization_config)
        make_audible(args)
        source = str(model) if isinstance(model, (str, Path)) else source_of(model)
        check_policy(model, ref_model, args, peft_config)
        meaning = declared_meaning(args, ref_model)
        self.check_model(model, config := config_of(model, args), args)
        # Data before weights: what is wrong with the rows is known in seconds.
        tokenizer = processing_class or policy_spec(source, args).load_processing()
        new_tokens = add_tokens(text_tokenizer(tokenizer), args.add_tokens or ())
        self.data = RunData(tokenizer, args, self.arrange, config.is_encoder_decoder, self.arrange_chunks)
        train, evaluation = self.data.prepare_all(cast(Rows, train_dataset), eval_dataset)
        policy = self.load_model(source, args) if isinstance(model, (str, Path)) else model
        embed_tokens(policy, new_tokens)
        peft_config = learning_tokens(peft_config, new_tokens, policy, args)
        policy = at_the_start(self.add_adapter(policy, peft_config, args), args)
        choose_precision(args, policy)
        proof = TrainingProof(policy)
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or collate,
            train_dataset=cast(Any, train),
            eval_dataset=evaluation,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # the loss is a share of the whole step's mean, not to be divided again
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._new_tokens = 0
        self.restore_objective({})
        self.guard: GuardResult | None = None
        self._probe = pack(probe_examples(train, _PROBE_ROWS)).to(args.device)
        self.check_rows(self._probe)
        self.add_callback(MetricsFile(self.run_folder))
        self.add_callback(GuardCallback(proof, self._begin, args.reference_check_steps))
        self._router_coefficient = router_coefficient(args, policy)
        self.layout, self._scorer = self._proved(policy, "")
        self._budget = choose_budget(args, policy, coupled=self.couples_examples(), padded=self.layout != "tree")
        self._require_determinism()
        spec = reference_spec(args, meaning, ref_model, self.policy, source, text_tokenizer(tokenizer))
        self.resolved = self._resolved(spec)
        logger.info(self.convention())
        self._display = install_progress(self)
        self._report_data()

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _proved(self, model: nn.Module, whose: str) -> tuple[Layout, Scorer]:
        """A model's layout, proved on real rows, and the scoring function in it, in the run's precision everywhere."""
        compute_by_products(model)
        examples = probe_examples(cast(Dataset, self.train_dataset), 2, longest=True)
        with self._proving():
            choice = choose_layout(
                model,
                examples,
                requested=self.args.scoring_layout,
                backend=self.args.attention_backend,
                measures=self.measures,
            )
        logger.info(f"{whose}{choice.line}")

        def scorer(model: nn.Module, batch: ScoringBatch, **options: Any) -> Any:
            with self.accelerator.autocast():
                return self.scoring(model, batch, **choice.options, **options)

        return choice.layout, scorer

    def _proving(self) -> AbstractContextManager[Any]:
        """The precision of a proof: the weights' own, as rounding under autocast would hide small mistakes."""
        # FlashAttention knows no float32.
        return self.accelerator.autocast() if self.args.attention_backend == "flash" else nullcontext()

    def _resolved(self, spec: ReferenceSpec) -> Resolved:
        """The declared reference, and a line that says what it is."""
        resolved = resolve(
            spec, self.policy, self._probe, self._scorer, lambda other: self._proved(other, "reference ")[1]
        )
        resolved = with_store(resolved, self.args, self.accelerator, lambda: self.policy)
        logger.info(resolved.line)
        install_store(self, resolved.reference)
        return resolved

    def precompute_reference(self) -> Filled:
        """Compute what the store lacks of the training set and every evaluation set, see `stored.precompute`."""
        return precompute(self)

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
        if self.deepspeed is not None:
            # Made by now; it gathers what a forward needs.
            held_by(self.policy, cast(nn.Module, self.deepspeed))
        shard_reference(self.resolved.reference, self.accelerator)
        reference = live_reference(self.resolved.reference)
        if reference.identity.meaning == "none":
            self._record(self.run_folder)
            return None
        model = self.policy
        if state.global_step == 0 and reference.identity.meaning == "start":
            self.guard = compare_with_start(model, reference, self._scorer, self._probe, reference.tolerance)
            logger.info(
                f"start equality: at most {self.guard.max_difference:.1e} nats between policy and reference on "
                f"{self.guard.rows} rows, {self.guard.tokens} tokens (allowed {reference.tolerance:.0e})"
            )
            require_start_equality(self.guard, reference)
        self._record(self.run_folder)
        return FrozenProbe(reference, self._probe, reference.tolerance)

    def _record(self, folder: Path) -> None:
        if self.is_world_process_zero():
            write_record(folder, self.resolved.reference, self.resolved.line, self.guard)

    def _report_data(self) -> None:
        self.follow_stream(self.run_folder)
        if self.is_world_process_zero():
            write_reports(self.run_folder, self.data.reports)

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
        with whole_weights(self.policy):
            if folder is not None:
                require_same_precision(folder, self.args)
                self.guard = restore(folder, live_reference(self.resolved.reference), self.policy)
            prepare_store(self, resumed=folder is not None)
        try:
            return super().train(resume_from_checkpoint=str(folder) if folder else None, **kwargs)
        finally:
            self._display.close()
            self.close_stream()
            flush_store(self.resolved.reference)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """`[2]`: examples and loss tokens of the whole optimizer step, over its micro-batches and all processes."""
        if not batch_samples:
            return None
        if "repeated" not in batch_samples[-1]:
            batch_samples[-1] |= vars(without_repeated_rows(batch_of(batch_samples[-1]), self.accelerator))
        self.before_step([MicroBatch(batch_of(inputs), bool(inputs.get("repeated"))) for inputs in batch_samples])
        batches = [batch_of(inputs) for inputs in batch_samples if not inputs.get("repeated")]
        counts = [sum(batch.num_examples for batch in batches), sum(self.loss_tokens(batch) for batch in batches)]
        return self.accelerator.reduce(torch.tensor(counts, device=device), reduction="sum")  # type: ignore[return-value]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch after the other, as the token budget splits the batch; their gradients add up."""
        if "absent" in inputs:
            return torch.zeros((), device=self.args.device)
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        parts = self._budget.split(batch_of(inputs), self.accelerator)
        *first, last = [replace(part, repeated=part.repeated or bool(inputs.get("repeated"))) for part in parts]
        loss = torch.zeros((), device=self.args.device)
        for part in first:
            with accumulate_only(self.accelerator, model):
                loss += super().training_step(model, vars(part), num_items_in_batch)
        return loss + super().training_step(model, vars(last), num_items_in_batch)

    def _judge_batch(self, model: nn.Module, batch: ScoringBatch, mode: str | None) -> LossOutput:
        batch = self.scored(batch)
        # The reference first: a snapshot swaps weights, and no activation of the policy may exist while it does.
        reference = self.reference_logps(batch)
        outputs = (*self.outputs, "aux_loss") if self._router_coefficient else self.outputs
        policy = self._scorer(model, batch, outputs=outputs)  # type: ignore[call-arg]
        output = self.judge(policy, Scores(reference, batch.completion_index, batch.num_completions), batch)
        if policy.aux_loss is not None:
            output = add_to_each(output, "aux_loss", policy.aux_loss, self._router_coefficient)
        if mode is not None:
            self._sums[mode].add(output.metrics)
        return output

    def _take_part(self, model: nn.Module) -> None:
        """Make the forwards of a micro-batch whose outcome nobody reads, for the others' sake."""
        batch = self.scored(self._probe)
        self.resolved.reference.score(batch)
        self._scorer(model, batch)

    def reference_logps(self, batch: ScoringBatch) -> Tensor:
        """The reference's `token_logps [N]` of a batch."""
        return self.resolved.reference.score(batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the step's mean loss."""
        batch, repeated = batch_of(inputs).to(self.args.device), bool(inputs.get("repeated"))
        output = self._judge_batch(model, batch, None if repeated else "train")
        self._new_tokens += 0 if repeated else self.trained_tokens(batch)
        totals = num_items_in_batch
        if totals is None:
            totals = torch.tensor([batch.num_examples, self.loss_tokens(batch)], device=batch.targets.device)
        loss = reduce_loss(output.per_example, totals[0], self.accelerator.num_processes)
        if output.per_token is not None:
            loss = loss + reduce_loss(output.per_token, totals[1].clamp(min=1), self.accelerator.num_processes)
        loss = loss * 0.0 if repeated else loss
        return (loss, output) if return_outputs else loss

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
        self._record(folder)
        write_tensors(folder, live_reference(self.resolved.reference), write=self.is_world_process_zero())
        if self.is_world_process_zero():
            write_precision(folder, self.args)
            write_objective(folder, state)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Two per parameter and token forward, four backward; the estimate that transformers makes."""
        if "absent" in inputs:
            return 0
        batch = batch_of(inputs)
        return 6 * batch.input_ids.numel() * transformers_model(self.policy).num_parameters(exclude_embeddings=True)
