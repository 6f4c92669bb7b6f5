"""One run of `vs_trl.py` in a process of its own: train a few steps with one tool, write times, memory and losses."""

from __future__ import annotations

import copy
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import peak_memory_mib
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback


class Clock(TrainerCallback):
    """Wall and processor time at the end of each step; what lies between two ends is a step with all around it."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read both clocks."""
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())


def make_trainer(spec: dict[str, Any], clock: Clock) -> Any:
    """The trainer of either tool, from the same arguments: a script that changes its import line."""
    if spec["tool"] == "tether":
        from tether import DPOConfig, DPOTrainer
    else:
        from trl import DPOConfig, DPOTrainer
    model = spec["model"] if isinstance(spec["model"], str) else _random_model(spec)
    further: dict[str, Any] = {"use_liger_kernel": True} if spec["tool"] == "trl+liger" else {}
    if isinstance(model, str):
        further["model_init_kwargs"] = {"dtype": "float32"}
    arguments = DPOConfig(
        output_dir=str(Path(spec["folder"], "run")),
        bf16=spec["precision"] == "bfloat16",
        use_cpu=spec["device"] == "cpu",
        **further,
        per_device_train_batch_size=spec["pairs"],
        max_steps=spec["warmup"] + spec["steps"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        gradient_checkpointing=spec["gradient_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False} if spec["gradient_checkpointing"] else None,
        max_length=spec["max_length"],
        precompute_ref_log_probs=spec.get("precompute", False),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=spec["seed"],
    )
    adapter = LoraConfig(r=spec["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM")
    # TRL reads its reference from disk under the model's name; a model that is only in memory needs a copy.
    copied = spec["tool"] != "tether" and spec["method"] == "full" and not isinstance(model, str)
    # Both tools draw the adapter's start from this seed, so that they train the same weights.
    torch.manual_seed(spec["seed"])
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model) if copied else None,
        args=arguments,
        train_dataset=Dataset.from_list(spec["rows"]),
        processing_class=None if isinstance(model, str) else word_tokenizer(),
        callbacks=[clock],
        peft_config=adapter if spec["method"] == "lora" else None,
    )
    # Not shuffled: step i is the same rows in every run of either tool.
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    return trainer


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token a word that needs no file, for models with random weights."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    letters = "abcdefghijklmnopqrstuvwxyz"
    for first, second, third in itertools.product(letters, letters, letters[:6]):
        vocabulary.setdefault(f"\u0120{first}{second}{third}", len(vocabulary))
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # The mark stands for the space before a word, as in the byte-level tokenizers that rows are made for.
    words.normalizer = normalizers.Replace(" ", " \u0120")
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _random_model(spec: dict[str, Any]) -> Any:
    """A model from a configuration, with random weights made on its device: speed does not depend on what it knows."""
    torch.manual_seed(spec["seed"])
    dtype = torch.bfloat16 if spec["precision"] == "bfloat16" and spec["method"] == "lora" else torch.float32
    with torch.device(spec["device"]):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec["model"]), dtype=dtype)


def main() -> None:
    """Read the specification, train, write the result."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if spec["threads"] is not None:
        torch.set_num_threads(spec["threads"])
    clock = Clock()
    trainer = make_trainer(spec, clock)
    ready = peak_memory_mib()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    first = spec["warmup"] - 1
    result = {
        "tool": spec["tool"],
        "step_seconds": _differences(clock.wall[first:]),
        "processor_seconds": _differences(clock.processor[first:]),
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if spec["device"] == "cuda" else peak_memory_mib(),
        "peak_mib_before_training": ready,
        "losses": [entry["loss"] for entry in logs],
        "num_tokens": _differences([0, *(entry["num_tokens"] for entry in logs)]),
        "threads": torch.get_num_threads(),
    }
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def _differences(values: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(values)]


if __name__ == "__main__":
    main()
