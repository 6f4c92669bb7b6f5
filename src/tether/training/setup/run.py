"""A run, put together: what a trainer holds, built in the one order in which each part finds what it needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tether.compute.cpu_matmul import compute_by_products
from tether.compute.precision import choose_precision, require_own_precision
from tether.compute.threads import choose_threads
from tether.data import text_tokenizer
from tether.errors import ConfigError
from tether.models.adapters import in_one_way, refuse_nameless_layers, taken_out
from tether.models.before.blueprint import rehearse
from tether.models.fingerprint import model_fingerprint
from tether.models.spec import embed_tokens
from tether.models.structure import adapter_configs, evaluation_mode, transformers_model, uncompiled
from tether.progress import working
from tether.reference import SAME, FrozenProbe, Reference, StoredReference, TrainingProof, resolve
from tether.reference.base import Scorer
from tether.scoring import Layout, choose_layout, pack
from tether.scoring.attention.interface import HALF
from tether.scoring.batch import with_prompts
from tether.scoring.layout.proof import LayoutChoice, prove_again
from tether.training.algorithms.base import Algorithm
from tether.training.budget import TokenBudget, choose_budget
from tether.training.config import PreferenceConfig
from tether.training.noise import layout_for_noise
from tether.training.saving.model_settings import OwnSettings
from tether.training.setup.data import Rows, RunData
from tether.training.setup.limits import checked, limits_of, reference_limits
from tether.training.setup.policy import (
    announce_columns,
    at_the_start,
    check_arguments,
    check_collator,
    check_policy,
    check_router,
    config_of,
    default_arguments,
    learning_tokens,
    processing_of,
    router_coefficient,
    source_of,
    use_pad_token,
    with_adapter,
)
from tether.training.setup.reference import declared_meaning, reference_spec
from tether.training.source import Source
from tether.training.step import Context, MicroBatch, Step, own_rows
from tether.training.store import with_store
from tether.types import ScoringBatch

logger = logging.getLogger("tether")
_PROBE_ROWS = 8


@dataclass(frozen=True)
class Given:
    """What a trainer's constructor was given, see `DPOTrainer`; and arguments of its algorithm, such as rewards."""

    model: str | Path | nn.Module
    ref_model: str | Path | nn.Module | None
    args: PreferenceConfig | None
    train_dataset: Rows | None
    eval_dataset: Any
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None
    quantization_config: Any
    peft_config: PeftConfig | None
    parts: Mapping[str, Any] = field(default_factory=dict)
    data_collator: Any = None
    given_optimizer: bool = False

    @property
    def source_name(self) -> str:
        """Where the policy comes from."""
        return str(self.model) if isinstance(self.model, (str, Path)) else source_of(self.model)


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last.

    Args:
        algorithm: what is learnt, and how.
        data: prepares rows and keeps the reports on them.
        source: gives the batches.
        probe: a few training rows, on the run's device, for proofs and guards.
        layout: in which the policy is scored, as was proved.
        scorer: the scoring function in that layout and the run's precision.
        exact: the same in the precision of a proof, until accelerate has put the run's around the policy.
        budget: splits batches into micro-batches.
        router_weight: of the load-balancing loss; 0 for none.
        reference: the reference, with its store where it has one.
        line: what the reference is and why, in one line.
        stored: the reference's store; None without one.
        as_made: the reference's values of the probe as they are now; None without a reference.
        proof: that something trains.
        settings: the policy's own, which it is saved with.
        prove_again: proves the policy's layout once more, given the policy and how many updates there were.
    """

    algorithm: Algorithm[Any]
    data: RunData
    source: Source
    probe: ScoringBatch
    layout: Layout
    scorer: Scorer
    exact: Scorer
    budget: TokenBudget
    router_weight: float
    reference: Reference
    line: str
    stored: StoredReference | None
    as_made: FrozenProbe | None
    proof: TrainingProof
    settings: OwnSettings
    prove_again: Callable[[nn.Module, int], None]

    def scored(self, batch: ScoringBatch) -> ScoringBatch:
        """A batch with all that the algorithm has scored of it."""
        return with_prompts(batch) if self.algorithm.needs.prompts else batch


# Hands policy and rows to transformers, which makes the accelerator: configuration, policy, training rows, evaluation
# rows, tokenizer.
Start = Callable[[Any, nn.Module, Any, Any, Any], Accelerator]


def build_run(
    algorithm_class: type[Algorithm[Any]], given: Given, start: Start, policy_now: Callable[[], nn.Module]
) -> Run:
    """Check, load and prove everything that comes before the first step.

    Args:
        algorithm_class: of the trainer.
        given: what its constructor was given.
        start: called once, when policy and rows are ready.
        policy_now: the model in training as it is at the time, which sharding may exchange.

    Raises:
        ConfigError, DataError: before any weights are loaded, where that is possible.
        ReferencePolicyError: the reference is wrong, or nothing would train.
    """
    args = _arguments(given, algorithm_class.config)
    model, ref_model, source_name = given.model, given.ref_model, given.source_name
    # What contradicts itself is known before rows are read, what is wrong with rows before weights are loaded.
    check_policy(model, ref_model, args, given.peft_config)
    meaning = declared_meaning(args, ref_model)
    algorithm = algorithm_class(args, config_of(model, args), **given.parts)
    algorithm.check_model(model)
    tokenizer, new_tokens = processing_of(source_name, args, given.processing_class)
    data, source, evaluation = _rows(algorithm, given, args, tokenizer, new_tokens)
    policy, settings, before = _policy(algorithm, given, args, source_name, tokenizer, new_tokens)
    proof = TrainingProof(policy)
    accelerator = start(args, policy, source.rows, evaluation, tokenizer)
    settings.restore_cache()
    # Proofs on real rows: the layout, then the reference by that layout.
    probe = pack(source.probe(_PROBE_ROWS)).to(args.device)
    algorithm.check_rows(probe)
    announce_columns(algorithm.needs.columns, source.known, evaluation, complete=source.complete)
    prove = _Prover(algorithm, args, source, accelerator)
    layout, scorer = prove(policy, "", requested=layout_for_noise(args, policy))
    router = router_coefficient(args, policy, lambda: scorer(policy, probe, outputs=("aux_loss",)))
    whole = algorithm.needs.whole_batch
    budget = choose_budget(args.max_tokens_per_forward, args, policy, coupled=whole, padded=layout != "tree")
    prove.determinism(policy, probe)
    spec = reference_spec(args, meaning, ref_model, policy, source_name, text_tokenizer(tokenizer), before)
    with working("proving the reference"):
        resolved = resolve(spec, policy, probe, scorer, lambda other: prove(other, "reference ")[1])
    stored, line = with_store(resolved, args, accelerator, policy_now)
    logger.info(line)
    logger.info(algorithm.describe())
    reference = resolved.reference if stored is None else stored
    scoring = probe, layout, scorer, prove.exact, budget, router
    return Run(
        algorithm,
        data,
        source,
        *scoring,
        reference=reference,
        line=line,
        stored=stored,
        as_made=FrozenProbe.of(reference, probe),
        proof=proof,
        settings=settings,
        prove_again=prove.again,
    )


def _rows(
    algorithm: Algorithm[Any], given: Given, args: PreferenceConfig, tokenizer: Any, new_tokens: list[int]
) -> tuple[RunData, Source, Any]:
    """The rows of a run, prepared and found to fit the model: training rows and evaluation rows."""
    apart = bool(algorithm.model_config.is_encoder_decoder)
    limits = limits_of(given.model, algorithm.model_config, args, new_tokens, given.peft_config)
    check = checked(limits, reference_limits(given.ref_model, args), apart=apart)
    check_router(args, limits)
    if given.peft_config is not None and not isinstance(given.model, nn.Module):
        rehearse(given.peft_config, algorithm.model_config)
    data = RunData(tokenizer, args, algorithm.rows, apart, check, algorithm.chunks)
    use_pad_token(text_tokenizer(tokenizer), args.pad_token)
    source, evaluation = data.prepare_all(cast(Rows, given.train_dataset), given.eval_dataset)
    check_collator(given.data_collator, source.known)
    return data, algorithm.source(source, data), evaluation


def _policy(
    algorithm: Algorithm[Any],
    given: Given,
    args: PreferenceConfig,
    source_name: str,
    tokenizer: Any,
    new_tokens: list[int],
) -> tuple[nn.Module, OwnSettings, str | None]:
    """The policy as it will be at the first step: tokens, adapter, what trains, dropout, device; then its precision.

    With it, its own settings, and the fingerprint of what it was before this run put an adapter on it.
    """
    model = given.model
    policy = (
        algorithm.load_model(source_name)
        if isinstance(model, (str, Path))
        else taken_out(in_one_way(uncompiled(model)))
    )
    refuse_nameless_layers(policy)
    settings = OwnSettings(policy)
    embed_tokens(policy, new_tokens)
    plain = args.reference == "base" and not adapter_configs(policy)
    before = model_fingerprint(policy, without_adapters=True) if plain else None
    peft_config = learning_tokens(given.peft_config, new_tokens, policy, args)
    policy = at_the_start(with_adapter(policy, algorithm.adapter(peft_config), args), args)
    algorithm.prepare_model(policy, tokenizer)
    choose_threads(args.cpu_threads, on_cpu=args.computes_on_cpu())
    choose_precision(args, policy, cpu_matmul=args.cpu_matmul, on_cpu=args.computes_on_cpu())
    return policy, settings, before


def _arguments(given: Given, wanted: type[PreferenceConfig]) -> PreferenceConfig:
    require_own_precision("The trainer's constructor")
    args = default_arguments(given.model, wanted) if given.args is None else given.args
    args = check_arguments(args, wanted, given.train_dataset, given.eval_dataset, given.quantization_config)
    if args.auto_find_batch_size and given.given_optimizer:
        raise ConfigError(
            "is True, and an optimizer was given, which would go on with what it has seen where a run begins again. "
            "Leave one of them out.",
            "auto_find_batch_size",
        )
    return args


class _Prover:
    """Chooses the layout of a model by real rows, and binds the scoring function to it."""

    def __init__(self, algorithm: Algorithm[Any], args: PreferenceConfig, source: Source, accelerator: Accelerator):
        self._algorithm, self._args, self._accelerator = algorithm, args, accelerator
        self._examples = source.probe(2, longest=True)
        # Short ones, for a proof beside an optimizer's memory.
        self._short = source.probe(2)
        self._options: dict[str, Any] = {}
        self.again: Callable[[nn.Module, int], None] = lambda policy, updates: None
        self.exact: Scorer

    def __call__(self, model: nn.Module, whose: str, requested: Layout | None = None) -> tuple[Layout, Scorer]:
        """A model's layout, proved, and the scoring function in it, in the run's precision everywhere."""
        compute_by_products(model)
        with self._proving(), working(f"proving the {whose}layout"):
            choice = choose_layout(
                model,
                self._examples,
                requested=requested or self._args.scoring_layout,
                backend=self._args.attention_backend,
                measures=self._algorithm.measures,
            )
        logger.info(f"{whose}{choice.line}")
        self._options = choice.options
        if not whose:
            self.again, self.exact = partial(self._again, choice), self._scorer(choice, self._proving)
        return choice.layout, self._scorer(choice, self._accelerator.autocast)

    def _scorer(self, choice: LayoutChoice, precision: Callable[..., AbstractContextManager[Any]]) -> Scorer:
        scoring = self._algorithm.scoring

        def scorer(model: nn.Module, batch: ScoringBatch, *, outputs: tuple[str, ...] = ()) -> Any:
            with precision():
                return scoring(model, batch, outputs=outputs, **choice.options)

        return scorer

    def _again(self, choice: LayoutChoice, policy: nn.Module, updates: int) -> None:
        """Prove a layout once more, see `prove_again`."""
        # By now accelerate has put its precision around the model's own forward.
        with self._accelerator.autocast():
            difference = prove_again(policy, self._short, choice, updates)
        logger.info(f"scoring: {choice.name}, at most {difference:.1e} {choice.measures.unit} after {updates} updates")

    def _proving(self) -> AbstractContextManager[Any]:
        """The precision of a proof: the weights' own, as rounding under autocast would hide small mistakes."""
        # Some kernels know no float32.
        return self._accelerator.autocast() if self._args.attention_backend in HALF else nullcontext()

    def determinism(self, policy: nn.Module, probe: ScoringBatch) -> None:
        """Where dropout is disabled, training mode must compute what evaluation mode does.

        Raises:
            ConfigError: it does not.
        """
        if not self._args.disable_dropout:
            return
        packed = self._algorithm.measures.packed
        with torch.no_grad(), self._accelerator.autocast():
            policy.train()
            training = packed(policy, probe, **self._options)
            with evaluation_mode(policy):
                difference = (training - packed(policy, probe, **self._options)).abs().max().item()
        if difference > SAME:
            raise ConfigError(
                f"With dropout disabled, {type(transformers_model(policy)).__name__} still differs between training "
                f"and evaluation mode, by {difference:.2g} nats. Set disable_dropout=False to keep its randomness."
            )


