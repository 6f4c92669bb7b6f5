"""The command itself: help, version, and how errors of every kind end."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors import SafetensorError

from tether.cli.errors import explain
from tether.cli.main import app, main
from tether.cli.words import commands_of, in_words
from tether.errors import ConfigError, DataError, ReferencePolicyError, TetherError

Tether = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(tether: Tether, arguments: list[str]) -> None:
    code, out, err = tether(*arguments)
    assert (code, err) == (0, "")
    assert "train" in out


def test_version(tether: Tether) -> None:
    assert tether("--version") == (0, f"tether {version('tether')}\n", "")


def every_command() -> list[tuple[str, Any]]:
    """Every command as it is called."""
    return list(commands_of(in_words(typer.main.get_command(app))))


def test_help_says_no_types_and_its_examples_can_be_typed(tether: Tether) -> None:
    for name, command in every_command():
        code, out, _ = tether(*name.split(), "--help")
        assert code == 0
        assert not re.findall(r"<[a-z\[\] |]+>", out), name
        if hasattr(command, "commands") and name != "doctor":
            continue
        assert "Example: tether " in out, name
        words = shlex.split(command.epilog.removeprefix("Example: ").partition(", or")[0])
        assert words[: 1 + len(name.split())] == ["tether", *name.split()]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, name


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("st", ["store"]),
        ("plan --gp", ["--gpu", "--gpus"]),
        ("sample run.yaml --as p", ["pairs"]),
        ("data sh", ["show"]),
    ],
)
def test_a_shell_completes(
    typed: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_TETHER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"tether {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split())))
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().out.split() == offered


def test_help_of_the_module_waits_for_no_library() -> None:
    """`python -m tether` equals `tether`, and its help imports nothing that takes seconds."""
    code = (
        "import runpy, sys; sys.argv = ['tether', '--help']\n"
        "try: runpy.run_module('tether', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "slow = {'torch', 'transformers', 'datasets', 'peft', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage: tether" in result.stdout


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("a"), 2, "a"),
        (DataError("a"), 2, "a"),
        (ReferencePolicyError("a"), 1, "a"),
        (TetherError("a"), 1, "a"),
        (KeyboardInterrupt(), 130, "Stopped."),
        (typer.Abort(), 130, "Stopped."),
        (typer.BadParameter("no good"), 2, "no good. `tether --help` lists what there is."),
        (OSError(errno.ENOSPC, "No space left", "out/x"), 1, "There is no space left on the disk for 'out/x'."),
        (OSError(errno.ENOSPC, "No space left"), 1, "There is no space left on the disk for what was written last"),
        # What numpy, torch and safetensors say of it, who keep no number.
        (OSError("1408 requested and 250 written"), 1, "There is no space left on the disk"),
        (RuntimeError("basic_ios::clear: iostream error"), 1, "There is no space left on the disk"),
        (ValueError("I/O error: File too large (os error 27)"), 1, "`ulimit -f` is reached"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "No permission for 'out': Permission denied."),
        (OSError(errno.EIO, "Input/output error", "x"), 1, "The system refused 'x': Input/output error."),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "The system refused 'x': File name too long."),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/t']"), 2, "Set TMPDIR to a folder"),
        (ValueError("embedded null byte"), 2, "has a null character, which no system allows"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 1, "The memory is full: CUDA out of memory. Lower"),
        (RuntimeError("shapes differ\nsecond line"), 1, "RuntimeError: shapes differ. This is a bug in Tether or in a"),
        (ZeroDivisionError(), 1, "ZeroDivisionError: without a message. This is a bug"),
        (SafetensorError("header too large"), 2, "A file of weights is damaged: header too large. Copy"),
        (RecursionError("maximum recursion depth exceeded"), 2, "nests its values deeper than can be read"),
    ],
)
def test_every_error_is_one_paragraph_with_its_code(error: BaseException, code: int, message: str) -> None:
    paragraph, found = explain(error)
    assert found == code
    assert message in paragraph
    assert "\n" not in paragraph


@pytest.mark.slow
def test_a_process_without_standard_streams_writes_its_output_and_nothing_else(tmp_path: Path) -> None:
    """`>&-`: the files that are opened next would get the numbers of the streams."""
    page = tmp_path / "page.html"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 20)
    command = [sys.executable, "-m", "tether", "data", "check", str(tmp_path / "rows.jsonl"), "--html", str(page)]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    assert subprocess.run(shell, check=False, cwd=tmp_path).returncode == 0
    assert page.read_text().startswith("<!doctype html>")
    (tmp_path / "ü世界.jsonl").write_text('{"prompt": "ü", "chosen": "世界", "rejected": "c"}\n' * 20)
    narrow = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    shown = [*command[:-3], "ü世界.jsonl"]
    said = subprocess.run(shown, check=False, cwd=tmp_path, env=narrow, capture_output=True)
    assert said.returncode == 0, said.stderr
    assert b"\\u4e16\\u754c" in said.stdout
    with open("/dev/full", "w") as nowhere:
        full = subprocess.run(command, check=False, stdout=nowhere, stderr=subprocess.PIPE, text=True)
    assert full.returncode == 1
    assert "There is no space left on the disk for what was written last" in full.stderr


def test_an_error_that_nobody_expected_shows_its_traceback_only_on_request(
    tether: Tether, workplace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of no file: what a file of the user's own raises is told apart below.
    monkeypatch.setattr("tether.config.load_run_file", eval("lambda *_: 1 / 0"))
    code, _, err = tether("train", "run.yaml")
    assert code == 1
    assert "ZeroDivisionError: division by zero. This is a bug" in err
    assert "Traceback" not in err
    code, _, err = tether("train", "run.yaml", "--debug")
    assert code == 1
    assert "Traceback" in err


def test_an_import_that_fails_inside_tether_is_a_bug():
    paragraph, code = explain(ImportError("cannot import name 'x' from 'tether.config.run'", name="tether.config.run"))
    assert code == 1
    assert "This is a bug in Tether" in paragraph
    assert "not installed" not in paragraph


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            ModuleNotFoundError("No module named 'wandb'", name="wandb"),
            2,
            "is not installed (package wandb): No module",
        ),
        (RuntimeError("WandbCallback requires wandb to be installed. Run `pip install wandb`."), 2, "is not installed"),
        (RuntimeError("Found no NVIDIA driver on your system."), 2, "this machine has no GPU that torch can use"),
        (AssertionError("Torch not compiled with CUDA enabled"), 2, "Set `model.device` to cpu"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "out/checkpoint-2/optimizer.pt"),
            2,
            "optimizer.pt' is missing",
        ),
    ],
)
def test_what_a_machine_or_a_folder_lacks_is_no_bug(error: BaseException, code: int, words: str) -> None:
    paragraph, found = explain(error)
    assert words in paragraph
    assert "bug" not in paragraph
    assert found == code


def test_an_error_in_a_function_of_the_users_own_names_it(
    tether: Tether, workplace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own_reward(*args: object) -> None:
        subprocess.run([0], check=True)  # type: ignore[list-item]  # raises inside a library

    monkeypatch.setattr("tether.config.load_run_file", own_reward)
    code, _, err = tether("train", "run.yaml")
    assert code == 1
    assert "TypeError in own_reward() (test_main.py, line" in err
    assert "which is not Tether's: " in err
    assert "a bug" not in err
