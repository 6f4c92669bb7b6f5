"""What every benchmark needs: the machine and versions it ran on, workers in processes of their own, and tables."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("tether", "trl", "torch", "transformers", "accelerate", "peft", "datasets")


class WorkerError(RuntimeError):
    """A worker process ended without a result."""


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """The machine, as far as it decides how fast something runs."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "memory_gib": round(pages / 2**30, 1),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions; a package that is missing is left out."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_memory_mib() -> float:
    """The most memory this process has had resident so far, in MiB."""
    line = _field("/proc/self/status", "VmHWM")
    if line:
        return int(line.split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def resident_memory_mib() -> float:
    """The memory that this process has resident now, in MiB; the peak where the system does not say."""
    line = _field("/proc/self/status", "VmRSS")
    return int(line.split()[0]) / 1024 if line else peak_memory_mib()


class PrivateMemory:
    """The most memory that is this process's own, in MiB: without pages of files, which the system takes back whenever
    it needs them. Sampled 50 times a second; 0 where the system does not say."""

    def __enter__(self) -> PrivateMemory:
        self.before_mib = self.peak_mib = _private_mib()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._over.wait(0.02):
            self.peak_mib = max(self.peak_mib, _private_mib())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _private_mib() -> float:
    line = _field("/proc/self/status", "RssAnon")
    return int(line.split()[0]) / 1024 if line else 0.0


def run_worker(script: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Run `python script SPEC.json OUT.json` in a process of its own, without network, and read what it wrote.

    Args:
        script: reads the specification and writes its result, both JSON.
        spec: the specification; `threads` in it is also set for the libraries that read it from the environment, and
            None leaves them to the tool.

    Raises:
        WorkerError: it failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="tether-bench-") as folder:
        asked, answered = Path(folder, "spec.json"), Path(folder, "result.json")
        asked.write_text(json.dumps({**spec, "folder": folder}), encoding="utf-8")
        threads = spec.get("threads", cores())
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            environment.pop(name, None)
            if threads is not None:
                environment[name] = str(threads)
        command = [sys.executable, "-W", "ignore", str(script), str(asked), str(answered)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not answered.is_file():
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
            raise WorkerError(f"{script.name} ended with code {done.returncode}:\n{tail}")
        return json.loads(answered.read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns of text: the first flush left, the others flush right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        aligned = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def side_by_side(ours: dict[str, float], theirs: dict[str, float]) -> tuple[str, ...]:
    """Of a row of a table: seconds of both tools and the ratio, MiB of both and the share that ours has."""
    return (
        f"{ours['seconds']:.2f}",
        f"{theirs['seconds']:.2f}",
        f"{theirs['seconds'] / ours['seconds']:.1f} ×",
        f"{ours['peak_mib']:.0f}",
        f"{theirs['peak_mib']:.0f}",
        f"{ours['peak_mib'] / theirs['peak_mib']:.2f}",
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The rows of a table for `docs/performance.md`."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def new_report(settings: dict[str, Any]) -> dict[str, Any]:
    """What every file of results begins with: when, on what machine, with which versions and settings."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "results": [],
    }


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write all raw numbers, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nraw numbers: {path}")


def is_worker() -> bool:
    """Whether this process was started by `run_worker`, so that a benchmark and its worker may be one file."""
    return len(sys.argv) == 3 and sys.argv[1].endswith("spec.json") and sys.argv[2].endswith("result.json")


def read_spec() -> dict[str, Any]:
    """What `run_worker` asks of this process."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def write_result(result: dict[str, Any]) -> None:
    """Answer `run_worker`."""
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def _field(file: str, name: str) -> str:
    """The value of the first `name: value` line of a file of the system; empty where there is none."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
