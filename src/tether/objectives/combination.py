"""One objective or several with weights, and the transforms before them: what is allowed together, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

from tether.objectives.losses.transforms import F_DIVERGENCES
from tether.objectives.objective import Objective, Problem, Quantity
from tether.objectives.registry import OBJECTIVES, check_options, unknown_loss
from tether.types import Kind


@dataclass(frozen=True)
class Combination:
    """A weighted sum of objectives over the same scores.

    Args:
        losses: names of the algorithm `dpo` in `OBJECTIVES`, all of one kind.
        weights: one for each; empty: 1 each.
        options: by name; each goes to every loss that takes it. Left out: the loss's own default.
        f_divergence_type: see `divergence_scores`.
        f_alpha_divergence_coef: for `alpha_divergence`; None: 0.5.
        ld_alpha: see `length_desensitised`; None: off.
        use_weighting: multiply the loss of a pair by WPO's weights of its completions, see `likelihood_weights`.

    Example:
        >>> Combination(("sigmoid", "sft"), (1.0, 0.2), {"beta": 0.1}).problem() is None
        True
        >>> print(Combination(("sft",), ld_alpha=0.5).problem())
        ld_alpha has no effect on 'sft': it changes the log-probs of whole completions, which 'sft' does not take.
    """

    losses: tuple[str, ...]
    weights: tuple[float, ...] = ()
    options: Mapping[str, float | None] = field(default_factory=dict)
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float | None = None
    ld_alpha: float | None = None
    use_weighting: bool = False

    @property
    def rows(self) -> tuple[Objective, ...]:
        """The rows of the table."""
        return tuple(OBJECTIVES["dpo"][name] for name in self.losses)

    @property
    def kind(self) -> Kind:
        """The kind of preference that all of them learn from."""
        return self.rows[0].kind

    @property
    def needs_reference(self) -> bool:
        """Whether any of them compares with a reference."""
        return any(row.needs_reference for row in self.rows)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What scoring the policy must give besides log-probs."""
        return ("log_collision",) * self.use_weighting + ("hidden",) * self.takes_divergence

    @property
    def takes_divergence(self) -> bool:
        """Whether any of them takes the KL between whole distributions, and not only log-probs of tokens."""
        return self.takes("reference_kl")

    def takes(self, quantity: Quantity) -> bool:
        """Whether any of them takes these numbers, such as `margins`."""
        return any(row.takes(quantity) for row in self.rows)

    def weighted(self) -> list[tuple[Objective, float]]:
        """Each row with its weight."""
        return list(zip(self.rows, self.weights or (1.0,) * len(self.losses), strict=True))

    def options_of(self, row: Objective) -> dict[str, float]:
        """The options that one of the losses is called with."""
        given = {**row.defaults, **self.options}
        return {name: value for name in row.defaults if (value := given[name]) is not None}

    @property
    def beta(self) -> float:
        """What turns log-ratios into reported rewards: the first beta among the losses; 1 where none has one."""
        return next((self.options_of(row)["beta"] for row in self.rows if "beta" in row.defaults), 1.0)

    def problem(self) -> Problem | None:
        """What is wrong, with the field that it is about; None when nothing is."""
        checks = (self._names, self._weights, self._options, self._divergence, self._desensitising, self._weighting)
        return next((found for check in checks if (found := check())), None)

    def _names(self) -> Problem | None:
        if not self.losses:
            return Problem("loss_type", "is empty; name at least one loss.")
        for name in self.losses:
            if name not in OBJECTIVES["dpo"]:
                return Problem("loss_type", unknown_loss("dpo", name))
        if len(set(self.losses)) < len(self.losses):
            return Problem(
                "loss_type", f"names a loss twice: {', '.join(self.losses)}. Give it one place and one weight."
            )
        kinds = {row.kind for row in self.rows}
        if len(kinds) > 1:
            each = ", ".join(f"{row.name} from {row.kind} data" for row in self.rows)
            return Problem(
                "loss_type", f"mixes losses that learn from different data: {each}. Combine losses of one kind."
            )
        return None

    def _weights(self) -> Problem | None:
        if self.weights and len(self.weights) != len(self.losses):
            return Problem(
                "loss_weights",
                f"has {len(self.weights)} values for the losses {', '.join(self.losses)}; give one for each, or none.",
            )
        if any(not (isfinite(weight) and weight > 0) for weight in self.weights):
            return Problem(
                "loss_weights",
                f"is {list(self.weights)}; each must be above 0. Leave out a loss that should not count.",
            )
        return None

    def _options(self) -> Problem | None:
        return check_options(self.rows, self.options)

    def _divergence(self) -> Problem | None:
        kind, coefficient = self.f_divergence_type, self.f_alpha_divergence_coef
        if kind not in F_DIVERGENCES:
            return Problem("f_divergence_type", f"is {kind!r}; allowed are {', '.join(F_DIVERGENCES)}.")
        if coefficient is not None and kind != "alpha_divergence":
            return Problem(
                "f_alpha_divergence_coef",
                f"has no effect with f_divergence_type {kind!r}; it belongs to 'alpha_divergence'.",
            )
        if coefficient is not None and not isfinite(coefficient):
            return Problem("f_alpha_divergence_coef", f"is {coefficient}; it must be a number.")
        if kind == "reverse_kl":
            return None
        unfit = [row.name for row in self.rows if row.needs_reference and not row.f_divergence]
        if unfit:
            fit = sorted(row.name for row in OBJECTIVES["dpo"].values() if row.f_divergence)
            return Problem(
                "f_divergence_type",
                f"{kind!r} has no meaning for {', '.join(unfit)}, which is derived from the reverse "
                f"KL itself; it has for {', '.join(fit)}.",
            )
        if not self.needs_reference:
            return Problem(
                "f_divergence_type", f"has no effect on {self._listed}: there is no reference to diverge from."
            )
        return None

    def _desensitising(self) -> Problem | None:
        if self.ld_alpha is None:
            return None
        if not 0 <= self.ld_alpha <= 1:
            return Problem("ld_alpha", f"is {self.ld_alpha}; it must be at least 0 and at most 1.")
        if all(row.averaged == "tokens" for row in self.rows):
            return Problem(
                "ld_alpha",
                f"has no effect on {self._listed}: it changes the log-probs of whole completions, which "
                f"{self._listed} does not take.",
            )
        if self.takes_divergence:
            return Problem(
                "ld_alpha", "has no meaning for a KL per token, which would keep the tail that log-probs lose."
            )
        for row in self.rows:
            if any(one.quantity == "logps" and one.per_token for one in row.inputs):
                return Problem(
                    "ld_alpha",
                    f"has no meaning for {row.name}, whose mean log-probs are those of a policy; without the "
                    "tail of a completion they would belong to none.",
                )
        return None

    def _weighting(self) -> Problem | None:
        if not self.use_weighting:
            return None
        for row in self.rows:
            if row.averaged == "micro_batch":
                return Problem(
                    "use_weighting", f"has no meaning for {row.name}, which sorts pairs apart from their weights."
                )
            if row.kind != "pair":
                return Problem("use_weighting", f"has no meaning for {row.name}: the weight is that of a pair.")
        return None

    @property
    def _listed(self) -> str:
        return repr(self.losses[0]) if len(self.losses) == 1 else ", ".join(self.losses)

    def convention(self) -> str:
        """What it sums, averages and weighs, in one line, for the start of a run."""
        parts = []
        for row, weight in self.weighted():
            options = ", ".join(f"{name} {value:g}" for name, value in self.options_of(row).items())
            factor = f"{weight:g} x " if self.weights else ""
            parts.append(f"{factor}{row.name}" + (f" ({options})" if options else "") + f": {row.convention}")
        transforms = []
        if self.f_divergence_type != "reverse_kl":
            coefficient = 0.5 if self.f_alpha_divergence_coef is None else self.f_alpha_divergence_coef
            alpha = f" with {coefficient:g}" if self.f_divergence_type == "alpha_divergence" else ""
            transforms.append(f"log-ratios through f' of {self.f_divergence_type}{alpha}")
        if self.ld_alpha is not None:
            transforms.append(f"tokens after the shorter completion's length count {self.ld_alpha:g}")
        if self.use_weighting:
            transforms.append("each pair weighed by the policy's likelihood of it (WPO)")
        return "objective: " + "; ".join(parts + transforms)
