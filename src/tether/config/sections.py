"""The run file as types: every key, its default, and what is allowed for it.

A key that stands for one field of the trainer's configuration has type, default, bounds and text from there
(`Section`, `section=`), and a section that stands for a dataclass has all of its fields as keys (`of=`). So it is with
all keys of `objective` and `train` that are not named here (`tether.config.fields`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from tether.config.words import field_types
from tether.data.sources.origin import REVISION, Names, Origin, Text
from tether.errors import Allowed
from tether.models.quantized import compute_dtype
from tether.reference import RemoteOptions
from tether.training import OnlineConfig, PreferenceConfig
from tether.training.declaration import Text as Declaration
from tether.types import Meaning


def key(default: Any, text: str, allowed: str = "", **bounds: Any) -> Any:
    """A key of a section; `...` as its default: it must be given. `allowed` left out: what its type says."""
    info: Any = Field(default=default, description=text, **bounds)
    info.metadata.extend([Allowed(allowed)] if allowed else [])
    return info


def _declared(section: str) -> Iterator[tuple[str, Any, Any]]:
    """Key, type and default of each field of every configuration that is a key of a section."""
    for config in (OnlineConfig, PreferenceConfig):
        types = field_types(config)
        for name, field in config.__dataclass_fields__.items():
            text = field.metadata.get("help")
            if not isinstance(text, Declaration) or text.key.rpartition(".")[0] != section:
                continue
            hint = Annotated[types[name], AfterValidator(_check(text))] if text.allowed else types[name]
            allowed = text.listed("null") if text.allowed else ""
            yield text.key.rpartition(".")[2], hint, key(field.default, str(text), allowed)


def _fields(of: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, type and default of each field of a dataclass, whose types say what the fields do and may be."""
    hints = get_type_hints(of, include_extras=True)
    for one in dataclasses.fields(of):
        made: Any = one.default_factory
        default = ... if one.default is dataclasses.MISSING else one.default
        yield one.name, hints[one.name], Field(default) if made is dataclasses.MISSING else Field(default_factory=made)


