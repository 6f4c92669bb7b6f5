"""The process that forks runs, once for a session of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults.harness import Nursery


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Runs commands in children."""
    made = Nursery(tmp_path_factory.mktemp("nursery") / "home")
    yield made
    made.close()
