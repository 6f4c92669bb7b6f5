"""`--launch N`: several processes of one command, their environment, signals and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tether.cli.launch import launch
from tether.errors import ConfigError

# Stands for `tether`: writes what it was told, then does what its first argument says.
COMMAND = """\
import os, signal, sys, time
from pathlib import Path

names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
rank, what = os.environ["RANK"], sys.argv[1]
Path(f"told_{rank}").write_text(" ".join(os.environ[name] for name in names))
if what == "fail" and rank == "1":
    sys.exit(2)
if what == "kill" and rank == "0":
    os.kill(os.getpid(), signal.SIGKILL)
if what in ("fail", "kill", "wait"):
    signal.signal(signal.SIGINT, lambda *_: (Path(f"stopped_{rank}").write_text("1"), sys.exit(130)))
    Path(f"ready_{rank}").write_text("1")
    time.sleep(60)
"""


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `python -m tether` is the command above."""
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "tether"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(COMMAND)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_processes_are_told_what_torchrun_tells_them(started: Path) -> None:
    assert launch(3, ["end"]) == 0
    told = [(started / f"told_{rank}").read_text().split() for rank in range(3)]
    assert [one[:5] for one in told] == [[str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({one[5] for one in told}) == 1
    assert {one[6] for one in told} == {str(max(1, (os.cpu_count() or 1) // 3))}


def test_the_first_failure_ends_all_and_is_the_exit_code(
    started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tether.cli.launch._GRACE", 0.5)
    begun = time.monotonic()
    assert launch(2, ["fail"]) == 2
    assert "Process 1 of 2 ended with exit code 2." in capsys.readouterr().err
    assert launch(2, ["kill"]) == 128 + signal.SIGKILL
    assert "Process 0 of 2 ended by signal 9." in capsys.readouterr().err
    assert time.monotonic() - begun < 20


def test_signals_are_passed_on_once(started: Path) -> None:
    source = Path(__file__).resolve().parents[2] / "src"
    code = f"import sys; sys.path.insert(0, {str(source)!r}); from tether.cli.launch import launch; "
    code += "sys.exit(launch(2, ['wait']))"
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ), start_new_session=True)
    deadline = time.monotonic() + 30
    while not all((started / f"ready_{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the group of the launcher
    assert process.wait(30) == 130
    assert all((started / f"stopped_{rank}").exists() for rank in range(2))


def test_one_of_several_launches_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="a launcher has started this process as one of several"):
        launch(2, ["train"])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WORLD_SIZE", "abc", "that is not a whole number"),
        ("WORLD_SIZE", "0", "the least that a launcher sets is 1"),
        ("LOCAL_RANK", "0x1", "that is not a whole number"),
        ("RANK", "\u00b2", "that is not a whole number"),
        ("MASTER_PORT", "-1", "that is not a whole number"),
    ],
)
def test_what_no_launcher_sets_is_said_before_anything_is_loaded(
    name: str, value: str, words: str, workplace: Any, tether: Callable[..., tuple[int, str, str]], monkeypatch: Any
) -> None:
    monkeypatch.setenv(name, value)
    for command in (
        ["train", "run.yaml"],
        ["precompute", "run.yaml", "reference.store=s"],
        ["data", "check", "pairs.jsonl"],
    ):
        code, _, err = tether(*command)
        assert code == 2
        assert f"{name} is {value!r} in the environment, and {words}" in " ".join(err.split())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_trls_flag_starts_processes_that_train_together(
    workplace: Any, tether: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    flags = "--model_name_or_path model --dataset_name pairs.jsonl --max_steps 2 --logging_steps 1 --report_to none"
    more = "--per_device_train_batch_size 3 --learning_rate 1e-2 --output_dir out --num_processes 2"
    code, _, err = tether("dpo", *flags.split(), *more.split())
    assert code == 0, err
    lines = [json.loads(line) for line in (workplace.path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines if "loss" in entry] == [1, 2]
    assert "batch: 6 pairs per step, 3 on each of 2 devices" in err
    code, _, err = tether("train", "run.yaml", "--launch", "2", "train.learning_rate=fast")
    assert code == 2
    assert "Process " in err
