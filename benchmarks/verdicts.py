"""What healthy and wrecked runs log: the measured basis of the limits in report/cards.py and training/health/rules.py.

    .venv/bin/python benchmarks/verdicts.py [--seeds 3] [--steps 60] [--json FILE]

A tiny model learns a language of sentences ("the film was good .") and is then trained by DPO to prefer sentences with
good words to sentences with bad ones, which are as grammatical. So it can be said without any of the limits whether a
run wrecked its model: by the share of answers that it samples which are sentences of the language. Learning rates go
from too small to absurd, for all weights and an adapter, for answers of 1 and of 8 sentences.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import new_report, table, write_report
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from tether import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from tether.errors import TetherError
from tether.evaluate.intervals import mean_interval, wilson_interval

NOUNS = ["film", "book", "song", "play", "house", "road", "meal", "day", "dog", "game"]
GOOD = ["good", "fine", "kind", "warm", "bright", "calm", "rich", "sweet"]
BAD = ["bad", "dull", "rude", "cold", "dark", "loud", "poor", "sour"]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "tell", "the", "was", ".", *NOUNS, *GOOD, *BAD]
RATES = {
    "all weights": (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 5.0),
    "adapter": (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 5.0),
}
HELD_OUT = 64
SETTINGS = {
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataset_cache": None,
    "cpu_threads": 1,
}


@dataclass
class Outcome:
    """What a run did to its model, and what it logged.

    Args:
        what: all weights or an adapter.
        sentences: of an answer.
        rate: of learning.
        seed: of model and rows.
        grammatical: share of sampled answers that are sentences of the language, as a share of what it was before.
        good: share of good words among the words of judgement in those answers.
        logs: of the run, with those of the evaluation at its end.
    """

    what: str
    sentences: int
    rate: float
    seed: int
    grammatical: float
    good: float
    logs: list[dict[str, float]]

    def first(self, key: str) -> float:
        """The first value of a key."""
        return next(log[key] for log in self.logs if key in log)

    def last(self, key: str) -> float:
        """The last one."""
        return next(log[key] for log in reversed(self.logs) if key in log)

    @property
    def state(self) -> str:
        """Healthy: at least nine tenths of the answers are still sentences; wrecked: fewer than half."""
        return "healthy" if self.grammatical >= 0.9 else "wrecked" if self.grammatical < 0.5 else "between"

    @property
    def learnt(self) -> bool:
        """Whether held-out pairs are told apart: the 95 % interval of their mean margin is above zero."""
        low, _ = mean_interval(self.last("eval_rewards/margins"), self.last("eval_rewards/margins_std"), HELD_OUT)
        return low > 0


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def answer(dice: random.Random, sentences: int, words: list[str]) -> str:
    """Sentences of the language."""
    return " ".join(f"the {dice.choice(NOUNS)} was {dice.choice(words)} ." for _ in range(sentences))


def is_answer(text: str, sentences: int) -> bool:
    """Whether a text is so many sentences of the language and its end."""
    parts = text.split()
    if len(parts) != 5 * sentences + 1 or parts[-1] != "</s>":
        return False
    allowed = ({"the"}, set(NOUNS), {"was"}, {*GOOD, *BAD}, {"."})
    return all(part in allowed[place % 5] for place, part in enumerate(parts[:-1]))


def base_model(folder: Path, sentences: int, seed: int) -> LlamaForCausalLM:
    """A model that speaks the language."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    dice = random.Random(seed)
    rows = [{"prompt": "<s> tell ", "completion": answer(dice, sentences, GOOD + BAD)} for _ in range(1024)]
    settings: dict[str, Any] = {**SETTINGS, "learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_steps": 128}
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=SFTConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    return trainer.model


@torch.no_grad()
def sampled(model: Any, sentences: int, count: int = 256) -> list[str]:
    """Answers drawn at temperature 1."""
    model.eval()
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        return [""] * count
    torch.manual_seed(1)
    prompt = torch.tensor([[1, 4]]).expand(count, -1)
    asked = {"do_sample": True, "top_k": 0, "max_new_tokens": 5 * sentences + 1, "pad_token_id": 0}
    found = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **asked)
    return [" ".join(WORDS[token] for token in row if token != 0) for row in found[:, 2:].tolist()]


