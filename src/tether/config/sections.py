"""The run file as types: every key, its default, and what is allowed for it.

Defaults that `tether.DPOConfig` has too are the same there (a test holds them together), so that a run file and a
script that say the same train the same.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from tether.config.data_section import Data
from tether.config.document import write_document
from tether.config.model_section import Lora, Model, Peft
from tether.config.reference_section import Reference
from tether.config.section import Allowed, Count, Flag, Section, Text, named

Number = Annotated[float, Allowed("a number")]


class Objective(Section):
    """`objective:` the loss, or several with weights, and the options; which loss takes which: see
    docs/choosing_an_objective.md. What is allowed is checked by the trainer's configuration.

    Besides these keys, any field that the configuration of the loss' trainer alone has, such as `desirable_weight` of
    `tether.KTOConfig`.
    """

    # The further keys are checked in `tether.config.load`.
    model_config = ConfigDict(extra="allow")

    loss: Annotated[
        Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)],
        Allowed("the name of a loss, or a list of names"),
    ] = Field(default="sigmoid", description="Name of the loss, or a list; see tether.objectives.OBJECTIVES.")
    weights: Annotated[list[float] | None, Allowed("a list of numbers above 0, one for each loss, or null")] = Field(
        default=None, description="Weights of several losses; null: 1 each."
    )
    beta: Annotated[float, Allowed("a number above 0")] = Field(
        default=0.1, description="How strongly the policy is held to the reference, per nat."
    )
    label_smoothing: Annotated[float, Allowed("a number from 0 to below 0.5")] = Field(
        default=0.0, description="Chance that a label is wrong."
    )
    f_divergence_type: Annotated[Text, Allowed("reverse_kl, forward_kl, js_divergence or alpha_divergence")] = Field(
        default="reverse_kl", description="What holds the policy to the reference."
    )
    f_alpha_divergence_coef: Annotated[float | None, Allowed("a number, or null")] = Field(
        default=None, description="Exponent of alpha_divergence; null: 0.5."
    )
    ld_alpha: Annotated[float | None, Allowed("a number from 0 to 1, or null")] = Field(
        default=None, description="Weight of the tokens by which a completion is longer than the other; null: 1."
    )
    use_weighting: Flag = Field(default=False, description="Weigh pairs by how likely the policy would write them.")
    discopop_tau: Number = Field(default=0.05, description="Temperature of discopop.")
    dpop_lambda: Number = Field(default=50.0, description="Weight of the penalty of dpop.")
    tdpo_alpha: Number = Field(default=0.5, description="Weight of the difference of KLs in tdpo2.")
    rpo_eta: Number = Field(default=1.0, description="Scale of the reward gap that rpo fits.")
    simpo_gamma: Number = Field(default=0.5, description="Lead of the reward that simpo aims at.")
    cpo_alpha: Number = Field(default=1.0, description="Weight of the likelihood in cpo.")

    @property
    def arguments(self) -> dict[str, Any]:
        """The same by the names of `tether.DPOConfig`."""
        return {OBJECTIVE_FIELDS.get(name, name): value for name, value in self}

    @property
    def further(self) -> dict[str, Any]:
        """The keys that are not named above."""
        return dict(self.model_extra or {})


# Keys of `objective` that `tether.DPOConfig` has under another name.
OBJECTIVE_FIELDS = {"loss": "loss_type", "weights": "loss_weights"}


class Train(Section):
    """`train:` the steps. Besides these keys, any field of the trainer's configuration by its Python name."""

    # The further keys are checked against the configuration in `tether.config.fields`.
    model_config = ConfigDict(extra="allow")

    epochs: Annotated[float, Field(gt=0), Allowed("a number above 0")] = Field(
        default=3.0, description="Passes over the rows."
    )
    learning_rate: Annotated[float, Field(ge=0), Allowed("a number from 0, such as 5.0e-6")] = Field(
        default=1e-6, description="Learning rate after the warm-up."
    )
    batch_size: Count = Field(
        default=8,
        description="Pairs per optimizer step over all devices. Split into micro-batches by the program: as few as fit "
        "`max_tokens_per_forward`, or of `per_device_train_batch_size`.",
    )
    max_length: Annotated[int | None, Field(ge=2), Allowed("a whole number from 2, or null")] = Field(
        default=1024, description="Tokens of prompt and completion together; null: no truncation."
    )
    max_steps: Annotated[int, Allowed("a whole number from 1, or -1 for no limit")] = Field(
        default=-1, description="Optimizer steps after which the run ends whatever `epochs` says; -1: no limit."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_name_for_epochs(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "num_train_epochs" not in value:
            return value
        if "epochs" in value:
            raise ValueError("`epochs` and `num_train_epochs` are two names of one thing; leave one of them out")
        rest = dict(value)
        return {"epochs": rest.pop("num_train_epochs"), **rest}

    @model_validator(mode="after")
    def _some_steps(self) -> Train:
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"`max_steps` is {self.max_steps}; allowed is a whole number from 1, or -1 for no limit")
        return self

    @property
    def further(self) -> dict[str, Any]:
        """The keys that are not named above: fields of the trainer's configuration."""
        return dict(self.model_extra or {})


class RunConfig(Section):
    """A whole run file, checked.

    Args:
        model: the policy.
        lora: a new LoRA adapter; None trains the model as it is.
        peft: a new adapter of another kind, in place of `lora`.
        data: the rows.
        reference: what the policy is held to.
        objective: the loss.
        train: the steps.
        output: the run folder.
    """

    model: Annotated[
        Model, named("model", Model), Allowed("a name, or a mapping such as {name: …, dtype: float32}")
    ] = Field(description="Name the policy: a hub name, a folder, or a .gguf file.")
    lora: Lora | None = Field(default=None, description="A new adapter; null: none.")
    peft: Peft | None = Field(default=None, description="A new adapter of another kind, in place of lora; null: none.")
    data: Data = Field(description="Name the rows, as in `data: {train: pairs.jsonl}`.")
    reference: Annotated[
        Reference, named("reference", Reference), Allowed("start, base, none, {model: name} or {adapter: name}")
    ] = Reference()
    objective: Objective = Objective()
    train: Train = Train()
    output: Text = Field(default="runs/run", description="The run folder; left out: runs/ and the run file's name.")

    @model_validator(mode="after")
    def _one_adapter(self) -> RunConfig:
        if self.lora is not None and self.peft is not None:
            raise ValueError("`lora` and `peft` are two new adapters; leave one of them out")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain values."""
        return self.model_dump(mode="json")

    def dump_yaml(self) -> str:
        """The resolved run file; reading it gives the same run."""
        return write_document(self.to_dict())
