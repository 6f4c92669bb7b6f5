"""One process of `test_online_in_processes.py`, started by torchrun: trains, evaluates, resumes, writes the results."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from training.online import PROMPTS, steps, trainer, weights

NAMES = (
    "loss",
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
}


def run(folder: Path, case: str, size: int) -> dict[str, torch.Tensor]:
    algorithm, arguments = CASES[case]
    shared = {
        **arguments,
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": size,
        "max_tokens_per_forward": 60,
        "eval_dataset": PROMPTS[:4],
        "save_strategy": "steps",
        "save_steps": 1,
    }
    made = trainer(folder / case, algorithm, **shared)
    made.train()
    logs = [log[name] for log in steps(made) for name in NAMES if name in log]
    found = made.evaluate()
    logs += [found[f"eval_{name}"] for name in ("loss", "reward", "completions/mean_length")]
    resumed = trainer(folder / case, algorithm, **shared)
    resumed.train(resume_from_checkpoint=str(folder / case / "checkpoint-1"))
    for name, tensor in weights(made).items():
        assert torch.equal(tensor, weights(resumed)[name]), f"{case}: {name} of the resumed run"
    return {
        **{f"{case} {k}": v.contiguous() for k, v in weights(made).items()},
        f"{case} logs": torch.tensor(logs).double(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    results = {name: value for case in CASES for name, value in run(folder, case, size).items()}
    save_file(results, folder / f"rank{os.environ.get('RANK', 0)}.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # Everything is on disk; gloo's threads sometimes abort a process that ends in the ordinary way.
        os._exit(0)
