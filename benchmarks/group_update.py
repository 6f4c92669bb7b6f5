"""Optimizer steps of GRPO by the trainers of both tools: `group.py --update` and `group.py --whole`.

`--update`: both are given the same completions by a `rollout_func`, so that a step is the scoring (of the reference too
where beta is above 0), the backward and the optimizer; it counts only if losses and gradient norms of all steps agree.
`--whole`: each samples completions as it does by itself, all of one length, and is given the same reward.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from common import (
    markdown,
    new_report,
    peak_memory_mib,
    read_spec,
    run_worker,
    side_by_side,
    write_report,
    write_result,
)

TOOLS = ("tether", "trl")
HEADER = (
    *("what", "beta", "prompts x completions", "prompt + completion"),
    *("tether, s", "trl, s", "speed", "tether MiB", "trl MiB", "memory"),
)
SEED, LORA_R = 0, 16
# Losses of the two tools for the same completions, and gradient norms relative to each other.
TOLERANCE = {"losses": 1e-3, "grad_norms": 1e-2}


def main(options: Any, folder: Any) -> int:
    """Measure with and without a reference; 0 if both tools computed the same."""
    names = ("prompt", "completion", "prompts", "steps", "repeats", "threads", "spread", "betas")
    what = "whole step" if options.whole else "update"
    report = new_report({"what": what, "model": str(folder), **{name: getattr(options, name) for name in names}})
    rows, problems = [], []
    for group in options.groups:
        for beta in options.betas:
            found = compare(group, beta, folder, options)
            report["results"].append(found)
            problems += found["problems"]
            ours, theirs = (found["medians"][tool] for tool in TOOLS)
            rows.append(
                (
                    what,
                    f"{beta:g}",
                    f"{options.prompts} x {group}",
                    f"{options.prompt} + {options.completion}",
                    *side_by_side(ours, theirs),
                )
            )
    print("\n" + markdown(HEADER, rows))
    write_report(report, options.out)
    print("\n".join(problems) or "Both tools did the same work.")
    return 1 if problems else 0


def compare(group: int, beta: float, folder: Any, options: Any) -> dict[str, Any]:
    """All runs of one setting, the tools in turns, each in a process of its own."""
    spec = {
        **{name: getattr(options, name) for name in ("steps", "threads", "completion", "whole")},
        "trees": drawn(group, options),
        "beta": beta,
        "model": folder,
    }
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
    for turn in range(options.repeats):
        for tool in TOOLS if turn % 2 == 0 else TOOLS[::-1]:
            runs[tool].append(run_worker(Path(__file__), {**spec, "tool": tool}))
            seconds = ", ".join(f"{one:.2f}" for one in runs[tool][-1]["seconds"])
            print(f"{group} completions, beta {beta:g}, {tool}: {seconds} s a step", flush=True)
    medians = {
        tool: {
            "seconds": median(second for run in runs[tool] for second in run["seconds"]),
            "peak_mib": median(run["peak_mib"] for run in runs[tool]),
        }
        for tool in TOOLS
    }
    return {"group": group, "beta": beta, "medians": medians, "problems": check(spec, runs), "runs": runs}


def drawn(group: int, options: Any) -> list[tuple[list[int], list[list[int]]]]:
    """For each prompt of each step its ids and those of its completions; another set in every step."""
    draw = random.Random(SEED)

    def ids(mean: int, spread: float) -> list[int]:
        length = max(2, round(mean * draw.lognormvariate(-(spread**2) / 2, spread)))
        return [draw.randrange(10, 4000) for _ in range(length)]

    count = options.prompts * (options.steps + 1)
    return [
        (ids(options.prompt, options.spread), [ids(options.completion, options.spread) for _ in range(group)])
        for _ in range(count)
    ]


def check(spec: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Why the comparison does not count; empty if both did the same work."""
    problems = []
    for ours, theirs in zip(*(runs[tool] for tool in TOOLS), strict=True):
        if spec["whole"]:
            lengths = {tool: set(run["lengths"]) for tool, run in zip(TOOLS, (ours, theirs), strict=True)}
            if any(found != {float(spec["completion"])} for found in lengths.values()):
                problems.append(f"beta {spec['beta']:g}: completions of {lengths} tokens")
        else:
            for name, allowed in TOLERANCE.items():
                pairs = zip(ours[name], theirs[name], strict=True)
                scale = 1.0 if name == "losses" else max(theirs[name])
                apart = max(abs(mine - other) for mine, other in pairs) / scale
                if not apart <= allowed:
                    problems.append(f"beta {spec['beta']:g}: {name} differ by {apart:.1e}")
    return problems


