"""Peak memory of scoring one pair, forward and backward, against sequence length and against vocabulary.

    .venv/bin/python benchmarks/memory.py [--lengths 1024 2048 ...] [--vocabularies 8192 ...] [--out FILE.json]

A small model with random weights, so that what grows is seen: attention must not grow with the square of the length,
and no `[tokens, vocabulary]` matrix may exist. Each figure is a process of its own; what it had resident before the
forward is subtracted. `estimate` is what the budget `auto` reckons with (`tether.compute.memory`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    RESULTS,
    is_worker,
    markdown,
    new_report,
    peak_memory_mib,
    read_spec,
    run_worker,
    write_report,
    write_result,
)

HEADER = ("tokens", "vocabulary", "checkpointing", "peak, MiB", "estimate, MiB", "one matrix of logits, MiB")
LENGTHS = (1024, 2048, 4096, 8192)
VOCABULARIES = (8192, 32768, 131072)
SHORT, SMALL = LENGTHS[0], VOCABULARIES[0]


def main() -> int:
    """Measure along both axes."""
    options = parse(sys.argv[1:])
    report = new_report({name: getattr(options, name) for name in ("hidden", "layers", "repeats", "threads")})
    points = [(length, options.vocabularies[0]) for length in options.lengths]
    points += [(options.lengths[0], vocabulary) for vocabulary in options.vocabularies[1:]]
    rows = []
    for checkpointing in (False, True):
        for length, vocabulary in points:
            spec = {
                "length": length,
                "vocabulary": vocabulary,
                "checkpointing": checkpointing,
                "hidden": options.hidden,
                "layers": options.layers,
                "threads": options.threads,
            }
            runs = [run_worker(Path(__file__), spec) for _ in range(options.repeats)]
            peak = median(run["peak_mib"] for run in runs)
            report["results"].append({**spec, "peak_mib": peak, "runs": runs})
            estimate, logits = runs[0]["estimate_mib"], runs[0]["logits_mib"]
            where = "on" if checkpointing else "off"
            rows.append((length, vocabulary, where, f"{peak:.0f}", f"{estimate:.0f}", f"{logits:.0f}"))
            print(*rows[-1], flush=True)
    print("\n" + markdown(HEADER, rows))
    write_report(report, options.out)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens of the pair")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=list(VOCABULARIES), help="sizes")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (256)")
    parser.add_argument("--layers", type=int, default=4, help="layers (4)")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each figure (3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json", help="JSON file of all raw numbers")
    return parser.parse_args(arguments)


def work() -> None:
    """The worker: a forward and a backward of one pair, half of it prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tether.compute.memory import bytes_per_token
    from tether.scoring import pack, score
    from tether.types import Example

    spec = read_spec()
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    hidden, length = spec["hidden"], spec["length"]
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=spec["vocabulary"],
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=spec["layers"],
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=length,
            tie_word_embeddings=True,
        )
    )
    # The embeddings are frozen: a gradient of [vocabulary, hidden] would hide what the head needs.
    model.get_input_embeddings().weight.requires_grad_(False)
    if spec["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    draw = torch.Generator().manual_seed(0)

    def batch(tokens: int) -> Any:
        ids = torch.randint(3, spec["vocabulary"], (tokens,), generator=draw).tolist()
        prompt, completion = tokens // 2, tokens // 4
        return pack([Example.of(ids[:prompt], [ids[prompt : prompt + completion], ids[prompt + completion :]])])

    def step(tokens: int) -> int:
        scores = score(model, batch(tokens), outputs=("entropy", "top1", "mean_logits"))
        scores.logps.sum().backward()
        return len(scores.token_logps)

    step(16)  # gradients and kernels are there before the measurement
    before = peak_memory_mib()
    scored = step(length)
    need = bytes_per_token(model, checkpointing=spec["checkpointing"])
    write_result(
        {
            "peak_mib": peak_memory_mib() - before,
            "estimate_mib": need * length / 2**20,
            "logits_mib": scored * spec["vocabulary"] * 4 / 2**20,
        }
    )


if __name__ == "__main__":
    sys.exit(work() if is_worker() else main())
