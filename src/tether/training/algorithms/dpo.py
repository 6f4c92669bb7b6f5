"""Direct preference optimization and its family: pairs and ranked lists against a reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from tether.errors import ConfigError, DataError
from tether.objectives import OBJECTIVES, Combination
from tether.objectives.preference_loss import preference_loss
from tether.scoring.divergence import token_divergence
from tether.training.algorithms.base import Algorithm, Needs
from tether.training.config import PreferenceConfig
from tether.training.declaration import REGISTERED, option
from tether.training.step import Context, MicroBatch
from tether.training.trainer import TetherTrainer
from tether.types import LossOutput, Scores, ScoringBatch


@dataclass
class DPOConfig(PreferenceConfig, algorithm="dpo"):
    """Configuration of `DPOTrainer`; names and defaults as in TRL 1.16, and options of the objectives TRL has not.

    What each loss is, and which options it takes: docs/choosing_an_objective.md.

    Raises:
        ConfigError: an unknown loss, an option outside its range or without effect, or options that have no meaning
            together.
    """

    loss_type: list[str] = option(
        ["sigmoid"],
        'One or several names in `tether.objectives.OBJECTIVES["dpo"]`, for pairs or for ranked lists.',
        key="objective.loss",
    )
    loss_weights: list[float] | None = option(
        None, "One for each of several losses, above 0; None: 1 each.", key="objective.weights"
    )
    beta: float = REGISTERED
    label_smoothing: float = REGISTERED
    f_divergence_type: str = option(
        "reverse_kl",
        "What holds the policy to the reference: `reverse_kl`, `forward_kl`, `js_divergence` or `alpha_divergence`.",
    )
    f_alpha_divergence_coef: float | None = option(None, "Exponent of `alpha_divergence`; None: 0.5.")
    ld_alpha: float | None = option(
        None,
        "Weight, from 0 to 1, of the tokens by which a completion is longer than the other (LD-DPO); None: all count "
        "alike.",
    )
    use_weighting: bool = option(False, "Weigh each pair by how likely the policy would have written it (WPO).")
    discopop_tau: float = REGISTERED
    dpop_lambda: float = REGISTERED
    tdpo_alpha: float = REGISTERED
    rpo_eta: float = REGISTERED
    simpo_gamma: float = REGISTERED
    cpo_alpha: float = REGISTERED

    def __post_init__(self) -> None:
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        if self.f_alpha_divergence_coef == 0.5 and self.f_divergence_type != "alpha_divergence":
            self.f_alpha_divergence_coef = None  # TRL's default, which files and scripts write out
        names, combination = ", ".join(self.loss_type), self.combination()
        if problem := combination.problem():
            raise ConfigError(problem.words, problem.field)
        sorting = [row.name for row in combination.rows if row.averaged == "micro_batch"]
        if sorting and self.per_device_train_batch_size == 1:
            raise ConfigError(
                f"is 1, and {sorting[0]} sorts the pairs of a micro-batch, of which there would be one. Raise it, or "
                "take another loss.",
                "per_device_train_batch_size",
            )
        if combination.takes_divergence and self.wants_store():
            raise ConfigError(
                f"was given, and {names} takes the reference's whole distribution at each token, where a store keeps "
                "one number. Leave the store out.",
                self._store_field,
            )
        if combination.takes_divergence and (self.reference == "none" or self.reference_method == "remote"):
            raise ConfigError(
                f"is {self.reference!r} (reference_method {self.reference_method!r}), and {names} takes the "
                "reference's whole distribution at each token. Take a reference that is run here: adapter_off, "
                "snapshot or model.",
                "reference",
            )
        if not combination.needs_reference:
            self.go_without_reference(
                f"no loss among {names} compares with a reference", "reference", "reference_method"
            )
        super().__post_init__()

    @property
    def objective_name(self) -> str:
        """The losses, for messages."""
        return f"loss {', '.join(self.loss_type)}"

    def combination(self) -> Combination:
        """The objective: losses, weights, options that take effect or were changed, and transforms."""
        losses = Combination(tuple(self.loss_type))
        return Combination(
            losses=losses.losses,
            weights=tuple(self.loss_weights or ()),
            options={} if losses.problem() else self.given_options(),
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            ld_alpha=self.ld_alpha,
            use_weighting=self.use_weighting,
        )


class DPO(Algorithm[Scores]):
    """The losses of pairs and ranked lists in the registry, alone or combined."""

    config = DPOConfig
    args: DPOConfig

    @cached_property
    def objective(self) -> Combination:
        """Losses, weights, options and transforms."""
        return self.args.combination()

    @property
    def needs(self) -> Needs:
        """What the losses take, and for a KL per token the states before both heads."""
        objective = self.objective
        return Needs(
            columns=("margin", "weight") if objective.takes("margins") else ("weight",),
            policy=(*Needs.policy, *objective.outputs),
            reference=("hidden",) if objective.takes_divergence else (),
            whole_batch=any(row.averaged == "micro_batch" for row in objective.rows),
        )

    @property
    def name(self) -> str:
        """The losses."""
        return ", ".join(self.objective.losses)

    def check_rows(self, batch: ScoringBatch) -> None:
        """The rows are of the objective's kind, and have the margins that it needs or none that it ignores."""
        sizes = set(batch.sizes)
        if self.objective.kind == "pair" and sizes != {2}:
            raise DataError(f"{self.name} learns from pairs; the rows have {sorted(sizes)} completions.")
        needed = any(row.requires_margins for row in self.objective.rows)
        if needed and "margin" not in batch.values:
            raise DataError(f"{self.name} fits the reward gap of each pair; add a column `margin` to the rows.")
        if "margin" in batch.values and "margin" not in self.needs.columns:
            raise DataError(
                f"The rows have a column `margin`, which {self.name} would ignore. Remove it, or use one of "
                f"{', '.join(row.name for row in OBJECTIVES['dpo'].values() if row.takes('margins'))}."
            )

    def loss_tokens(self, batch: ScoringBatch) -> int:
        """Tokens of chosen completions, where a loss is averaged over them."""
        averaged = any(row.averaged == "tokens" for row in self.objective.rows)
        return int((batch.completion_index % 2 == 0).sum()) if averaged else 0

    def loss(self, policy: Scores, reference: Scores | None, part: MicroBatch, context: Context) -> LossOutput:
        """The configured losses."""
        divergence = None
        if self.objective.takes_divergence and reference is not None:
            divergence = token_divergence(reference, policy)
            policy = replace(policy, hidden=None, head=None)
        batch = part.batch
        return preference_loss(
            policy, reference, loss=self.objective, values=batch.values, sizes=batch.sizes, divergence=divergence
        )

    def describe(self) -> str:
        """What the objective's options mean."""
        return self.objective.convention()


