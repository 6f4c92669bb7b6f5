"""A policy-gradient update on groups of completions: one forward and backward, against TRL's GRPO scoring function.

    .venv/bin/python benchmarks/group.py [--groups 8 16] [--steps N] [--repeats N] [--out FILE.json]
    .venv/bin/python benchmarks/group.py --update [--betas 0 0.04] [--model small]     # steps of the two trainers
    .venv/bin/python benchmarks/group.py --whole  [--betas 0 0.04] [--model small]     # sampling included

Both tools score the same sequences with the same weights and LoRA adapter and send back the gradient of the same
weighted sum of token log-probabilities. TRL's function is that of its GRPO trainer,
`_get_per_token_logps_and_entropies` with its fused head: prompts padded on the left, completions on the right, each
prompt once for each completion. The comparison counts only if log-probabilities and gradients agree. `--update` and
`--whole` are in `group_update.py`.
"""

from __future__ import annotations

import argparse
import inspect
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import group_update
import torch
from common import (
    RESULTS,
    cores,
    is_worker,
    markdown,
    new_report,
    peak_memory_mib,
    read_spec,
    run_worker,
    side_by_side,
    write_report,
    write_result,
)
from torch import Tensor
from vs_trl import LORA_R, SEED, TOOLS, model_folder

HEADER = ("completions", "prompt + completion", "tether, s", "trl, s", "speed", "tether MiB", "trl MiB", "memory")
# Log-probabilities per token, and gradients relative to the largest one, that rounding in float32 explains.
LOGP_TOLERANCE = 1e-3
GRADIENT_TOLERANCE = 1e-3


