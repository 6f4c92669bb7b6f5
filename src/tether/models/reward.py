"""Load a model that gives a whole text one number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from tether.errors import ConfigError
from tether.models.load import _LOADING_ERRORS, _dtype, _loading_error, _local, is_adapter, loading

HEAD = "score"


def load_reward_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    **model_kwargs: Any,
) -> PreTrainedModel:
    """Load a sequence classifier with one output, in evaluation mode, to be trained as a reward model.

    Args:
        source: as for `load_policy`: a causal language model, whose head is exchanged for a random one (seed torch
            before, to have the same again), or a reward model.
        dtype: see `load_policy`, as for the other arguments.

    Returns:
        The model; its head is `score`.

    Raises:
        ConfigError: the source is missing, incomplete or an adapter, or the architecture has no such form.
    """
    folder = str(source) if is_classifier(source) else _local(source, revision)
    if is_adapter(folder):
        raise ConfigError(
            f"The model '{source}' is an adapter, and a reward model starts from whole weights. Merge it into its base "
            "with merge_and_unload() and give that folder, or pass the model in memory."
        )
    if attn_implementation is not None:
        model_kwargs["attn_implementation"] = attn_implementation
    try:
        with loading(source):
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=_dtype(dtype),
                num_labels=1,
                use_safetensors=True,
                output_loading_info=True,
                revision=revision,
                trust_remote_code=trust_remote_code,
                **model_kwargs,
            )
    except _LOADING_ERRORS as error:
        raise _loading_error("model", str(source), error) from error
    model, report = loaded
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(f"{HEAD}."))
    if missing or not hasattr(model, HEAD):
        what = f"lacks {len(missing)} tensors ({', '.join(missing[:3])})" if missing else f"has no head {HEAD!r}"
        raise ConfigError(
            f"The model '{source}' {what} as a sequence classifier. Give a complete decoder model, such as a causal "
            "language model."
        )
    return model


def is_classifier(source: str | Path) -> bool:
    """Whether a folder is that of a model that classifies sequences."""
    config = Path(source).expanduser() / "config.json"
    if not config.is_file():
        return False
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)