class Section(BaseModel):
    """A mapping of the run file: no unknown keys, no silent conversion, not changed once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def __init_subclass__(cls, section: str = "", of: Any = None, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name, hint, default in (*(_fields(of) if of else ()), *(_declared(section) if section else ())):
            if name not in inspect.get_annotations(cls):
                cls.__annotations__[name] = hint
                setattr(cls, name, default)

    @property
    def further(self) -> dict[str, Any]:
        """The keys that the section does not name."""
        return dict(self.model_extra or {})

    if TYPE_CHECKING:  # the keys that come from the configuration

        def __getattr__(self, name: str) -> Any: ...


def _check(text: Declaration) -> Any:
    def check(value: Any) -> Any:
        if text.problem(value):
            raise PydanticCustomError("declared", "not allowed")
        return value

    return check


# Sections that may be written as one text: that text stands for this key of theirs.
SHORT_FORMS = {"model": "name", "reference": "meaning"}


def short_form(section: str, kind: type[Section]) -> BeforeValidator:
    """Takes a text in place of a section."""

    def expand(value: Any) -> Any:
        if isinstance(value, str):
            return {SHORT_FORMS[section]: value}
        if not isinstance(value, (dict, Section)):
            raise PydanticCustomError("short_form", "neither text nor a mapping")
        return value

    return BeforeValidator(expand, json_schema_input_type=str | kind)


MEANINGS = "start, base, none, {model: name} or {adapter: name}"
_ATTENTION = "text, such as sdpa or eager, or null"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Rows(Section, of=Origin):
    """One source of rows, with what its columns are called and how often each row occurs."""

    path: Text | Names = key(
        ..., "Files, a folder or a hub name.", "a path, glob, folder or hub name, or a list of paths"
    )


_PIXELS = "a whole number from 1, or null"
_Side = Annotated[int, Field(ge=1)]


class Held(Section):
    """`eval: {split: 0.05}`: rows of the training set that are set aside."""

    split: int | float = key(
        ..., "Share of the training rows, or how many of them.", "a share below 1, or a number of rows", gt=0
    )
    by: Literal["prompt", "row"] = key("prompt", "prompt: no prompt is on both sides.", "prompt or row")


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
_One = Annotated[Text, Tag("@text")] | Annotated[Rows, Tag("@rows")]
_Source = Annotated[_One | Annotated[list[Text], Tag("@list")], Discriminator(_kind_of_source)]
_Some = _One | Annotated[list[_Source], Field(min_length=1), Tag("@list")]
Sources = Annotated[_Some, Discriminator(_kind_of_source)]
_Named = Annotated[dict[str, Sources], Field(min_length=1), Tag("@named")]
_Evaluated = Annotated[_Some | Annotated[Held, Tag("@held")] | _Named, Discriminator(_kind_of_source)]


class Sizes(Section):
    """`data.images:` sizes that images are brought to before the processor gets them."""

    max_pixels: int | None = key(None, "An image of more is made smaller; null: no bound.", _PIXELS, ge=1)
    min_pixels: int | None = key(None, "An image of fewer is made larger; null: no bound.", _PIXELS, ge=1)
    size: _Side | Annotated[list[_Side], Field(min_length=2, max_length=2)] | None = key(
        None,
        "Side of a square, with black beside what does not fill it; or width and height.",
        "a whole number from 1, [width, height], or null",
    )
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic"] = key("bicubic", "How pixels are computed.")


class Data(Section, section="data"):
    """`data:` the rows; relative paths start in the current folder."""

    train: Sources = key(
        ...,
        "Rows with prompt, chosen and rejected: path, glob, hub name, mapping, or a list.",
        "a path, a glob or a hub name, a mapping such as {path: …, format: …}, or a list of them",
    )
    eval: _Evaluated | None = key(
        None,
        "Held-out rows, a share of the training rows, or a mapping of names to sets.",
        "a path, a glob or a hub name, a list of them, {split: 0.05}, or a mapping of names to them",
    )
    check: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = key(
        None,
        "Largest shares of rows with each finding of `tether data check`; above one, the check fails and a run is "
        "refused before weights load; null: any.",
        "a mapping of findings to shares, such as {identical: 0.01}; see docs/data.md",
    )
    images: Sizes | None = key(
        None,
        "Sizes that images are brought to before the processor; null: as they are.",
        "a mapping such as {max_pixels: 589824}, or null",
    )
    cache: Text | Literal[False] | None = key(
        "auto",
        "Folder where prepared rows are kept for later runs; auto: `prepared` in $TETHER_CACHE or in ~/.cache/tether; "
        "null or false: nowhere.",
        "a folder, auto, or null for no cache",
    )

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


# How a model is loaded: key of `model` and `reference` to transformers' keyword.
LOADING = {
    "revision": "revision",
    "dtype": "dtype",
    "quantization": "quantization",
    "device": "device_map",
    "attention": "attn_implementation",
    "tokenizer": "tokenizer",
    "adapter": "adapter",
    "processor": "processor",
    "trust_remote_code": "trust_remote_code",
}


class Quantize(Section):
    """`model.quantization:` as a mapping: bitsandbytes' weights of 4 bits in detail."""

    type: Literal["nf4", "fp4"] = key("nf4", "How 16 values are spread.")
    double: bool = key(True, "Quantise the scales of blocks too.")
    storage: Literal["uint8", "float16", "bfloat16", "float32"] = key("uint8", "Type that the bits are kept in.")
    compute: Dtype = key("auto", "Type that is computed in; auto: bfloat16 on an accelerator, else float32.")

    def options(self) -> dict[str, Any]:
        """As transformers' `quantization_config` in plain values."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.type,
            "bnb_4bit_use_double_quant": self.double,
            "bnb_4bit_quant_storage": self.storage,
            "bnb_4bit_compute_dtype": compute_dtype(self.compute),
        }


class Model(Section, section="model"):
    """`model:` the policy. `model: name` is short for `model: {name: name}`."""

    name: Text = key(..., "Hub name, folder of a model or of an adapter, or .gguf file.")
    dtype: Dtype = key("auto", "Type of the weights; auto: float32 without an accelerator, else the checkpoint's.")
    revision: Text | None = key(None, "Branch, tag or commit of a hub name.", REVISION.words)
    quantization: Literal["4bit", "nf4", "8bit", "int8"] | Quantize | None = key(
        None,
        "Quantise the weights under an adapter: 4bit, 8bit by bitsandbytes, int8 by torchao; a mapping for 4 bits in "
        "detail; null: not.",
        "4bit (the same as nf4), 8bit, int8, a mapping such as {type: fp4, double: false}, or null",
    )
    device: Text | None = key(
        None,
        "Where the weights are loaded; null: where the run computes.",
        "cpu, cuda, cuda:1 or another device, auto, or null",
    )
    attention: Text | None = key(None, "Attention implementation of transformers; null: its default.", _ATTENTION)
    trust_remote_code: bool = key(False, "Run Python code that comes with the model's repository.")
    tokenizer: Text | None = key(None, "Another tokenizer (hub name, folder) with the model's ids; null: its own.")
    adapter: Text | Annotated[list[Text], Field(min_length=1)] | None = key(
        None,
        "Folder of an adapter on the model: it trains on, or is frozen beneath the new one of `lora` or `peft`. Of a "
        "list, each on those before it, the last trains on.",
        "a folder, a list of folders, or null",
    )
    processor: dict[str, Any] | None = key(
        None,
        "Keywords for the processor of a model that sees images, with which it is saved; null: as it was saved.",
        "a mapping such as {do_pan_and_scan: true}, or null",
    )
    add_tokens: Names | None = key(
        None, "New tokens for tokenizer and model; each begins as the mean of all others.", "a list of tokens, or null"
    )
    train: Names | None = key(
        None,
        "Only parameters in whose names one is found train, beside an adapter; null: all.",
        "a list of regular expressions, or null",
    )
    freeze: Names | None = key(
        None, "Parameters in whose names one is found do not train.", "a list of regular expressions, or null"
    )


class Lora(Section):
    """`lora:` a new adapter on the model. Left out: full fine-tuning, or the model's own adapter is continued."""

    r: int = key(16, "Rank.", "a whole number from 1", ge=1)
    alpha: float = key(32, "Scale; the update is multiplied by alpha / r.", "a number above 0", gt=0)
    target: Literal["all-linear"] | Names = key(
        "all-linear", "Modules that get an adapter.", "all-linear, or a list of module names such as [q_proj, v_proj]"
    )
    dropout: float = key(
        0.0,
        "Dropout before the adapter; takes effect with `train.disable_dropout: false` only.",
        "a number from 0 to below 1",
        ge=0,
        lt=1,
    )
    bias: Literal["none", "all", "lora_only"] = key("none", "Biases that are trained too.")
    rslora: bool = key(False, "Scale by alpha / sqrt(r).")
    dora: bool = key(False, "Train magnitude and direction apart (DoRA).")
    # Those that need nothing besides their name; EVA, CorDA and LoftQ need data or a configuration of their own.
    init: bool | Annotated[str, Field(pattern=r"^(gaussian|orthogonal|olora|pissa|pissa_niter_[0-9]+)$")] = key(
        True,
        "How the adapter begins; true: at zero.",
        "true, false, gaussian, orthogonal, olora, pissa or pissa_niter_N",
    )
    modules_to_save: list[Text] | None = key(None, "Modules that are trained in full beside the adapter.")
    target_parameters: Names | None = key(
        None,
        "Weights that get an adapter and are no linear layers, such as mlp.experts.gate_up_proj.",
        "a list of parameter names, or null",
    )


