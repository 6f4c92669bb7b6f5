"""A whole run file as types: the sections, with `objective` and `train`, which take any key of a configuration."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from tether.config.document import write_document
from tether.config.sections import (
    MEANINGS,
    Callbacks,
    Data,
    Judge,
    Lora,
    Model,
    Names,
    Peft,
    Reference,
    Rollout,
    Section,
    Text,
    key,
    short_form,
)
from tether.redact import is_secret, masked_values
from tether.training import PreferenceConfig

_DEFAULTS = {name: field.default for name, field in PreferenceConfig.__dataclass_fields__.items()}


def _plain_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class Objective(Section, extra="allow"):
    """`objective:` the loss, or several with weights, and its options; which loss takes which: see
    docs/choosing_an_objective.md. What is allowed is checked by the configuration of the loss' trainer.

    The other keys are those that the configuration of the loss' algorithm has and others have not, with its defaults.
    """

    loss: Text | Names = key(
        "sigmoid", "Name of the loss, or a list; see tether.objectives.", "the name of a loss, or a list of names"
    )


class Train(Section, extra="allow"):
    """`train:` the steps. Besides these keys, any field of the trainer's configuration by its Python name."""

    epochs: float = key(_DEFAULTS["num_train_epochs"], "Passes over the rows.", "a number above 0", gt=0)
    learning_rate: float = key(
        _DEFAULTS["learning_rate"], "Learning rate after the warm-up.", "a number from 0, such as 5.0e-6", ge=0
    )
    batch_size: int = key(
        _DEFAULTS["per_device_train_batch_size"],
        "Pairs per optimizer step over all devices; prompts, where completions are sampled. Split into micro-batches "
        "by the program: as few as fit `max_tokens_per_forward`, or of `per_device_train_batch_size`.",
        "a whole number from 1",
        ge=1,
    )
    max_length: int | None = key(
        _DEFAULTS["max_length"],
        "Tokens of prompt and completion together; null: no truncation.",
        "a whole number from 2, or null",
        ge=2,
    )
    max_steps: int = key(
        _DEFAULTS["max_steps"],
        "Optimizer steps after which the run ends whatever `epochs` says; -1: no limit.",
        "a whole number from 1, or -1 for no limit",
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


class RunConfig(Section):
    """A whole run file, checked.

    Args:
        model: the policy.
        lora: a new LoRA adapter; None trains the model as it is.
        peft: a new adapter of another kind, in place of `lora`.
        data: the rows.
        reference: what the policy is held to.
        objective: the loss.
        rewards: what judges completions that the policy samples; None where the rows have completions.
        rollout: how these are sampled.
        train: the steps.
        callbacks: what may end the run early.
        env: variables of the run's environment, for trackers and libraries.
        output: the run folder.
    """

    model: Annotated[Model, short_form("model", Model)] = key(
        ...,
        "Name the policy: a hub name, a folder, or a .gguf file.",
        "a name, or a mapping such as {name: …, dtype: float32}",
    )
    lora: Lora | None = Field(default=None, description="A new adapter; null: none.")
    peft: Peft | None = Field(default=None, description="A new adapter of another kind, in place of lora; null: none.")
    data: Data = Field(description="Name the rows, as in `data: {train: pairs.jsonl}`.")
    reference: Annotated[Reference, short_form("reference", Reference)] = key(
        Reference(), "What the policy is held to, and how its log-probs are computed and kept.", MEANINGS
    )
    objective: Objective = Field(default=Objective(), description="The loss and its options.")
    rewards: Annotated[list[Judge], Field(min_length=1)] | None = key(
        None,
        "What judges completions that the policy samples, as in [{name: numeric_answer}]; null: rows have completions.",
        "a list of mappings such as {name: numeric_answer, column: answer}, or null",
    )
    rollout: Rollout | None = Field(default=None, description="How these completions are sampled; null: the defaults.")
    train: Train = Field(default=Train(), description="The steps: epochs, batches, learning rate, lengths, saving.")
    callbacks: Callbacks | None = Field(default=None, description="What may end the run early; null: nothing.")
    env: dict[Text, str | int | float | bool] | None = key(
        None,
        "Variables of the environment, set where it does not have them, as in {WANDB_PROJECT: demo}; never a secret.",
        "a mapping of names to text or numbers, or null",
    )
    output: Text = key("runs/run", "The run folder; left out: runs/ and the run file's name.")

    @model_validator(mode="after")
    def _no_secret(self) -> RunConfig:
        for name in self.env or ():
            if is_secret(name):
                raise ValueError(
                    f"`env.{name}` is a secret, and run files are copied and shown. Take it out, and set {name} in the "
                    "environment"
                )
        return self

    def variables(self) -> dict[str, str]:
        """What `env` says, as text."""
        return {name: _plain_text(value) for name, value in (self.env or {}).items()}

    @model_validator(mode="after")
    def _one_adapter(self) -> RunConfig:
        if self.lora is not None and self.peft is not None:
            raise ValueError("`lora` and `peft` are two new adapters; leave one of them out")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain values."""
        return self.model_dump(mode="json")

    def dump_yaml(self) -> str:
        """The resolved run file; reading it gives the same run, but for secrets, which are not in it."""
        return write_document(masked_values(self.to_dict()))
