"""Sampling groups of completions: our tree engine, our `generate` engine and TRL's GRPO trainer, on the same prompts.

    .venv/bin/python benchmarks/rollout.py [--groups 8] [--prompts N] [--repeats N] [--ends] [--out FILE.json]

All three sample in one process in turns, each turn beginning with another, from the same weights in float32 without an
adapter, at temperature 1 without a cut. Unless `--ends` is given no completion may end early, so that all have the same
number of tokens; with it tokens are counted as they come. TRL's part is its trainer's `_generate_single_turn`. Draws of
our two engines are the same function, so that their completions are compared; TRL's come from torch's generator.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, cores, is_worker, markdown, new_report, read_spec, run_worker, write_report, write_result
from vs_trl import SEED, model_folder

TOOLS = ("tree", "transformers", "trl")
HEADER = (
    "completions",
    "prompt + completion",
    *(f"{tool}, tokens/s" for tool in TOOLS),
    "tree : generate",
    "tree : trl",
)
# Share of tokens at which our engines may differ: a rounding at the boundary of two tokens makes another completion.
DIFFERENT = 0.1


def main() -> int:
    """Measure each group size; 0 if all sampled what was asked for."""
    options = parse(sys.argv[1:])
    folder = model_folder(options.model)
    names = ("prompt", "completion", "prompts", "repeats", "threads", "spread", "ends")
    told = folder if isinstance(folder, dict) else Path(folder).name
    report = new_report({"model": told, **{name: getattr(options, name) for name in names}})
    rows, problems = [], []
    for group in options.groups:
        found = compare(group, folder, options)
        report["results"].append(found)
        problems += found["problems"]
        rows.append((group, f"{options.prompt} + {options.completion}", *figures(found["medians"])))
    print("\n" + markdown(HEADER, rows))
    write_report(report, options.out)
    print("\n".join(problems) or "All three sampled what was asked for, and our two engines the same completions.")
    return 1 if problems else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", type=int, default=[8], help="completions of a prompt (8)")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a rollout (4)")
    parser.add_argument("--prompt", type=int, default=300, help="mean tokens of a prompt (300)")
    parser.add_argument("--completion", type=int, default=64, help="the most tokens of a completion (64)")
    parser.add_argument("--spread", type=float, default=0.3, help="deviation of the logarithm of prompt lengths (0.3)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rollouts of each, after one that is not (3)")
    parser.add_argument("--ends", action="store_true", help="completions may end before they are full")
    parser.add_argument("--threads", type=int, default=cores(), help="torch threads (the cores available)")
    parser.add_argument("--model", help="`small` (random weights), folder or .gguf file (SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=RESULTS / "rollout.json", help="JSON file of all raw numbers")
    return parser.parse_args(arguments)


def compare(group: int, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """All rollouts of one group size, in a process of their own."""
    drawn = random.Random(SEED)

    def ids() -> list[int]:
        length = max(2, round(options.prompt * drawn.lognormvariate(-(options.spread**2) / 2, options.spread)))
        return [drawn.randrange(10, 4000) for _ in range(length)]

    spec = {
        "prompts": [ids() for _ in range(options.prompts)],
        "group": group,
        "completion": options.completion,
        "ends": options.ends,
        "repeats": options.repeats,
        "model": folder,
        "threads": options.threads,
    }
    runs = run_worker(Path(__file__), spec)
    return {"group": group, "medians": medians(runs), "problems": check(spec, runs), "runs": runs}


def medians(runs: dict[str, Any]) -> dict[str, float]:
    """Tokens a second of each tool."""
    return {
        tool: median(
            sum(lengths) / seconds
            for lengths, seconds in zip(runs[tool]["lengths"], runs[tool]["seconds"], strict=True)
        )
        for tool in TOOLS
    }


def figures(speeds: dict[str, float]) -> tuple[str, ...]:
    """Of a row of the table: speeds, and how much faster the tree is."""
    ratios = (speeds["tree"] / speeds[tool] for tool in ("transformers", "trl"))
    return (*(f"{speeds[tool]:.0f}" for tool in TOOLS), *(f"{ratio:.1f} ×" for ratio in ratios))


def check(spec: dict[str, Any], runs: dict[str, Any]) -> list[str]:
    """Why the comparison does not count; empty if everyone sampled what was asked for."""
    group, count = spec["group"], len(spec["prompts"]) * spec["group"]
    problems = []
    for tool in TOOLS:
        for lengths in runs[tool]["lengths"]:
            most, least = spec["completion"], 1 if spec["ends"] else spec["completion"]
            if len(lengths) != count or not all(least <= length <= most for length in lengths):
                problems.append(
                    f"{group} completions: {tool} sampled {len(lengths)} of {min(lengths)} to {max(lengths)} tokens"
                )
                break
    if runs["different"] > DIFFERENT:
        problems.append(f"{group} completions: our engines differ at {runs['different']:.0%} of the tokens")
    return problems


def work() -> None:
    """The worker: rollouts by all three in turns."""
    from group_update import loaded

    spec = read_spec()
    torch.set_num_threads(spec["threads"])
    # Two copies: an engine of ours installs its own attention in the model.
    calls = {**our_calls(loaded(spec["model"])[0], spec)}
    calls["trl"] = trl_call(*loaded(spec["model"]), spec)
    write_result(in_turns(calls, spec["repeats"]))


def in_turns(calls: dict[str, Callable[[], list[list[int]]]], repeats: int) -> dict[str, Any]:
    """Times and lengths of `repeats` rollouts of each, after one that is not timed; and how our engines differ."""
    found: dict[str, Any] = {tool: {"seconds": [], "lengths": []} for tool in TOOLS}
    last: dict[str, list[list[int]]] = {}
    for turn in range(repeats + 1):
        for place in range(len(TOOLS)):
            tool = TOOLS[(turn + place) % len(TOOLS)]
            start = time.perf_counter()
            last[tool] = calls[tool]()
            seconds = time.perf_counter() - start
            if turn:
                found[tool]["seconds"].append(seconds)
                found[tool]["lengths"].append([len(ids) for ids in last[tool]])
    return {**found, "different": different(last["tree"], last["transformers"])}


def different(one: list[list[int]], other: list[list[int]]) -> float:
    """Share of places at which completions of two engines are not the same."""
    wrong = sum(
        sum(a != b for a, b in zip(x, y, strict=False)) + abs(len(x) - len(y)) for x, y in zip(one, other, strict=True)
    )
    return wrong / sum(max(len(x), len(y)) for x, y in zip(one, other, strict=True))


def our_calls(model: Any, spec: dict[str, Any]) -> dict[str, Callable[[], list[list[int]]]]:
    """Our two engines."""
    from tether.rollout import RolloutRequest, Sampling
    from tether.rollout.transformers_engine import TransformersEngine
    from tether.rollout.tree_engine import TreeEngine

    ends = model.generation_config.eos_token_id
    stops = tuple(ends) if isinstance(ends, list) else (ends,)
    sampling = Sampling(1.0, spec["completion"], stops if spec["ends"] else ())
    requests = [RolloutRequest(torch.tensor(ids), row, range(spec["group"])) for row, ids in enumerate(spec["prompts"])]

    def call(engine: Any) -> Callable[[], list[list[int]]]:
        return lambda: [
            one.ids.tolist() for group in engine.generate(model, requests, sampling) for one in group.completions
        ]

    return {"tree": call(TreeEngine()), "transformers": call(TransformersEngine())}


def trl_call(model: Any, tokenizer: Any, spec: dict[str, Any]) -> Callable[[], list[list[int]]]:
    """TRL's, by its trainer; prompts come once for each completion, as its sampler deals them."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer: Any = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(dir=spec.get("folder")),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            num_generations=spec["group"],
            per_device_train_batch_size=spec["group"],
            max_completion_length=spec["completion"],
            temperature=1.0,
            generation_kwargs=None if spec["ends"] else {"min_new_tokens": spec["completion"]},
            seed=SEED,
        ),
        train_dataset=Dataset.from_list([{"prompt": "x"}] * spec["group"]),
        processing_class=tokenizer,
    )
    prompts = [ids for ids in spec["prompts"] for _ in range(spec["group"])]
    model.eval()
    return lambda: trainer._generate_single_turn(prompts, None, {}, spec["group"])[0]


if __name__ == "__main__":
    sys.exit(work() if is_worker() else main())