# Kind of adapter in a run file to PEFT's configuration of it.
ADAPTERS = {
    "lora": "LoraConfig",
    "vera": "VeraConfig",
    "ia3": "IA3Config",
    "loha": "LoHaConfig",
    "lokr": "LoKrConfig",
    "oft": "OFTConfig",
    "hra": "HRAConfig",
    "layer_norm": "LNTuningConfig",
    "prompt": "PromptTuningConfig",
    "prefix": "PrefixTuningConfig",
}


class Peft(Section, extra="allow"):
    """`peft:` a new adapter of any kind in docs/models.md, by PEFT's own names: any field of its configuration."""

    type: Literal[*ADAPTERS] = key(..., f"Name the kind of adapter: {', '.join(ADAPTERS)}.")  # pyright: ignore[reportInvalidTypeForm]


class Rollout(Section, section="rollout"):
    """`rollout:` how completions are sampled, how often they are trained on, and what is left out."""


class Sync(Section, section="reference.sync"):
    """`reference.sync:` a reference that moves (TR-DPO): it becomes `alpha * policy + (1 - alpha) * reference`."""


class Remote(Section, of=RemoteOptions):
    """`reference.remote:` a completions server that returns prompt log-probabilities, such as vLLM."""


class Asked(Remote):
    """`rewards: - judge:` a model behind an OpenAI-compatible `/v1/chat/completions`."""

    by: Literal["rating", "wins"] = key(
        "rating",
        "rating: from 1 to 10, each completion alone; wins: against the others of its prompt, in both orders.",
    )
    instructions: Text | None = key(
        None, "What it is asked, with {prompt}, {first} and for wins {second}; null: see docs/rewards.md."
    )
    max_tokens: int = key(512, "Tokens of its answer.", "a whole number from 1", ge=1)

    @model_validator(mode="after")
    def _no_tolerance(self) -> Asked:
        if self.tolerance is not None:
            raise ValueError("`tolerance` is of log-probabilities, which a judge does not give. Leave it out")
        return self


