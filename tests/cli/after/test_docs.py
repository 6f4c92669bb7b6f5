"""Every command and snippet of docs/after_training.md is executed, in the order of the page."""

from __future__ import annotations

import io
import json
import re
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cli.after.runs import Run
from tether.cli.main import main

PAGE = (Path(__file__).parents[3] / "docs" / "after_training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
ADDRESS = "http://localhost:8000"


class _Judge(BaseHTTPRequestHandler):
    """Finds the answer that stands first better, so that every verdict is turned round."""

    asked: list[Any] = []  # noqa: RUF012 - shared by the requests of a test

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._send({"choices": [{"message": {"content": "Both are short.\nA"}}]})

    def do_GET(self) -> None:
        self._send({"data": [{"id": "big"}]})

    def _send(self, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    _Judge.asked.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_every_command_and_snippet_of_the_page_runs(
    run: Run,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, place in (("runs/demo", run.out), ("models/start", run.path / "model")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(place)
    rows = [{**row, "source": "ab"[n % 2]} for n, row in enumerate(run.place.pairs(6))]
    Path("heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:2]))
    snippets = [text for kind, text in BLOCKS if kind == "python"]
    Path("judges.py").write_text(next(text for text in snippets if "# judges.py" in text))
    commands = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    _link_base(run, tmp_path)
    for command in commands:
        _execute(command.replace(ADDRESS, address), monkeypatch)
        out = capsys.readouterr().out
        if ADDRESS in command:
            assert "0 wins, 2 ties" in out
    assert len(commands) == 13
    assert _Judge.asked
    assert all(one["model"] == "big" for one in _Judge.asked)
    assert Path("scores.parquet").is_file()
    exec(compile(snippets[-1], "docs", "exec"), {})
    accuracy = float(capsys.readouterr().out.split(",")[0].strip("("))
    assert 0.0 <= accuracy <= 1.0


def _link_base(run: Run, place: Path) -> None:
    """The run names its base `model`, from where it was trained."""
    (place / "model").symlink_to(run.path / "model")


def _execute(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "|" in command:
        said, _, command = command.partition("|")
        monkeypatch.setattr("sys.stdin", io.StringIO(shlex.split(said)[1] + "\n"))
    name, *arguments = shlex.split(command)
    assert name == "tether"
    assert main(arguments) == 0, command
