"""The sections `model:`, `lora:` and `peft:` of the run file: what is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from tether.config.section import Allowed, Count, Flag, Section, Text

# Initialisations that need nothing besides their name; EVA, CorDA and LoftQ need data or a configuration of their own.
_INITIALISATIONS = r"^(gaussian|orthogonal|olora|pissa|pissa_niter_[0-9]+)$"
_Names = Annotated[list[Text], Field(min_length=1)]
# Key of `model` to keyword of `model_init_kwargs`; `add_tokens`, `train` and `freeze` are the configuration's own.
_LOADING = {
    "dtype": "dtype",
    "revision": "revision",
    "quantization": "quantization",
    "device": "device_map",
    "attention": "attn_implementation",
    "tokenizer": "tokenizer",
    "adapter": "adapter",
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
    quantization: Annotated[
        Literal["4bit", "nf4", "8bit", "int8"] | None, Allowed("4bit (the same as nf4), 8bit, int8 or null")
    ] = Field(
        default=None,
        description="Quantise the weights under an adapter: 4bit, 8bit by bitsandbytes, int8 by torchao; null: not.",
    )
    device: Annotated[Text | None, Allowed("cpu, cuda, cuda:1 or another device, auto, or null")] = Field(
        default=None, description="Where the weights are loaded; null: where the run computes."
    )
    attention: Annotated[Text | None, Allowed("text, such as sdpa or eager, or null")] = Field(
        default=None, description="Attention implementation of transformers; null: its default."
    )
    trust_remote_code: Flag = Field(
        default=False, description="Run Python code that comes with the model's repository."
    )
    tokenizer: Annotated[Text | None, Allowed("text: hub name or folder; or null")] = Field(
        default=None, description="Another tokenizer, with the model's ids; null: the model's own."
    )
    adapter: Annotated[Text | None, Allowed("text: the folder of an adapter; or null")] = Field(
        default=None,
        description="An adapter on the model: it trains on, or is frozen beneath the new one of `lora` or `peft`.",
    )
    add_tokens: Annotated[_Names | None, Allowed("a list of tokens, or null")] = Field(
        default=None, description="New tokens for tokenizer and model; each begins as the mean of all others."
    )
    train: Annotated[_Names | None, Allowed("a list of regular expressions, or null")] = Field(
        default=None, description="Only parameters in whose names one is found train, beside an adapter; null: all."
    )
    freeze: Annotated[_Names | None, Allowed("a list of regular expressions, or null")] = Field(
        default=None, description="Parameters in whose names one is found do not train."
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """The same by the names of the trainer's configuration."""
        loading = {keyword: getattr(self, name) for name, keyword in _LOADING.items()}
        return {
            "model_init_kwargs": {
                **{keyword: value for keyword, value in loading.items() if value is not None},
                # Not the configuration's field, which would let the reference's repository run code too.
                **({"trust_remote_code": True} if self.trust_remote_code else {}),
            },
            **{field: getattr(self, name) for field, name in MODEL_FIELDS.items()},
        }


# Fields of the trainer's configuration that are keys of `model`.
MODEL_FIELDS = {
    "add_tokens": "add_tokens",
    "train_parameters": "train",
    "freeze_parameters": "freeze",
}


class Lora(Section):
    """`lora:` a new adapter on the model. Left out: full fine-tuning, or the model's own adapter is continued."""

    r: Count = Field(default=16, description="Rank.")
    alpha: Annotated[float, Field(gt=0), Allowed("a number above 0")] = Field(
        default=32, description="Scale; the update is multiplied by alpha / r."
    )
    target: Annotated[
        Literal["all-linear"] | _Names,
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
    target_parameters: Annotated[_Names | None, Allowed("a list of parameter names, or null")] = Field(
        default=None,
        description="Weights that get an adapter and are no linear layers, such as mlp.experts.gate_up_proj.",
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


class Peft(Section):
    """`peft:` a new adapter of any kind in docs/models.md, by PEFT's own names: any field of its configuration."""

    # The further keys are checked in `tether.config.load`.
    model_config = ConfigDict(extra="allow")

    type: Annotated[
        Literal["lora", "vera", "ia3", "loha", "lokr", "oft", "hra", "layer_norm", "prompt", "prefix"],
        Allowed(", ".join(ADAPTERS)),
    ] = Field(description=f"Name the kind of adapter: {', '.join(ADAPTERS)}.")

    @property
    def further(self) -> dict[str, Any]:
        """The keys that are not named above: fields of PEFT's configuration."""
        return dict(self.model_extra or {})