def run(folder: Path, base: Path, what: str, sentences: int, rate: float, seed: int, steps: int) -> Outcome:
    """One run of DPO."""
    dice = random.Random(seed + 100)
    rows = [
        {
            "prompt": "<s> tell ",
            "chosen": answer(dice, sentences, GOOD),
            "rejected": answer(dice, sentences, BAD),
        }
        for _ in range(16 * steps + HELD_OUT)
    ]
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = sum(is_answer(text, sentences) for text in sampled(model, sentences))
    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if what == "adapter" else None
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(folder), learning_rate=rate, max_steps=steps, **SETTINGS),
        train_dataset=Dataset.from_list(rows[HELD_OUT:]),
        eval_dataset=Dataset.from_list(rows[:HELD_OUT]),
        processing_class=word_tokenizer(),
        peft_config=adapter,
    )
    trainer.train()
    trainer.evaluate()
    texts = sampled(trainer.model, sentences)
    right = [text for text in texts if is_answer(text, sentences)]
    words = [word for text in texts for word in text.split() if word in GOOD or word in BAD]
    share = sum(word in GOOD for word in words) / max(len(words), 1)
    return Outcome(what, sentences, rate, seed, len(right) / max(before, 1), share, trainer.state.log_history)


# What the limits are of, each a figure of a run: name, how it is read, and whether wrecked runs have more of it.
FIGURES = {
    "nats lost": lambda run: run.first("logps/chosen") - run.last("eval_logps/chosen"),
    "share of nats lost": lambda run: (
        (run.first("logps/chosen") - run.last("eval_logps/chosen")) / -run.first("logps/chosen")
    ),
    "token accuracy kept": lambda run: run.last("eval_mean_token_accuracy") / run.first("mean_token_accuracy"),
    "kl/k3": lambda run: run.last("kl/k3"),
    "gradient norm": lambda run: sorted(log["grad_norm"] for log in run.logs if "grad_norm" in log)[len(run.logs) // 2],
    "margin in nats": lambda run: run.last("rewards/margins") / 0.1,
    "held-out accuracy": lambda run: run.last("eval_rewards/accuracies"),
}


def by_chance(rows: int) -> float:
    """How often an accuracy of nothing but chance has an interval above one half, or would be called good."""
    total = sum(math.comb(rows, right) for right in range(rows + 1) if wilson_interval(right, rows)[0] > 0.5)
    return total / 2**rows


def report(runs: list[Outcome]) -> str:
    """What the runs of each state logged."""
    lines = []
    for sentences in sorted({run.sentences for run in runs}):
        for state in ("healthy", "between", "wrecked"):
            of_state = [run for run in runs if run.state == state and run.sentences == sentences]
            for name, read in FIGURES.items():
                values = sorted(read(run) for run in of_state)
                if values:
                    middle = values[len(values) // 2]
                    lines.append(
                        [name, sentences, state, len(values), *(f"{v:.3g}" for v in (values[0], middle, values[-1]))]
                    )
    lines.sort(key=lambda line: (list(FIGURES).index(line[0]), line[1]))
    return table(["figure", "sentences", "state", "runs", "least", "middle", "most"], lines)


def main() -> None:
    """Run all, and print what each logged and what the states have in common."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("tether").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    found, stopped = [], []
    with tempfile.TemporaryDirectory(prefix="tether-verdicts-") as place:
        for sentences in (1, 8):
            for seed in range(asked.seeds):
                base = Path(place, f"base-{sentences}-{seed}")
                base_model(base / "run", sentences, seed).save_pretrained(base)
                for what, rate in ((what, rate) for what, rates in RATES.items() for rate in rates):
                    try:
                        one = run(Path(place, "run"), base, what, sentences, rate, seed, asked.steps)
                    except TetherError as error:
                        stopped.append((what, sentences, rate, seed, str(error).split(".")[0]))
                        continue
                    found.append(one)
                    figures = " ".join(f"{name} {read(one):.3g};" for name, read in FIGURES.items())
                    print(
                        f"{what}, {sentences} sentences, rate {rate:g}, seed {seed}: {one.state} "
                        f"({one.grammatical:.2f} grammatical, {one.good:.2f} good, learnt {one.learnt}); {figures}",
                        flush=True,
                    )
    print(report(found))
    for line in stopped:
        print("stopped by an error:", *line)
    print(
        table(
            ["rows", "called above chance by chance"],
            [[n, f"{by_chance(n):.4f}"] for n in (4, 6, 8, 10, 20, 30, 50, 100, 200)],
        )
    )
    if asked.json:
        results = new_report({"seeds": asked.seeds, "steps": asked.steps})
        results["results"] = [vars(one) for one in found]
        write_report(results, asked.json)


if __name__ == "__main__":
    main()