def work() -> None:
    """The worker: a few steps by one tool's trainer; Tether comes before torch, as its command line starts."""
    spec = read_spec()
    if spec["tool"] == "tether":
        import tether  # noqa: F401
    import torch

    torch.set_num_threads(spec["threads"])
    write_result(trained(spec, *loaded(spec["model"])))


def trained(spec: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
    """Seconds, losses, gradient norms and lengths of the steps after the first, and the peak of memory."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    clock: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

    if spec["tool"] == "tether":
        from tether import GRPOConfig, GRPOTrainer
    else:
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer
    group = len(spec["trees"][0][1])
    further: dict[str, Any] = {}
    if spec["whole"] and spec["tool"] == "trl":
        further["generation_kwargs"] = {"min_new_tokens": spec["completion"]}
    if spec["whole"]:  # no token ends a completion, in either tool
        model.generation_config.eos_token_id = None
    torch.manual_seed(SEED)
    words = tokenizer.convert_ids_to_tokens
    trainer: Any = GRPOTrainer(
        model=model,
        reward_funcs=of_ids,
        args=GRPOConfig(
            output_dir=str(Path(spec["folder"], "run")),
            report_to="none",
            use_cpu=True,
            bf16=False,
            beta=spec["beta"],
            loss_type="grpo",
            gradient_checkpointing=False,
            num_generations=group,
            per_device_train_batch_size=group,
            gradient_accumulation_steps=len(spec["trees"]) // (spec["steps"] + 1),
            max_completion_length=spec["completion"]
            if spec["whole"]
            else max(len(ids) for _, completions in spec["trees"] for ids in completions),
            max_steps=spec["steps"] + 1,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            shuffle_dataset=False,
            disable_tqdm=True,
            seed=SEED,
            **further,
        ),
        train_dataset=Dataset.from_list([{"prompt": " ".join(words(ids))} for ids, _ in spec["trees"]]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=LORA_R, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
        rollout_func=None if spec["whole"] else given(spec["trees"]),
    )
    trainer.train()
    logs = [one for one in trainer.state.log_history if "loss" in one]
    return {
        "seconds": [after - before for before, after in pairwise(clock)],
        "peak_mib": peak_memory_mib(),
        "losses": [one["loss"] for one in logs],
        "grad_norms": [one["grad_norm"] for one in logs],
        "lengths": [one[f"completions/{name}_length"] for one in logs for name in ("min", "max")],
    }


def of_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Some number of each completion, at no cost."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def given(trees: list[Any]) -> Callable[..., dict[str, Any]]:
    """A `rollout_func` that gives the drawn completions, in the order of the steps."""
    rest = iter([(prompt, ids) for prompt, completions in trees for ids in completions])

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        found = [next(rest) for _ in prompts]
        return {
            "prompt_ids": [prompt for prompt, _ in found],
            "completion_ids": [ids for _, ids in found],
            "logprobs": None,
        }

    return rollout


def loaded(model: Any) -> tuple[Any, Any]:
    """The policy and its tokenizer: of a folder, or random weights with one token a word."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from vs_trl_worker import word_tokenizer

    if isinstance(model, str):
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), AutoTokenizer.from_pretrained(model)
    torch.manual_seed(SEED)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model), dtype=torch.float32)
    return made, word_tokenizer()


if __name__ == "__main__":
    sys.exit(work())