class Judge(Section, extra="allow"):
    """`rewards:` a list of these, each with one of `name`, `python`, `model` and `judge`; a ready-made one with its
    options."""

    name: Text | None = key(
        None,
        "A ready-made one, see docs/rewards.md; other keys are options, as in {name: numeric_answer, column: gold}.",
    )
    python: Text | None = key(None, "A function in a local file, as in rewards.py:brevity; the file is run.")
    model: Text | None = key(None, "A model that classifies sequences, with one label.")
    judge: Text | Asked | None = key(
        None,
        "What compares or rates completions: a served model, or a function (prompt, first, second) in a local file.",
        "a mapping such as {url: …, model: …, by: wins}, or a function as in judges.py:better",
    )
    weight: float = key(1.0, "Weight in the sum of rewards.", "a number")

    @model_validator(mode="after")
    def _one_of_these(self) -> Judge:
        kinds = ("name", "python", "model", "judge")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"it has {', '.join(given) or 'none'} of name, python, model and judge; a reward has one of them"
            )
        if self.further and self.name is None:
            raise ValueError(f"`{next(iter(self.further))}` is an option, which a ready-made reward (`name`) alone has")
        return self


class Reference(Section, section="reference"):
    """`reference:` what the policy is held to. `start`, `base` and `none` are short for `{meaning: …}`.

    `{model: name}` is short for `{meaning: model, model: name}`, and so are `{adapter: name}` and `{remote: {url: …}}`;
    `{store: PATH}` alone keeps the ordinary meaning;
    `method` forces how the reference is computed, as in `{meaning: start, method: snapshot}`.
    """

    meaning: Meaning = key(
        "start",
        "start: the policy before its first update; base: without adapters; model, adapter: another one.",
        MEANINGS,
    )
    model: Text | None = key(None, "The other model (hub name, folder, .gguf file), for the meaning `model`.")
    revision: Text | None = key(None, "Branch, tag or commit of the other model.", REVISION.words)
    dtype: Dtype | None = key(None, "Type of the other model's weights; null: as the policy's.")
    quantization: Literal["4bit", "nf4", "8bit", "int8", "none"] | None = key(
        None,
        "Quantise the other model; none: not; null: as the policy's.",
        "4bit (the same as nf4), 8bit, int8, none or null",
    )
    device: Text | None = key(
        None,
        "Where the other model is; auto: spread over devices; null: where the policy is.",
        "cpu, cuda:1, auto or another device, or null",
    )
    attention: Text | None = key(
        None, "Attention implementation of the other model; null: as the policy's.", _ATTENTION
    )
    trust_remote_code: bool | None = key(
        None, "Run Python code that comes with the other model's repository; null: not."
    )
    sync: Sync | None = key(
        None,
        "Moves the reference during training; null: it stays.",
        "a mapping such as {steps: 512, alpha: 0.6}, or null",
    )
    remote: Remote | None = key(None, "A server that computes the reference.", "a mapping such as {url: …}, or null")

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
        idle = [name for name in self.loading() if self.model is None]
        if idle:
            raise ValueError(f"`{idle[0]}` is of another model, and none is named. Write {{model: name, {idle[0]}: …}}")
        return self

    def loading(self) -> dict[str, Any]:
        """What is said of how the other model is loaded."""
        names = LOADING.keys() & Reference.model_fields.keys() - {"adapter"}
        return {name: value for name in LOADING if name in names and (value := getattr(self, name)) is not None}


class EarlyStopping(Section):
    """`callbacks.early_stopping:` ends a run whose evaluation gets no better, by `train.metric_for_best_model`."""

    patience: int = key(1, "Evaluations in a row without improvement after which the run ends.", "from 1", ge=1)
    threshold: float = key(0.0, "How much better counts as improvement.", "a number from 0", ge=0)


class LossWatchdog(Section):
    """`callbacks.loss_watchdog:` ends a run whose loss is too high."""

    threshold: float = key(..., "Loss above which a logged step counts.", "a number above 0", gt=0)
    patience: int = key(3, "Logged losses in a row above it after which the run ends.", "from 1", ge=1)


class Callbacks(Section):
    """`callbacks:` what may end a run early."""

    early_stopping: EarlyStopping | None = key(None, "Ends a run that gets no better; null: not.")
    loss_watchdog: LossWatchdog | None = key(None, "Ends a run whose loss is too high; null: not.")
