"""The run file as types: every key, its default, and what is allowed for it.

Defaults that `tether.DPOConfig` has too are the same there (a test holds them together), so that a run file and a
script that say the same train the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from tether.config.document import write_document
from tether.types import Meaning, Means


@dataclass(frozen=True)
class Allowed:
    """What may stand at a key, in words; printed when something else came."""

    words: str


class Section(BaseModel):
    """A mapping of the run file: no unknown keys, no silent conversion, not changed once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# Sections that may be written as one text: that text stands for this key of theirs.
SHORT_FORMS = {"model": "name", "reference": "meaning"}


def _named(section: str, kind: type[Section]) -> BeforeValidator:
    def expand(value: Any) -> Any:
        if isinstance(value, str):
            return {SHORT_FORMS[section]: value}
        if not isinstance(value, (dict, Section)):
            raise PydanticCustomError("short_form", "neither text nor a mapping")
        return value

    return BeforeValidator(expand, json_schema_input_type=str | kind)


Text = Annotated[str, Field(min_length=1), Allowed("text")]
Count = Annotated[int, Field(ge=1), Allowed("a whole number from 1")]
Flag = Annotated[bool, Allowed("true or false")]
# Initialisations that need nothing besides their name; EVA, CorDA and LoftQ need data or a configuration of their own.
_INITIALISATIONS = r"^(gaussian|orthogonal|olora|pissa|pissa_niter_[0-9]+)$"


# How another model is loaded: key of `reference` to keyword of `ref_model_init_kwargs`.
LOADING = {
    "revision": "revision",
    "dtype": "dtype",
    "quantization": "quantization",
    "device": "device_map",
    "attention": "attn_implementation",
}


class Model(Section):
    """`model:` the policy. `model: name` is short for `model: {name: name}`."""

    name: Text = Field(description="Hub name, folder of a model or of an adapter, or .gguf file.")
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Allowed("auto, float32, bfloat16 or float16")
    ] = Field(
        default="auto", description="Type of the weights; auto: float32 without an accelerator, else the checkpoint's."
    )
    revision: Annotated[Text | None, Allowed("text (in quotes if it looks like a number), or null")] = Field(
        default=None, description="Branch, tag or commit of a hub name."
    )
    attention: Annotated[Text | None, Allowed("text, such as sdpa or eager, or null")] = Field(
        default=None, description="Attention implementation of transformers; null: its default."
    )
    trust_remote_code: Flag = Field(
        default=False, description="Run Python code that comes with the model's repository."
    )


class Lora(Section):
    """`lora:` a new adapter on the model. Left out: full fine-tuning, or the model's own adapter is continued."""

    r: Count = Field(default=16, description="Rank.")
    alpha: Annotated[float, Field(gt=0), Allowed("a number above 0")] = Field(
        default=32, description="Scale; the update is multiplied by alpha / r."
    )
    target: Annotated[
        Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)],
        Allowed("all-linear, or a list of module names such as [q_proj, v_proj]"),
    ] = Field(default="all-linear", description="Modules that get an adapter.")
    dropout: Annotated[float, Field(ge=0, lt=1), Allowed("a number from 0 to below 1")] = Field(
        default=0.0, description="Dropout before the adapter; takes effect with `train.disable_dropout: false` only."
    )
    bias: Annotated[Literal["none", "all", "lora_only"], Allowed("none, all or lora_only")] = Field(
        default="none", description="Biases that are trained too."
    )
    rslora: Flag = Field(default=False, description="Scale by alpha / sqrt(r).")
    dora: Flag = Field(default=False, description="Train magnitude and direction apart (DoRA).")
    init: Annotated[
        bool | Annotated[str, Field(pattern=_INITIALISATIONS)],
        Allowed("true, false, gaussian, orthogonal, olora, pissa or pissa_niter_N"),
    ] = Field(default=True, description="How the adapter begins; true: at zero.")
    modules_to_save: Annotated[list[Text] | None, Allowed("a list of module names, or null")] = Field(
        default=None, description="Modules that are trained in full beside the adapter."
    )


class Rows(Section):
    """One source of rows, with what its columns are called and how often each row occurs."""

    path: Annotated[
        Text | Annotated[list[Text], Field(min_length=1)],
        Allowed("a path, glob, folder or hub name, or a list of paths"),
    ] = Field(description="Files, a folder or a hub name.")
    format: Annotated[Text | None, Allowed("the name of a format, such as chatml.intel; see docs/data.md")] = Field(
        default=None, description="How other tools lay out their rows; null: TRL's columns, or what it plainly is."
    )
    fields: Annotated[dict[str, Text], Allowed("a mapping such as {prompt: question}")] = Field(
        default_factory=dict, description="Name of a field to the column that holds it."
    )
    weight: Annotated[float, Field(gt=0, lt=1e6), Allowed("a number above 0")] = Field(
        default=1.0, description="How often each row occurs: 2 twice, 0.5 every second one."
    )
    split: Text = Field(default="train", description="Part of a hub data set.")
    prompt_format: Annotated[Text | None, Allowed("text with {prompt} in it, or null")] = Field(
        default=None, description="Pattern of the prompt, for the format user_defined; so for the keys below."
    )
    chosen_format: Annotated[Text | None, Allowed("text with {chosen} in it, or null")] = None
    rejected_format: Annotated[Text | None, Allowed("text with {rejected} in it, or null")] = None
    completion_format: Annotated[Text | None, Allowed("text with {completion} in it, or null")] = None


