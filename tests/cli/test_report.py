"""`tether report`: what it writes where, and that it does so without torch, errors included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.report_pages import two_runs
from tether.cli.main import main


def test_one_run_gets_its_page_and_several_a_comparison(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = map(str, two_runs(tmp_path))
    assert main(["report", first]) == 0
    assert main(["report", first, "--output", "page.html"]) == 0
    assert main(["report", first, second]) == 0
    assert main(["report", first, second, "--output", "both.html"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"report: {first}/report.html", "report: page.html", "report: comparison.html", "report: both.html"]
    assert Path("page.html").read_bytes() == Path(first, "report.html").read_bytes()
    assert Path("both.html").read_bytes() == Path("comparison.html").read_bytes()
    assert "2 runs compared" in Path("both.html").read_text()


def test_watch_serves_on_the_port_that_was_asked_for(tmp_path: Path, capsys, monkeypatch) -> None:
    first, second = two_runs(tmp_path)
    asked = []
    monkeypatch.setattr("tether.report.serve", lambda runs, *, port, say: asked.append((runs, port)))
    assert main(["report", str(first), "--watch"]) == 0
    assert main(["report", str(first), str(second), "--watch", "--port", "8123"]) == 0
    assert asked == [([first], 0), ([first, second], 8123)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "8123"], "Got --port 8123 without --watch"),
        (["--watch", "--output", "a.html"], "Got --output a.html with --watch"),
        (["--output", "gone/a.html"], "there is no folder 'gone'"),
    ],
)
def test_options_that_do_nothing_are_refused(
    options: list[str], said: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, _ = two_runs(tmp_path)
    assert main(["report", str(first), *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_page_and_error_come_without_torch(tmp_path: Path) -> None:
    first, _ = two_runs(tmp_path)
    program = (
        "import sys; from tether.cli.main import main; "
        f"codes = [main(['report', {str(first)!r}]), main(['report', {str(tmp_path / 'gone')!r}])]; "
        "print(codes, {'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 2] set()"
    assert "There is no such folder." in " ".join(done.stderr.split())
