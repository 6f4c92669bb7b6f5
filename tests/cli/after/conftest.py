"""One tiny run for all commands after training, and a way to call them in its folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cli.after.runs import Run
from tether.cli.main import main


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A LoRA run, trained once."""
    return Run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def call(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Calls a command in the run's place; what it prints on standard output and on standard error."""
    monkeypatch.chdir(run.path)

    def _call(*arguments: str, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        found = main(list(arguments))
        out, err = capsys.readouterr()
        assert found == code, out + err
        return out, err

    return _call