class Held(Section):
    """`eval: {split: 0.05}`: rows of the training set that are set aside."""

    split: Annotated[int | float, Field(gt=0), Allowed("a share below 1, or a number of rows")] = Field(
        description="Share of the training rows, or how many of them."
    )
    by: Annotated[Literal["prompt", "row"], Allowed("prompt or row")] = Field(
        default="prompt", description="prompt: no prompt is on both sides."
    )


def _kind_of_source(value: Any) -> str:
    if isinstance(value, str):
        return "@text"
    if isinstance(value, (dict, Section)):
        keys = value.keys() if isinstance(value, dict) else type(value).model_fields.keys()
        return "@rows" if "path" in keys else "@held" if "split" in keys else "@named"
    return "@list"


# What stands for rows in `data`, told apart by its shape; the tags are in the places that pydantic reports.
SOURCE_TAGS: dict[str, type[Section] | None] = {
    "@text": None,
    "@rows": Rows,
    "@held": Held,
    "@list": None,
    "@named": None,
}
_Source = Annotated[
    Annotated[Text, Tag("@text")] | Annotated[Rows, Tag("@rows")] | Annotated[list[Text], Tag("@list")],
    Discriminator(_kind_of_source),
]
_Some = (
    Annotated[Text, Tag("@text")]
    | Annotated[Rows, Tag("@rows")]
    | Annotated[list[_Source], Field(min_length=1), Tag("@list")]
)
Sources = Annotated[_Some, Discriminator(_kind_of_source)]
_NAMED = Annotated[dict[str, Sources], Field(min_length=1), Tag("@named")]


class Data(Section):
    """`data:` the rows; relative paths start in the current folder."""

    train: Annotated[
        Sources, Allowed("a path, a glob or a hub name, a mapping such as {path: …, format: …}, or a list of them")
    ] = Field(description="Rows with prompt, chosen and rejected: path, glob, hub name, mapping, or a list.")
    eval: Annotated[
        Annotated[_Some | Annotated[Held, Tag("@held")] | _NAMED, Discriminator(_kind_of_source)] | None,
        Allowed("a path, a glob or a hub name, a list of them, {split: 0.05}, or a mapping of names to them"),
    ] = Field(default=None, description="Held-out rows, a share of the training rows, or a mapping of names to sets.")

    @property
    def train_rows(self) -> Any:
        """What the trainer takes as training rows."""
        return _plain(self.train)

    @property
    def eval_rows(self) -> Any:
        """What the trainer takes as evaluation rows."""
        return _plain(self.eval)


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(exclude_defaults=True)
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value


class Sync(Section):
    """`reference.sync:` a reference that moves (TR-DPO): it becomes `alpha * policy + (1 - alpha) * reference`."""

    steps: Count = Field(default=512, description="Optimizer steps between two moves.")
    alpha: Annotated[float, Field(gt=0, le=1), Allowed("a number above 0 and at most 1")] = Field(
        default=0.6, description="The policy's share in the reference after a move; 1 replaces it."
    )


class Remote(Section):
    """`reference.remote:` a completions server that returns prompt log-probabilities, such as vLLM."""

    url: Annotated[str, Field(pattern="^https?://."), Allowed("an address that begins with http:// or https://")] = (
        Field(description="Give the server's address, with or without /v1.")
    )
    model: Text | None = Field(default=None, description="Name it is served under; null: the only one there is.")
    concurrency: Count = Field(default=8, description="Requests under way at once.")
    retries: Annotated[int, Field(ge=0), Allowed("a whole number from 0")] = Field(
        default=5, description="Further attempts after a failure that may pass."
    )
    timeout: Annotated[float, Field(gt=0), Allowed("seconds, above 0")] = Field(
        default=120.0, description="Seconds one request may take."
    )
    tolerance: Annotated[Annotated[float, Field(gt=0)] | None, Allowed("nats, above 0, or null")] = Field(
        default=None, description="Nats a token may differ from a computation here; null: what the dtype explains."
    )
    api_key_env: Text | None = Field(default=None, description="Environment variable with the server's key.")


