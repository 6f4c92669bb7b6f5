"""Load a policy and its tokenizer from a hub name, a folder, an adapter's folder or a GGUF file."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from tether.compat.transformers import without_bars
from tether.errors import ConfigError, TetherError
from tether.models.adapters import continue_adapter
from tether.models.adapting.adapter_files import adapter_config, require_weights
from tether.models.gguf import check_gguf, convert_gguf
from tether.progress import working

logger = logging.getLogger("tether")
ALLOWED = (
    "a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct, a folder with config.json and safetensors, "
    "a folder with a PEFT adapter, or a .gguf file"
)
DTYPES = ("auto", "float32", "bfloat16", "float16")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json", ".yaml", ".yml")
_PICKLES = ("*.bin", "*.pt", "*.pth")
_LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, SafetensorError)
# Files of others hold anything, at which the code of a model fails in any way; these say by themselves what is wrong.
_PASSED_ON = (TetherError, MemoryError, RecursionError)
# Names of numbers of modules, and the most that such a number may be; the largest models have some hundreds of each.
_COUNTS, _MOST_MODULES = re.compile(r"(^|_)(layers?|blocks?|experts?|depths?|stages?)(_|$)"), 100_000
# What transformers says of tensors whose shapes are not those of the configuration.
_OTHER_SHAPES = "ignore_mismatched_sizes"
_LFS = b"version https://git-lfs"


def check_source(source: str | Path, *, classifies: bool = False) -> None:
    """Find what is wrong with the name of a model without loading anything: takes milliseconds, needs no network.

    Args:
        source: hub name, folder, or `.gguf` file.
        classifies: whether it is to classify sequences, and not to be a policy.

    Raises:
        ConfigError: nothing is there, or what is there is no model that can be loaded safely. A hub name is only
            checked for its form.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        _check_folder(path, classifies)
    elif path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(
                f"The model '{source}' is a single file that is not GGUF. Allowed: {ALLOWED}. "
                f"Give the folder that holds it: '{path.parent}'."
            )
        check_gguf(path)
    elif not _may_be_hub_name(source):
        near = difflib.get_close_matches(path.name, _names_in(path.parent), n=1)
        hint = f" Did you mean '{path.parent / near[0]}'?" if near else ""
        raise ConfigError(
            f"The model '{source}' does not exist.{hint} Allowed: {ALLOWED}. Check the path; a relative one is "
            f"looked for in '{Path.cwd()}'."
        )


# Keywords of `from_pretrained` that cut a model over processes while it is read.
_CUTTING = ("tp_plan", "tp_size", "device_mesh", "distributed_config")


def refuse_cutting(options: Mapping[str, Any]) -> None:
    """Refuse keywords by which transformers would cut a model over processes, before anything is read.

    Raises:
        ConfigError: which one, and what to do.
    """
    for name in _CUTTING:
        if options.get(name) is not None:
            raise ConfigError(
                f"{name} is {options[name]!r}, with which transformers cuts weights over processes as it reads them "
                "(tensor, pipeline or expert parallelism); these processes must compute the same rows, and here each "
                "has its own. Leave it out; FSDP and DeepSpeed's ZeRO cut weights when training begins."
            )


