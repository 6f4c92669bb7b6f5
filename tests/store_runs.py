"""Short runs of a tiny policy that tests of the store and of released weights share."""

from __future__ import annotations

from datasets import Dataset
from peft import LoraConfig

from tether import DPOConfig, DPOTrainer
from tiny import QUIET, pair_rows, tiny_model, tiny_tokenizer

ROWS = pair_rows(14)
TOKENIZER = tiny_tokenizer()


def policy(seed=0):
    return tiny_model(seed=seed, vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2)


def lora(**changes):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def trainer(folder, model=None, *, rows=ROWS, **arguments):
    settings = {name: arguments.pop(name) for name in list(arguments) if name in DPOConfig.__dataclass_fields__}
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        **QUIET,
        "gradient_checkpointing": False,
    }
    return DPOTrainer(
        model=policy() if model is None else model,
        args=DPOConfig(output_dir=str(folder), **{**defaults, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER,
        **arguments,
    )


def step_logs(run, name="loss"):
    return [log[name] for log in run.state.log_history if "loss" in log]
