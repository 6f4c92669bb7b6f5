"""What the tests of sampled completions share: a tiny policy, prompts, a reward, short runs."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from tether import GRPOConfig, GRPOTrainer, OnlineDPOConfig, OnlineDPOTrainer, RLOOConfig, RLOOTrainer
from tiny import QUIET, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SIZES = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PROMPTS = [{"prompt": "the film" + " was" * (i % 3), "want": i % 2} for i in range(8)]
CLASSES = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
PAIRS = {"online_dpo": (OnlineDPOTrainer, OnlineDPOConfig)}
SETTINGS: dict[str, Any] = {
    **QUIET,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 10,
    "max_steps": 3,
    "optim": "sgd",
    "learning_rate": 0.2,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "bf16": False,
    "cpu_matmul": "default",
    "dataset_cache": None,
    "seed": 3,
}


def even(completion_ids, want, **_):
    """The share of even token ids, or of odd ones where that is wanted."""
    return [sum(i % 2 == w for i in ids) / len(ids) for ids, w in zip(completion_ids, want, strict=True)]


def policy(seed: int = 0, **changes: Any) -> Any:
    return tiny_model(seed=seed, **{**SIZES, **changes})


def trainer(folder: Any, algorithm: str = "grpo", *, rewards: Any = even, **arguments: Any) -> Any:
    """A trainer; settings are told from its arguments by their names."""
    made, config = {**CLASSES, **PAIRS}[algorithm]
    fields = config.__dataclass_fields__
    settings = {**SETTINGS, **{name: arguments.pop(name) for name in list(arguments) if name in fields}}
    rows = arguments.pop("train_dataset", PROMPTS)
    return made(
        model=arguments.pop("model", None) or policy(),
        reward_funcs=rewards,
        args=config(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=arguments.pop("tokenizer", TOKENIZER),
        **arguments,
    )


def steps(trainer: Any) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def weights(trainer: Any) -> dict[str, Any]:
    return {name: one.detach().clone() for name, one in trainer.policy.named_parameters() if one.requires_grad}
