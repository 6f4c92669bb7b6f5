"""One process of the runs with a server in `test_online_in_processes.py`: trains, sends, writes what was sent."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from sharding import finish, is_held, settings
from training.online import policy, steps, trainer
from training.worker_online import weights


def run(folder: Path, kind: str, url: str, how: str) -> dict[str, Any]:
    """Three steps; then the weights that they end in are sent, and read from the shards on another way."""
    own = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
    made = trainer(
        folder / kind,
        model=policy(),
        rollout_engine="vllm",
        vllm_server_base_url=url,
        per_device_train_batch_size=8 if how == "whole" else 4,
        max_completion_length=6,
        use_cpu=True,
        **settings(how),
        **(own if kind == "adapter" else {}),
    )
    made.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": made.args.learning_rate, "momentum": 0.5})
    made.train()
    assert is_held(made, how), f"the policy is not held as {how} holds it"
    logs = steps(made)
    assert all(log["sync/logp_difference"] < 1e-4 for log in logs)
    assert all(log["sampling/sampling_logp_difference/max"] < 1e-4 for log in logs)
    served = made.run.algorithm.made.served
    assert served.engine.version == 2, "what two steps made is what the third sampled with"
    served.bring()
    assert is_held(made, how), "and shards are shards again"
    return weights(made)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, how = Path(sys.argv[1]), sys.argv[2]
    found = {
        f"{kind} {name}": value
        for kind, url in zip(("adapter", "merged"), sys.argv[3:], strict=True)
        for name, value in run(folder, kind, url, how).items()
    }
    save_file(found, folder / f"rank{os.environ.get('RANK', 0)}.safetensors")
    finish()