class Reference(Section):
    """`reference:` what the policy is held to. `start`, `base` and `none` are short for `{meaning: …}`.

    `{model: name}` is short for `{meaning: model, model: name}`, and so are `{adapter: name}` and `{remote: {url: …}}`;
    `means` forces how the reference is computed, as in `{meaning: start, means: snapshot}`.
    """

    meaning: Annotated[Meaning, Allowed("start, base, none, {model: name} or {adapter: name}")] = Field(
        default="start",
        description="start: the policy before its first update; base: without adapters; model, adapter: another one.",
    )
    model: Annotated[Text | None, Allowed("text: hub name, folder or .gguf file; or null")] = Field(
        default=None, description="The other model, for the meaning `model`."
    )
    revision: Annotated[Text | None, Allowed("text (in quotes if it looks like a number), or null")] = Field(
        default=None, description="Branch, tag or commit of the other model."
    )
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None, Allowed("auto, float32, bfloat16, float16 or null")
    ] = Field(default=None, description="Type of the other model's weights; null: as the policy's.")
    quantization: Annotated[Literal["4bit", "8bit"] | None, Allowed("4bit, 8bit or null")] = Field(
        default=None, description="Quantise the other model with bitsandbytes; null: not."
    )
    device: Annotated[Text | None, Allowed("cpu, cuda:1, auto or another device, or null")] = Field(
        default=None, description="Where the other model is; auto: spread over devices; null: where the policy is."
    )
    attention: Annotated[Text | None, Allowed("text, such as sdpa or eager, or null")] = Field(
        default=None, description="Attention implementation of the other model; null: as the policy's."
    )
    adapter: Annotated[Text | None, Allowed("text: an adapter's folder, or the name of a loaded one; or null")] = Field(
        default=None, description="The other adapter, for the meaning `adapter`."
    )
    means: Annotated[
        Means | None, Allowed("adapter_off, adapter_on, snapshot, model, remote, or null (chosen and printed)")
    ] = Field(default=None, description="Forces how the reference is computed; null: chosen and printed.")
    snapshot: Annotated[Literal["device", "host"] | None, Allowed("device, host or null")] = Field(
        default=None, description="Where a snapshot is kept; null: by free memory."
    )
    sync: Annotated[Sync | None, Allowed("a mapping such as {steps: 512, alpha: 0.6}, or null")] = Field(
        default=None, description="Moves the reference during training; null: it stays."
    )
    remote: Annotated[Remote | None, Allowed("a mapping such as {url: …}, or null")] = Field(
        default=None, description="A server that computes the reference."
    )

    @model_validator(mode="before")
    @classmethod
    def _model_means_model(cls, value: Any) -> Any:
        if isinstance(value, dict) and "meaning" not in value:
            named = {"model": "model", "adapter": "adapter", "remote": "model"}
            meaning = next((meaning for key, meaning in named.items() if value.get(key) is not None), None)
            return value if meaning is None else {**value, "meaning": meaning}
        return value

    @model_validator(mode="after")
    def _model_where_it_belongs(self) -> Reference:
        if (self.meaning == "model" and self.remote is None) != (self.model is not None):
            raise ValueError(
                f"its meaning is {self.meaning} and its model is {self.model or 'null'}; a model is named for the "
                "meaning `model` and for no other, and not beside `remote`. Write {model: name}, or leave "
                "`reference.model` out"
            )
        if (self.meaning == "adapter") != (self.adapter is not None):
            raise ValueError(
                f"its meaning is {self.meaning} and its adapter is {self.adapter or 'null'}; an adapter is named for "
                "the meaning `adapter` and for no other. Write {adapter: name}, or leave `reference.adapter` out"
            )
        idle = [name for name in LOADING if self.model is None and getattr(self, name) is not None]
        if idle:
            raise ValueError(f"`{idle[0]}` is of another model, and none is named. Write {{model: name, {idle[0]}: …}}")
        return self

    def loading(self) -> dict[str, Any]:
        """Keywords for loading the other model, by the names of `ref_model_init_kwargs`."""
        found = {keyword: getattr(self, name) for name, keyword in LOADING.items()}
        return {keyword: value for keyword, value in found.items() if value is not None}


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
        lora: a new adapter; None trains the model as it is.
        data: the rows.
        reference: what the policy is held to.
        objective: the loss.
        train: the steps.
        output: the run folder.
    """

    model: Annotated[
        Model, _named("model", Model), Allowed("a name, or a mapping such as {name: …, dtype: float32}")
    ] = Field(description="Name the policy: a hub name, a folder, or a .gguf file.")
    lora: Lora | None = Field(default=None, description="A new adapter; null: none.")
    data: Data = Field(description="Name the rows, as in `data: {train: pairs.jsonl}`.")
    reference: Annotated[
        Reference, _named("reference", Reference), Allowed("start, base, none, {model: name} or {adapter: name}")
    ] = Reference()
    objective: Objective = Objective()
    train: Train = Train()
    output: Text = Field(default="runs/run", description="The run folder; left out: runs/ and the run file's name.")

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain values."""
        return self.model_dump(mode="json")

    def dump_yaml(self) -> str:
        """The resolved run file; reading it gives the same run."""
        return write_document(self.to_dict())
