"""The section `reference:` of the run file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tether.config.section import Allowed, Count, Flag, Section, Text
from tether.types import Meaning, Means

# How another model is loaded: key of `reference` to keyword of `ref_model_init_kwargs`.
LOADING = {
    "revision": "revision",
    "dtype": "dtype",
    "quantization": "quantization",
    "device": "device_map",
    "attention": "attn_implementation",
    "trust_remote_code": "trust_remote_code",
}


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
    `{store: PATH}` alone keeps the ordinary meaning;
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
    quantization: Annotated[
        Literal["4bit", "nf4", "8bit", "int8", "none"] | None,
        Allowed("4bit (the same as nf4), 8bit, int8, none or null"),
    ] = Field(default=None, description="Quantise the other model; none: not; null: as the policy's.")
    device: Annotated[Text | None, Allowed("cpu, cuda:1, auto or another device, or null")] = Field(
        default=None, description="Where the other model is; auto: spread over devices; null: where the policy is."
    )
    attention: Annotated[Text | None, Allowed("text, such as sdpa or eager, or null")] = Field(
        default=None, description="Attention implementation of the other model; null: as the policy's."
    )
    trust_remote_code: Annotated[Flag | None, Allowed("true, false or null")] = Field(
        default=None, description="Run Python code that comes with the other model's repository; null: not."
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
    store: Annotated[Text | None, Allowed("text: a folder or an fsspec address such as s3://bucket/store; or null")] = (
        Field(default=None, description="Where its log-probabilities are kept, so that each is computed once.")
    )
    store_dtype: Annotated[Literal["float32", "float16"], Allowed("float32 or float16")] = Field(
        default="float32", description="What the store keeps them in."
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
