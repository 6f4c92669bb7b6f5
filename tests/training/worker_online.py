"""One process of `test_online_in_processes.py`, started by torchrun: trains, evaluates, resumes, writes the results."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sharding import finish, is_held, settings
from tether.errors import RewardError
from tether.models.structure import trainable_tensors
from tether.reference.methods.shards import gather_shards, local_part, release_gathered
from training.online import PROMPTS, even, policy, steps, trainer

NAMES = (
    "loss",
    "grad_norm",
    "kl",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "completions/mean_length",
    "entropy",
    "entropy/high",
    "entropy_coef",
    "policy_loss",
    "num_tokens",
)
CASES = {
    "grpo": ("grpo", {"beta": 0.1, "num_iterations": 2, "scale_rewards": "batch"}),
    "entropy": (
        "grpo",
        {"entropy_coef": 0.2, "use_adaptive_entropy": True, "entropy_target": 9.0, "top_entropy_quantile": 0.5},
    ),
    "rloo": ("rloo", {"beta": 0.1, "normalize_advantages": True}),
    "lora": ("grpo", {"beta": 0.04, "eval_strategy": "steps", "eval_steps": 1, "log_completions": True}),
    "lora by generate": ("grpo", {"rollout_engine": "transformers"}),
    "lora of pairs": ("online_dpo", {"beta": 0.1}),
}


def made(folder: Path, case: str, size: int, how: str) -> Any:
    """A run of three steps that 2 processes of `size` 4, or one of 8, make."""
    algorithm, arguments = CASES[case]
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if "lora" in case else None
    found = trainer(
        folder / case,
        algorithm,
        # Read from disk: what is made in memory while there is a configuration of ZeRO-3 has other random numbers.
        model=AutoModelForCausalLM.from_pretrained(_start(folder)),
        **arguments,
        **settings(how),
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        max_tokens_per_forward=60,
        eval_dataset=PROMPTS[:4],
        save_strategy="steps",
        save_steps=1,
        use_cpu=True,
        peft_config=lora,
    )
    # With a state, since torch cannot load one without tensors into shards.
    found.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": found.args.learning_rate, "momentum": 0.5})
    return found


def _start(folder: Path) -> Path:
    return folder / f"start{os.environ.get('RANK', 0)}"


def weights(run: Any) -> dict[str, Tensor]:
    """Whole values of all trainable tensors, gathered where they are in shards."""
    release_gathered(run.policy)
    tensors = trainable_tensors(run.policy)
    return {name: gather_shards(local_part(value).clone(), value).contiguous() for name, value in tensors.items()}


def run(folder: Path, case: str, size: int, how: str) -> dict[str, Tensor]:
    """Weights and what was logged, and the same of the run resumed after its first step."""
    first = made(folder, case, size, how)
    first.train()
    assert is_held(first, how), f"the policy is not held as {how} holds it"
    held = weights(first)
    logged = steps(first)
    assert logged[0].get("kl", 0.0) == 0.0, "the policy is its reference at the first step"
    logs = [log[name] for log in logged for name in NAMES if name in log]
    found = first.evaluate()
    logs += [found[f"eval_{name}"] for name in ("loss", "reward", "completions/mean_length")]
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, held[name]), f"{case}: an evaluation changed {name}"
    resumed = made(folder, case, size, how)
    resumed.train(resume_from_checkpoint=str(folder / case / "checkpoint-1"))
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, held[name]), f"{case}: {name} of the resumed run"
    return {**{f"{case} {k}": v for k, v in held.items()}, f"{case} logs": torch.tensor(logs).double()}


def failing(folder: Path, how: str) -> None:
    """A reward that raises in the second process ends both, each with its own message and at once."""
    rank, calls = int(os.environ["RANK"]), []

    def fails(completion_ids: Any, want: Any) -> Any:
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            raise ValueError("of the second alone")
        return even(completion_ids, want)

    CASES["failing"] = ("grpo", {"rewards": fails})
    run = made(folder, "failing", 4, how)
    try:
        run.train()
    except RewardError as error:
        said = str(error)
    assert run.state.global_step == 1
    assert ("of the second alone" if rank else "failed in process 1; its message is there") in said, said


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, how = Path(sys.argv[1]), sys.argv[2]
    size = 8 if how == "whole" else 4
    policy().save_pretrained(_start(folder))
    results = {name: value for case in CASES for name, value in run(folder, case, size, how).items()}
    if how != "whole":
        failing(folder, how)
    save_file(results, folder / f"rank{os.environ.get('RANK', 0)}.safetensors")
    finish()
