"""Situations that people report, in TRL and in Tether: what comes out, as a number. The source of docs/comparison.md.

    .venv/bin/python benchmarks/situations.py [--only NAME ...]

Tiny random models on a CPU, both tools in this process, the same rows and settings. Each situation gives a line of each
tool; an error is given with the number of steps that were made before it.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import table
from datasets import Dataset, disable_progress_bars
from gpu import configuration
from lengths import Profile, make_rows
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from transformers.utils import logging as transformers_logging
from vs_trl_worker import word_tokenizer

TOKENIZER = word_tokenizer()
ROWS = make_rows(TOKENIZER, Profile(8, 5, 4), 4)
STEPS = 4
SITUATIONS: dict[str, Callable[[Any, Path], str]] = {}
# It writes no tool call, as those of Llama 3 and Gemma do not.
PLAIN_TEMPLATE = "{% for m in messages %}<s>{{ m.role }} {{ m.content or '' }}</s>{% endfor %}"


class Tool:
    """A tool's trainer and configuration."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module = __import__(name)

    def train(self, folder: Path, model: Any, *, rows: Any = ROWS, callbacks: Any = (), **changes: Any) -> Any:
        """A trainer that has trained."""
        trainer = self.make(folder, model, rows=rows, callbacks=callbacks, **changes)
        trainer.train()
        return trainer

    def make(self, folder: Path, model: Any, *, rows: Any = ROWS, callbacks: Any = (), **changes: Any) -> Any:
        """A trainer."""
        adapter = changes.pop("peft_config", None)
        evaluated = changes.pop("eval_dataset", None)
        settings = {
            "output_dir": str(folder / self.name),
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        # TRL reads its reference from disk under the model's name; one that is only in memory needs a copy.
        whole = self.name == "trl" and adapter is None and not isinstance(model, (str, PeftModel))
        return self.module.DPOTrainer(
            model=model,
            ref_model=copy.deepcopy(model) if whole else None,
            args=self.module.DPOConfig(**{**settings, **changes}),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=evaluated and Dataset.from_list(evaluated),
            processing_class=TOKENIZER,
            peft_config=adapter,
            callbacks=list(callbacks),
        )


def situation(work: Callable[[Any, Path], str]) -> Callable[[Any, Path], str]:
    """Register one by its name."""
    SITUATIONS[work.__name__] = work
    return work


def base() -> Any:
    """A tiny Llama whose weights are far from their start, so that a lost tensor shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**configuration("tiny")))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def lora(**changes: Any) -> LoraConfig:
    """An adapter on all linear layers."""
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


@torch.no_grad()
def nats(model: Any) -> float:
    """Log-probability of a text by a plain forward."""
    ids = TOKENIZER(ROWS[0]["prompt"] + ROWS[0]["chosen"], return_tensors="pt")["input_ids"]
    model.eval()
    logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None]).sum().item()


def reloaded(folder: Path) -> float:
    """Log-probability by the base with the adapter of a folder, as plain PEFT loads it, after other random numbers."""
    torch.manual_seed(77)
    return nats(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "final"))


def saved_base(folder: Path) -> str:
    """The base on disk."""
    base().save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    return str(folder / "base")


@situation
def norms_beside_an_adapter(tool: Tool, folder: Path) -> str:
    """Norms train beside LoRA; the folder that is saved, loaded by plain PEFT."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved_base(folder)), lora())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    trainer = tool.train(folder, model)
    trainer.save_model(str(folder / "final"))
    return f"reloaded {abs(reloaded(folder) - nats(trainer.model)):.4f} nats from memory"


@situation
def pissa_by_random_svd(tool: Tool, folder: Path) -> str:
    """`pissa_niter_4`; the folder that is saved, loaded by plain PEFT."""
    trainer = tool.train(folder, saved_base(folder), peft_config=lora(init_lora_weights="pissa_niter_4"))
    trainer.save_model(str(folder / "final"))
    return f"reloaded {abs(reloaded(folder) - nats(trainer.model)):.4f} nats from memory"


class _Break(TrainerCallback):
    """Makes a weight NaN after the third step, as a bad batch does."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """See the class."""
        if state.global_step == STEPS - 1:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))


@situation
def weights_become_nan(tool: Tool, folder: Path) -> str:
    """A weight becomes NaN between two logs."""
    trainer = tool.train(folder, base(), callbacks=[_Break()], logging_strategy="no")
    trainer.save_model(str(folder / "final"))
    saved = AutoModelForCausalLM.from_pretrained(folder / "final")
    return f"finished and saved {sum(int(p.isnan().sum()) for p in saved.parameters())} NaN"


@situation
def cache_of_the_saved_model(tool: Tool, folder: Path) -> str:
    """`use_cache` of the saved configuration after full training with gradient checkpointing; it was True."""
    trainer = tool.train(folder, base(), gradient_checkpointing=True)
    trainer.save_model(str(folder / "final"))
    return f"use_cache={AutoConfig.from_pretrained(folder / 'final').use_cache} is saved"


@situation
def metric_that_no_evaluation_gives(tool: Tool, folder: Path) -> str:
    """`metric_for_best_model` with a slip."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    more = {"load_best_model_at_end": True, "metric_for_best_model": "eval_los", "eval_dataset": ROWS[:4]}
    tool.train(folder, base(), **options, **more)
    return "trained to the end"


@situation
def second_adapter_over_transformers_first(tool: Tool, folder: Path) -> str:
    """A model that transformers loaded from an adapter's folder, and a new `peft_config`: what is trained from."""
    first = get_peft_model(AutoModelForCausalLM.from_pretrained(saved_base(folder)), lora())
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    first.save_pretrained(str(folder / "sft"))
    model = AutoModelForCausalLM.from_pretrained(folder / "sft")
    before = nats(model)
    trainer = tool.make(folder, model, peft_config=lora())
    return f"starts {abs(nats(trainer.model) - before):.4f} nats from the model that was given"


@situation
def tool_call_that_a_template_does_not_write(tool: Tool, folder: Path) -> str:
    """The chosen answer is a tool call, and the chat template writes none: tokens of the chosen completion."""
    call = {"type": "function", "function": {"name": "find", "arguments": {"city": "Rome"}}}
    answers = ({"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "assistant", "content": "abc abd"})
    asked = [{"role": "user", "content": "abe"}]
    row = {"prompt": asked, "chosen": [answers[0]], "rejected": [answers[1]]}
    TOKENIZER.chat_template = PLAIN_TEMPLATE
    try:
        trainer = tool.make(folder, base(), rows=[row] * 4)
        ids = trainer.train_dataset[0].get("chosen_ids", trainer.train_dataset[0].get("chosen_input_ids"))
        return f"trains on a chosen completion of {len(ids)} tokens against one of the rejected text"
    finally:
        TOKENIZER.chat_template = None


def outcome(tool: Tool, work: Callable[[Any, Path], str]) -> str:
    """What a situation gave, or its error with the steps that were made."""
    made: list[int] = []
    original = tool.module.DPOTrainer.training_step

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        made.append(1)
        return original(self, *arguments, **keywords)

    tool.module.DPOTrainer.training_step = counted
    try:
        with tempfile.TemporaryDirectory(prefix="tether-situation-") as folder:
            return work(tool, Path(folder))
    except Exception as error:  # what a user would see is the result
        return f"after {len(made)} steps: {type(error).__name__}: {' '.join(str(error).split())[:110]}"
    finally:
        tool.module.DPOTrainer.training_step = original


def main() -> int:
    """Try them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SITUATIONS, default=list(SITUATIONS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("tether").setLevel(logging.CRITICAL)
    rows = []
    for name in options.only:
        for tool in (Tool("trl"), Tool("tether")):
            rows.append((name, tool.name, outcome(tool, SITUATIONS[name])))
            print(*rows[-1], sep=" | ", flush=True)
    print(table(("situation", "tool", "what comes out"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
