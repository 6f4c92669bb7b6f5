"""Kinds of runs, how they are interrupted and gone on with, and what must be equal afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from tether.training.checkpoint import last_checkpoint
from tiny import pair_rows

TRAIN = {
    "max_steps": 6,
    "batch_size": 4,
    "max_length": 128,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "disable_dropout": False,
    "bf16": False,
    "cpu_matmul": "default",
    "use_cpu": True,
    "reference_check_steps": 2,
}
LORA = {"lora": {"r": 4, "dropout": 0.1}}
FULL = {"train": {"learning_rate": 5e-4}}
GRPO = {
    "objective": {"loss": "grpo", "beta": 0.1},
    "rewards": [{"name": "numeric_answer", "column": "answer"}, {"python": "mine.py:short", "weight": 0.5}],
    "rollout": {"group": 4, "max_tokens": 6},
    "train": {"reference_check_steps": 0, "max_steps": 4, "batch_size": 2, "save_steps": 1, "eval_steps": 2},
}
REWARD = "def short(completion_ids, **_):\n    return [-len(ids) / 10 for ids in completion_ids]\n"
# What is written as many times as a run was made or read, and never is the same.
_TIMED = ("runtime", "per_second", "total_flos", "seconds", "memory", "train_loss")


def together(*parts: dict[str, Any]) -> dict[str, Any]:
    """One run file of several; the last one has the last word."""
    found: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            below = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = together(found[key], value) if below else value
    return found


def _train(**settings: Any) -> dict[str, Any]:
    return {"train": settings}


TRIED: Counter[str] = Counter()
KINDS: dict[str, dict[str, Any]] = {
    "lora": together(LORA, _train(save_total_limit=1)),
    "full": together(FULL, _train(save_total_limit=1)),
    "store": together(FULL, {"reference": {"store": "store"}}),
    "moving": together(LORA, {"reference": {"sync": {"steps": 2, "alpha": 0.5}}}, _train(save_total_limit=1)),
    "streaming": together(LORA, {"data": {"streaming": True, "buffer_size": 10}}, _train(save_total_limit=1)),
    "kto": together(LORA, {"objective": {"loss": "kto"}}),
    "bco": together(LORA, {"objective": {"loss": "bco"}}, _train(save_total_limit=1)),
    "budget": together(LORA, _train(max_tokens_per_forward=256)),
    "best": together(LORA, _train(load_best_model_at_end=True, save_total_limit=1, eval_steps=2, learning_rate=2e-2)),
    "uneven logs": together(LORA, _train(logging_steps=4, save_steps=3)),
    "grpo": together(LORA, GRPO),
}


class Home:
    """A folder with rows and the run file of a kind; `whole` is what an unbroken run of it leaves.

    Args:
        nursery: what runs commands.
        folder: to make.
        kind: one of `KINDS`.
    """

    def __init__(self, nursery: Nursery, folder: Path, kind: str) -> None:
        self._nursery, self.path, self.kind = nursery, folder, kind
        self.out, self.whole = folder / "out", folder / "whole"
        folder.mkdir(parents=True)
        self._write_rows("train.jsonl", 22)
        self._write_rows("eval.jsonl", 6)
        (folder / "mine.py").write_text(REWARD, encoding="utf-8")
        common = {
            "model": str(nursery.folder / "model"),
            "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
            # Of sampled completions, the limits of prompts and completions say how long a row is.
            "train": {key: value for key, value in TRAIN.items() if (key, kind) != ("max_length", "grpo")},
            "output": "out",
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(together(common, KINDS[kind])), encoding="utf-8")

    def _write_rows(self, name: str, count: int) -> None:
        rows: list[dict[str, Any]] = list(pair_rows(count))
        if self.kind in ("kto", "bco"):
            keys = ("chosen", "rejected")
            rows = [
                {"prompt": r["prompt"], "completion": r[keys[i % 2]], "label": i % 2 == 0} for i, r in enumerate(rows)
            ]
        if self.kind == "grpo":
            rows = [{"prompt": f"{a}+{a}=", "answer": 2 * a} for a in range(count)]
        (self.path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def run(self, *more: str, **request: Any) -> dict[str, Any]:
        """`tether train run.yaml …` in a child."""
        return self._nursery.ask({"home": str(self.path), "argv": ["train", "run.yaml", *more], **request})

    def unbroken(self) -> list[list[Any]]:
        """Run to the end, keep what it left, and return its changes of files, as number, operation, path."""
        record = self.path / "changes.jsonl"
        done = self.run(watch={"below": str(self.path), "record": str(record)})
        assert done["code"] == 0, done["said"]
        self.seconds = done["seconds"]
        shutil.copytree(self.out, self.whole)
        return [json.loads(line) for line in record.read_text("utf-8").splitlines()]

    def clear(self) -> None:
        """Away with what an interrupted run left."""
        for name in ("out", "store"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def go_on(self) -> dict[str, Any]:
        """What a user does after an interruption: `--resume` where there is a whole checkpoint, else once more."""
        return self.run(*(["--resume"] if last_checkpoint(self.out) else []))

    def require_same(self, about: str) -> None:
        """Weights to the bit, each line of the metrics, once and in order, and the results of the evaluation."""
        expected, found = _weights(self.whole), _weights(self.out)
        assert expected.keys() == found.keys(), about
        different = [name for name in expected if not torch.equal(expected[name], found[name])]
        assert not different, f"{about}: {len(different)} of {len(expected)} tensors, such as {different[0]}"
        assert _metrics(self.whole) == _metrics(self.out), about
        for name in ("evaluation.json", "reference.json"):
            read = [
                json.loads(place.read_text("utf-8")) for p in (self.whole, self.out) if (place := p / name).is_file()
            ]
            assert len(read) in (0, 2), (about, name)
            assert not read or _values(read[0]) == _values(read[1]), (about, name)


class Nursery:
    """The process that forks runs; see `nursery.py`.

    Args:
        folder: for the models that all runs share.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nursery.py")), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": paths,
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "TETHER_CACHE": str(folder / "cache"),
            },
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run one command; `code`, `seconds` and `said`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that forks runs has ended"
        return json.loads(answer)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def tried(fault: str) -> None:
    """Count a fault that was gone on from; at once in the file that `FAULTS_LOG` names, as a session may be killed."""
    TRIED[fault] += 1
    if log := os.environ.get("FAULTS_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(fault + "\n")


def said_clearly(done: dict[str, Any]) -> bool:
    """Whether a failed command said one paragraph that a user can act on."""
    said = done["said"]
    return "Error: " in said and "Traceback" not in said and "did not expect" not in said


def _weights(folder: Path) -> dict[str, Any]:
    files = [path for path in sorted(folder.rglob("*.safetensors")) if "checkpoint-" not in str(path)]
    return {f"{path.relative_to(folder)}:{name}": value for path in files for name, value in load_file(path).items()}


def _metrics(folder: Path) -> list[Any]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [_values(json.loads(line)) for line in lines]


def _values(found: dict[str, Any]) -> dict[str, Any]:
    """Without times, and what a reference was said to be, which names how a run began."""
    left_out = (*_TIMED, "line", "moves")
    return {name: value for name, value in found.items() if not any(word in name for word in left_out)}
