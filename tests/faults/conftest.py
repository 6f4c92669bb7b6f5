"""The process that forks runs, once for a session of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults.harness import TRIED, Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Runs commands in children."""
    made = Nursery(tmp_path_factory.mktemp("nursery") / "home")
    yield made
    made.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How often each fault was tried and gone on from, for the table in `docs/reliability.md`."""
    for fault, times in sorted(TRIED.items()):
        terminalreporter.write_line(f"{times:5d} × {fault}")