def whole_step(part: MicroBatch, run: Run, context: Context, processes: int) -> Step:
    """A micro-batch of an evaluation as a step of its own: the loss of it is its mean, on any number of processes."""
    batch = part.batch
    counts = [batch.num_examples, len(batch.branches), run.algorithm.loss_tokens(batch)]
    return Step(((part,),), processes * torch.tensor(counts), context, evaluates=True)


def build_step(inputs: list[Any], run: Run, accelerator: Accelerator, device: torch.device) -> Step:
    """This process' share in an optimizer step; a collective call, since all processes split theirs alike.

    Args:
        inputs: batches of the data loader, as the collator returned them.
        run: its budget, and what its algorithm has scored and counted.
        accelerator: of the run.
        device: of the totals.
    """
    shares = []
    for place, one in enumerate(inputs):
        own = own_rows(one, accelerator, last=place == len(inputs) - 1)
        parts = run.budget.split(own.batch, accelerator)
        shares.append(tuple(MicroBatch(run.scored(part.batch), part.counts and own.counts) for part in parts))
    counted = [part.batch for share in shares for part in share if part.counts]
    totals = [
        sum(batch.num_examples for batch in counted),
        sum(len(batch.branches) for batch in counted),
        sum(map(run.algorithm.loss_tokens, counted)),
    ]
    whole = accelerator.reduce(torch.tensor(totals, device=device), reduction="sum")
    return Step(tuple(shares), cast(torch.Tensor, whole))
