"""The control groups that this process is in, which may grant it less than the machine has; versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def groups(controller: str) -> Iterator[Path]:
    """The folder of each group that limits this process, its parents included: a limit holds for all inside.

    Args:
        controller: `cpu` or `memory`.
    """
    for line in read(_MEMBERSHIP).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            roots = [_ROOT, _ROOT / "unified"]
        elif controller in controllers.split(","):
            roots = [_ROOT / controllers, _ROOT / controller]
        else:
            continue
        for root in roots:
            # In a container the path may be the host's, of which only the root is mounted.
            folder = root / path.strip("/")
            for place in (folder, *folder.parents):
                yield place
                if place == root:
                    break


def read(path: Path) -> str:
    """The text of a file of the system; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