def main() -> int:
    """Measure each group size; 0 if both tools computed the same throughout."""
    options = parse(sys.argv[1:])
    folder = model_folder(options.model)
    if options.update or options.whole:
        return group_update.main(options, folder)
    if not isinstance(folder, str):
        sys.exit("--model small is of --update and --whole.")
    names = ("prompt", "completion", "prompts", "steps", "repeats", "threads", "spread")
    report = new_report({"model": Path(folder).name, **{name: getattr(options, name) for name in names}})
    rows, problems = [], []
    for group in options.groups:
        found = compare(group, folder, options)
        report["results"].append(found)
        problems += found["problems"]
        ours, theirs = (found["medians"][tool] for tool in TOOLS)
        rows.append(
            (
                group,
                f"{options.prompt} + {options.completion}",
                *side_by_side(ours, theirs),
            )
        )
    print("\n" + markdown(HEADER, rows))
    write_report(report, options.out)
    print("\n".join(problems) or "Both tools gave the same log-probabilities and gradients.")
    return 1 if problems else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", type=int, default=[8, 16], help="completions of a prompt (8 16)")
    parser.add_argument("--prompts", type=int, default=1, help="prompts of an update (1)")
    parser.add_argument("--prompt", type=int, default=200, help="mean tokens of a prompt (200)")
    parser.add_argument("--completion", type=int, default=100, help="mean tokens of a completion (100)")
    parser.add_argument("--spread", type=float, default=0.5, help="deviation of the logarithm of lengths (0.5)")
    parser.add_argument("--steps", type=int, default=3, help="timed updates of a run, after one that is not (3)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each tool (2)")
    parser.add_argument("--threads", type=int, default=cores(), help="torch threads (the cores available)")
    parser.add_argument("--update", action="store_true", help="optimizer steps of both trainers, same completions")
    parser.add_argument("--whole", action="store_true", help="the same with their own sampling, of equal lengths")
    parser.add_argument("--betas", nargs="+", type=float, default=[0.0, 0.04], help="of --update and --whole (0 0.04)")
    parser.add_argument("--model", help="`small` (random weights), folder or .gguf file (SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=RESULTS / "group.json", help="JSON file of all raw numbers")
    return parser.parse_args(arguments)


def compare(group: int, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """All runs of one group size, the tools in turns."""
    draw = random.Random(SEED)

    def ids(mean: int) -> list[int]:
        length = max(2, round(mean * draw.lognormvariate(-(options.spread**2) / 2, options.spread)))
        return [draw.randrange(1000, 40000) for _ in range(length)]

    trees = [(ids(options.prompt), [ids(options.completion) for _ in range(group)]) for _ in range(options.prompts)]
    spec = {"trees": trees, "model": folder, "threads": options.threads, "steps": options.steps}
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
    for _ in range(options.repeats):
        for tool in TOOLS:
            runs[tool].append(run_worker(Path(__file__), {**spec, "tool": tool}))
            print(f"{group} completions, {tool}: {median(runs[tool][-1]['seconds']):.2f} s", flush=True)
    medians = {
        tool: {
            "seconds": median(median(run["seconds"]) for run in runs[tool]),
            "processor_seconds": median(median(run["processor_seconds"]) for run in runs[tool]),
            "peak_mib": median(run["peak_mib"] for run in runs[tool]),
        }
        for tool in TOOLS
    }
    return {"group": group, "medians": medians, "problems": check(group, runs), "runs": runs}


def check(group: int, runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Why the comparison does not count; empty if both computed the same."""
    problems = []
    for ours, theirs in zip(*(runs[tool] for tool in TOOLS), strict=True):
        for name, allowed in (("logps", LOGP_TOLERANCE), ("gradient", GRADIENT_TOLERANCE)):
            mine, other = torch.tensor(ours[name]), torch.tensor(theirs[name])
            scale = 1.0 if name == "logps" else other.abs().max().item()
            if mine.shape != other.shape or not (mine - other).abs().max().item() <= allowed * scale:
                problems.append(f"{group} completions: the {name} of the two tools differ")
    return problems


def work() -> None:
    """The worker: some updates with one tool."""
    from peft import LoraConfig, get_peft_model

    from tether.models import load_policy

    spec = read_spec()
    torch.set_num_threads(spec["threads"])
    base = load_policy(spec["model"], dtype="float32")
    if spec["tool"] == "trl":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(base, outputs=("log_probs", "entropy"))
    torch.manual_seed(SEED)
    model: Any = get_peft_model(base, LoraConfig(r=LORA_R, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, where half of the gradient is zero too
            parameter.data.normal_(std=0.01)
    model.train()
    tokens = sum(len(ids) for _, completions in spec["trees"] for ids in completions)
    weights = torch.randn(tokens, generator=torch.Generator().manual_seed(SEED)) / tokens
    token_logps = {"tether": _tether_logps, "trl": _trl_logps}[spec["tool"]]
    seconds, processor, logps = [], [], torch.empty(0)
    for _ in range(spec["steps"] + 1):
        model.zero_grad()
        start, busy = time.perf_counter(), time.process_time()
        logps = token_logps(model, spec["trees"])
        (weights * logps).sum().backward()
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    gradients = [p.grad.norm().item() for p in model.parameters() if p.requires_grad]
    write_result(
        {
            "seconds": seconds[1:],
            "processor_seconds": processor[1:],
            "peak_mib": peak_memory_mib(),
            "logps": logps.tolist(),
            "gradient": gradients,
        }
    )


def _tether_logps(model: Any, trees: list[Any]) -> Tensor:
    """`[N]`, the completions' tokens in order; a group is one tree."""
    from tether.scoring import pack, score
    from tether.types import Example

    batch = pack([Example.of(prompt, completions) for prompt, completions in trees])
    return score(model, batch, outputs=("entropy",)).token_logps


def _trl_logps(model: Any, trees: list[Any]) -> Tensor:
    """`[N]`, from TRL's function, called as its trainer calls it."""
    from trl import GRPOTrainer

    prompts = [prompt for prompt, completions in trees for _ in completions]
    completions = [ids for _, group in trees for ids in group]
    left, right = max(map(len, prompts)), max(map(len, completions))
    ids = torch.zeros(len(prompts), left + right, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        span = slice(left - len(prompt), left + len(completion))
        ids[row, span], mask[row, span] = torch.tensor(prompt + completion), 1
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext))
    score = inspect.unwrap(GRPOTrainer._get_per_token_logps_and_entropies)  # without the timer around it
    logps, _, _ = score(trainer, model, ids, mask, right, compute_entropy=True)
    return logps[mask[:, left:].bool()]


if __name__ == "__main__":
    sys.exit(work() if is_worker() else main())