class DPOTrainer(TetherTrainer):
    """Direct preference optimization; arguments as in TRL 1.16.

    Args:
        model: the policy: a name, a folder, a .gguf file, or a model in memory (which is then the start; disk is not
            read).
        ref_model: another model as the reference; left out, the reference is what `args.reference` says, by default the
            policy at the start.
        args: `DPOConfig`.
        data_collator: makes `{"batch": ScoringBatch}` of prepared rows; left out, they are packed.
        train_dataset: rows with `prompt`, `chosen` and `rejected`: a `datasets.Dataset`, a list, a path or a hub name.
        eval_dataset: the same, or a dictionary of several sets.
        processing_class: the tokenizer, or the processor of a model that sees images; left out, it is loaded from the
            model's source.
        callbacks: further transformers callbacks.
        optimizers: an optimizer and a scheduler in place of those that `args` describe.
        quantization_config: of transformers, for a model that is named; the same as in `model_init_kwargs`.
        peft_config: a PEFT configuration; adds a new adapter to the model.

    Raises:
        ConfigError, DataError: before any weights are loaded, where that is possible.
        ReferencePolicyError: the reference is wrong, or nothing would train.

    Reference:
        Rafailov et al., Direct Preference Optimization, arXiv:2305.18290.
    """

    args: DPOConfig  # type: ignore[override]
    algorithm_class = DPO
