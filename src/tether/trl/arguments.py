"""Arguments of TRL's scripts, with its names and defaults (1.16), and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import datasets
from peft import LoraConfig, PeftConfig
from transformers import BitsAndBytesConfig

from tether.data.sources.slices import shares_of
from tether.errors import ConfigError


@dataclass
class ScriptArguments:
    """Which data a script trains on."""

    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    dataset_streaming: bool = False
    ignore_bias_buffers: bool = False


@dataclass
class DatasetConfig:
    """One set of a mixture; the fields are `datasets.load_dataset`'s, and the columns and the share that are kept."""

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None


@dataclass
class DatasetMixtureConfig:
    """Several sets as one."""

    datasets: list[DatasetConfig] = field(default_factory=list)
    streaming: bool = False
    test_split_size: float | None = None

    def __post_init__(self) -> None:
        self.datasets = [one if isinstance(one, DatasetConfig) else DatasetConfig(**one) for one in self.datasets]


@dataclass
class ModelConfig:
    """How a script loads its model, and the adapter it puts on it."""

    model_name_or_path: str | None = None
    model_revision: str = "main"
    dtype: str | None = field(default="float32", metadata={"choices": ["auto", "bfloat16", "float16", "float32"]})
    attn_implementation: str | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_target_modules: list[str] | None = None
    lora_target_parameters: list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    lora_task_type: str = "CAUSAL_LM"
    use_rslora: bool = False
    use_dora: bool = False
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"choices": ["fp4", "nf4"]})
    use_bnb_nested_quant: bool = False
    bnb_4bit_quant_storage: str | None = None

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError("is True, and load_in_4bit too. Leave one of them out.", "load_in_8bit")
        targets = self.lora_target_modules
        if isinstance(targets, list) and len(targets) == 1:  # such as all-linear, which is no name of a module
            self.lora_target_modules = targets[0]  # type: ignore[assignment]


def get_peft_config(model_args: ModelConfig) -> PeftConfig | None:
    """The adapter that the arguments describe; None without `use_peft`."""
    if not model_args.use_peft:
        return None
    return LoraConfig(
        task_type=model_args.lora_task_type,  # type: ignore[arg-type]
        r=model_args.lora_r,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        modules_to_save=model_args.lora_modules_to_save,
    )


def get_quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """The quantisation that the arguments describe; None for none."""
    if model_args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not model_args.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=model_args.dtype,  # type: ignore[arg-type]
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,  # type: ignore[arg-type]
    )


def get_dataset(mixture_config: DatasetMixtureConfig) -> datasets.DatasetDict:
    """The sets of a mixture as one, under `train`, and `test` where a share for it was asked for.

    Shares are of the mixture: the first rows of each set are kept, as many as fit the shares without a row twice.

    Raises:
        ConfigError: no set, or shares for some of them only.
    """
    sets = mixture_config.datasets
    if not sets:
        raise ConfigError("is empty; name at least one set.", "datasets")
    found: list[Any] = []
    for one in sets:
        options = {"name": one.name, "data_dir": one.data_dir, "data_files": one.data_files, "split": one.split}
        rows = datasets.load_dataset(one.path, streaming=mixture_config.streaming, **options)
        found.append(rows if one.columns is None else rows.select_columns(one.columns))
    shares = [one.fraction for one in sets]
    if any(share is not None for share in shares):
        given = [share for share in shares if share is not None]
        if len(given) != len(sets) or mixture_config.streaming:
            raise ConfigError(
                "has a fraction for some sets only, or for streams. Give it for all, unstreamed.", "datasets"
            )
        counts = shares_of(list(map(len, found)), given)
        found = [rows.select(range(count)) for rows, count in zip(found, counts, strict=True)]
    whole: Any = datasets.concatenate_datasets(found)
    if mixture_config.test_split_size is not None:
        return whole.train_test_split(test_size=mixture_config.test_split_size)
    return datasets.DatasetDict({"train": whole})