def load_policy(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    **model_kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """Load a language model to be trained, in evaluation mode, on the CPU unless `device_map` says otherwise.

    Its configuration decides the class: with an encoder and a decoder (T5, BART), with a vision tower, or causal.

    Args:
        source: hub name, folder, folder of a PEFT adapter (its base is loaded under it, the adapter is trainable),
            or `.gguf` file (converted once, see `convert_gguf`).
        dtype: dtype of the weights. `auto` is float32 on a machine without an accelerator, where training in a
            shorter type loses small updates, and the checkpoint's own dtype on one that has it.
        revision: branch, tag or commit; only for a hub name.
        trust_remote_code: run Python code that the model's repository brings.
        attn_implementation: attention of transformers; its default if None.
        **model_kwargs: passed to `from_pretrained`, for example `quantization_config` or `device_map`.

    Returns:
        The model; a `PeftModel` if `source` is an adapter.

    Raises:
        ConfigError: the source is missing, incomplete, not a causal language model, or holds only pickles.
    """
    refuse_cutting(model_kwargs)
    chosen, folder = _dtype(dtype), _local(source, revision)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if is_adapter(folder):
        return _load_adapter(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, attn=attn_implementation, **model_kwargs
        )
    try:
        if not trust_remote_code:
            _refuse_named_kernels(source, PreTrainedConfig.get_config_dict(folder, revision=revision)[0])
        config = _configuration(folder, **options)
        _check_head(source, config.architectures)
        if attn_implementation is not None:
            model_kwargs["attn_implementation"] = attn_implementation
        with loading(source):
            loaded: Any = _auto_class(config).from_pretrained(
                folder,
                dtype=chosen,
                use_safetensors=True,  # never unpickle: a pickle runs the code it brings
                output_loading_info=True,
                **options,
                **model_kwargs,
            )
    except _PASSED_ON:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and _OTHER_SHAPES not in str(error):
            raise  # such as memory that is full
        raise _loading_error("model", source, error) from error
    _check_complete(source, loaded[1]["missing_keys"])
    return loaded[0]


def _refuse_named_kernels(source: str | Path, values: dict[str, Any]) -> None:
    """A model's configuration may name a repository of kernels, which transformers would fetch and run.

    Raises:
        ConfigError: it does.
    """
    for name, value in values.items():
        if isinstance(value, dict):
            _refuse_named_kernels(source, value)
        elif name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise ConfigError(
                f"The configuration of '{source}' names kernels of a repository (`{name}`: {value!r}), code that would "
                "be fetched and run. Take the line out, or, if you trust it, set trust_remote_code (in a run file "
                "`model.trust_remote_code: true`)."
            )


@contextmanager
def loading(source: str | Path) -> Iterator[None]:
    """Inside, a model's weights are downloaded where they are not here, and read."""
    with working(f"loading the weights of {Path(source).name}"), without_bars():
        yield


def load_config(source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, without its weights; of an adapter's folder, that of its base model.

    Args:
        source: what `load_policy` takes.
        revision: branch, tag or commit; only for a hub name.
        trust_remote_code: run Python code that the model's repository brings.

    Raises:
        ConfigError: there is none that can be read.
    """
    path = Path(source).expanduser()
    # A reward model has a configuration too, though no policy's head.
    folder = str(path) if (path / "config.json").is_file() and revision is None else _local(source, revision)
    if is_adapter(folder):
        base = _base_of_adapter(Path(folder))
        name = cast(str, base.base_model_name_or_path)
        return load_config(name, revision=base.revision, trust_remote_code=trust_remote_code)
    try:
        return _configuration(folder, revision=revision, trust_remote_code=trust_remote_code)
    except _PASSED_ON:
        raise
    except Exception as error:
        raise _loading_error("configuration", source, error) from error


def _configuration(folder: str, **options: Any) -> Any:
    config = AutoConfig.from_pretrained(folder, **options)
    _refuse_endless(config.to_dict())
    return config


def _refuse_endless(values: Mapping[str, Any]) -> None:
    """A model is built of its modules one by one, which for a number from a file that is wrong would never end."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            _refuse_endless(value)
        elif isinstance(value, int) and value > _MOST_MODULES and _COUNTS.search(name):
            raise ConfigError(
                f"The model's configuration has {name} {value:,}; allowed is at most {_MOST_MODULES:,}. Correct its "
                "config.json."
            )


def _auto_class(config: PreTrainedConfig) -> Any:
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    sees = getattr(config, "vision_config", None) is not None and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, **tokenizer_kwargs: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    A tokenizer without a padding token gets its end token for it. That is only what generation fills a batch with:
    padding is told apart by the attention mask, never by its id, as the end token is also part of every completion.

    Args:
        source: what `load_policy` takes. An adapter's folder without a tokenizer leads to its base model's.
        revision: branch, tag or commit; only for a hub name.
        trust_remote_code: run Python code that the tokenizer's repository brings.
        **tokenizer_kwargs: passed to `from_pretrained`.

    Returns:
        The tokenizer, always with a padding token.

    Raises:
        ConfigError: there is no tokenizer, or it has neither a padding nor an end token.
    """
    place = Path(source).expanduser()
    # A folder may hold a tokenizer alone, or beside a model that is no policy.
    alone = revision is None and (place / "tokenizer.json").is_file()
    folder = str(place) if alone else _local(source, revision)
    if is_adapter(folder) and not any(Path(folder).glob("tokenizer*")):
        base = _base_of_adapter(Path(folder))
        return load_tokenizer(
            cast(str, base.base_model_name_or_path),
            revision=base.revision,
            trust_remote_code=trust_remote_code,
            **tokenizer_kwargs,
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, revision=revision, trust_remote_code=trust_remote_code, **tokenizer_kwargs
        )
    except _PASSED_ON:
        raise
    except Exception as error:
        raise _loading_error("tokenizer", source, error) from error
    ensure_pad_token(tokenizer)
    return tokenizer


def load_processing(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, **processor_kwargs: Any
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """Load what turns rows into a model's inputs: its processor if it sees images, else its tokenizer.

    Args:
        source: what `load_policy` takes.
        revision: branch, tag or commit; only for a hub name.
        trust_remote_code: run Python code that comes with it.
        **processor_kwargs: for the processor, which then must be there.

    Returns:
        The processor, its tokenizer with a padding token; or the tokenizer, where the model sees no images or its
        processor needs a library that is not installed (rows with images are then refused).

    Raises:
        ConfigError: see `load_tokenizer`.
    """
    why = "the model sees no images"
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if getattr(load_config(source, **options), "vision_config", None) is not None:
        folder = _local(source, revision)
        name = cast(str, _base_of_adapter(Path(folder)).base_model_name_or_path) if is_adapter(folder) else folder
        try:
            processor: Any = AutoProcessor.from_pretrained(name, **options, **processor_kwargs)
        except _LOADING_ERRORS as error:
            why = f"its processor cannot be loaded ({error})"
            logger.warning(f"The processor of '{source}' cannot be loaded ({error}), so images cannot be read.")
        else:
            if isinstance(processor, ProcessorMixin):
                ensure_pad_token(processor.tokenizer)  # type: ignore[attr-defined]
                return processor
    if processor_kwargs:
        raise ConfigError(f"Keywords of a processor were given for '{source}': {why}. Leave them out (`processor`).")
    return load_tokenizer(source, **options)


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a padding token its end token for it, see `load_tokenizer`.

    Args:
        tokenizer: changed in place.

    Raises:
        ConfigError: it has neither.
    """
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"The tokenizer '{tokenizer.name_or_path}' has neither a padding nor an end token. Generation needs one "
            "of them, and an end token closes every completion. Set tokenizer.eos_token, or add 'eos_token' to its "
            "tokenizer_config.json."
        )
    tokenizer.pad_token = tokenizer.eos_token


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype.removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype is '{dtype}'. Allowed: {', '.join(DTYPES)}. Use one of these names.")
    if name == "auto":
        return "auto" if torch.accelerator.is_available() else torch.float32
    return getattr(torch, name)


def _local(source: str | Path, revision: str | None) -> str:
    """Where `from_pretrained` finds the source: a hub name as it is, a folder, or a GGUF file's conversion."""
    check_source(source)
    path = Path(source).expanduser()
    if not path.exists():
        return str(source)
    if revision not in (None, "main"):  # which every script of TRL passes
        raise ConfigError(
            f"revision is '{revision}', but the model '{source}' is on disk, where there is only one. A revision "
            "goes with a hub name: leave it out, or name the model on the hub."
        )
    return str(convert_gguf(path) if path.is_file() else path)


def _may_be_hub_name(source: str | Path) -> bool:
    return (
        isinstance(source, str)
        and _HUB_NAME.fullmatch(source) is not None
        and not source.lower().endswith(_FILE_ENDINGS)
    )


def _names_in(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _check_folder(path: Path, classifies: bool) -> None:
    if (path / "adapter_config.json").is_file():
        require_weights(path)
        return
    config = path / "config.json"
    if not config.is_file():
        found = ", ".join(sorted(_names_in(path))[:5]) or "nothing"
        raise ConfigError(
            f"The model folder '{path}' has no config.json (it holds {found}). Allowed: {ALLOWED}. "
            "Give the folder that save_pretrained wrote, or one of its checkpoints."
        )
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes and numbers that are none
        raise ConfigError(f"'{config}' is not JSON ({error}). Copy the model's config.json again.") from error
    if not classifies:
        _check_head(path, values.get("architectures") if isinstance(values, dict) else None)
    weights = sorted(path.glob("*.safetensors"))
    for file in weights:
        with file.open("rb") as opened:
            if opened.read(len(_LFS)) == _LFS:
                raise ConfigError(
                    f"'{file}' is a pointer of Git LFS and not the weights. Get them there with `git lfs pull`."
                )
    if weights:
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    raise ConfigError(
        f"The model folder '{path}' holds no safetensors"
        + (
            f", only pickles ({', '.join(pickles[:3])}), and a pickle can run any code when it is read. "
            if pickles
            else ". "
        )
        + "Weights are read from safetensors only. In a place where you trust the files, load the model and write it "
        "again with model.save_pretrained(folder)."
    )


def _check_head(source: str | Path, architectures: Any) -> None:
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    if architectures and not names:
        raise ConfigError(f"The configuration in '{source}' cannot be loaded: `architectures` is {architectures!r}.")
    for name in names:
        if re.search(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMaskedLM|RewardModel", name):
            raise ConfigError(
                f"The model '{source}' is a {name}: it has no head that predicts the next token, and a policy needs "
                "one. Allowed are causal language models (…ForCausalLM). Give the model it was made from."
            )


def _check_complete(source: str | Path, missing: set[str] | list[str]) -> None:
    if missing:
        names = sorted(missing)
        raise ConfigError(
            f"The model '{source}' lacks {len(names)} tensors that its config.json asks for ({', '.join(names[:3])}). "
            "They would start from random values, so nothing is trained. Complete the checkpoint, or give a causal "
            "language model with its head."
        )


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder is that of a PEFT adapter."""
    return (Path(folder).expanduser() / "adapter_config.json").is_file()


def _base_of_adapter(folder: Path) -> PeftConfig:
    config = adapter_config(folder)
    if not config.base_model_name_or_path:
        raise ConfigError(
            f"The adapter '{folder}' does not say which model it belongs to. Fill 'base_model_name_or_path' in its "
            "adapter_config.json."
        )
    return config


def _load_adapter(
    folder: str, *, dtype: str | torch.dtype, trust_remote_code: bool, attn: str | None, **model_kwargs: Any
) -> PeftModel:
    config = _base_of_adapter(Path(folder))
    base = load_policy(
        cast(str, config.base_model_name_or_path),
        dtype=dtype,
        revision=config.revision,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn,
        **model_kwargs,
    )
    return continue_adapter(cast(PreTrainedModel, base), folder)


def _loading_error(kind: str, source: str | Path, error: Exception) -> ConfigError:
    reason = str(error).strip().split("\n")[0]
    if not isinstance(error, _LOADING_ERRORS):
        reason = f"{type(error).__name__}: {reason}"
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"The {kind} of '{source}' brings Python code of its own, which is not run unless that is asked for. Read "
            "it, and if you trust it, set trust_remote_code (in a run file `model.trust_remote_code: true`)."
        )
    if _OTHER_SHAPES in str(error):
        reason = "tensors in its files have other shapes than its config.json says (they are listed above)."
    if Path(source).expanduser().exists():
        return ConfigError(f"The {kind} in '{source}' cannot be loaded: {reason} Allowed: {ALLOWED}.")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    advice = (
        "HF_HUB_OFFLINE is set, so only models downloaded before are found: unset it, or give a folder."
        if offline
        else "Check the spelling and the network; without a network, give a folder, and set HF_HUB_OFFLINE=1 to use "
        "models downloaded before."
    )
    return ConfigError(
        f"The {kind} '{source}' is not a folder or file in '{Path.cwd()}', and from the hub it cannot be loaded: "
        f"{reason} Allowed: {ALLOWED}. {advice}"
    )
