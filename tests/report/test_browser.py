"""The page in a browser: text from data runs nothing, and the page's own script answers. Left out without Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support.report_pages import full_run, run_folder
from tether.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
RUNS = "<script>document.documentElement.dataset.ran='script'</script><img src=x onerror=\"document.title='ran'\">"


def document_of(path: Path, profile: Path) -> str:
    """What a browser has made of a page after its scripts."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    done = subprocess.run(
        [*map(str, command), "--virtual-time-budget=2000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def test_inv_39_text_of_the_data_runs_nothing_and_what_slipped_through_would_not_either(tmp_path: Path) -> None:
    run = full_run()
    run["samples"] = [{"prompt": RUNS, "before": RUNS, "after": RUNS}]
    run["config"] = f"a: {RUNS!r}\n"
    path = write_report(run_folder(tmp_path / "run", **run))
    source = path.read_text(encoding="utf-8")
    shown = document_of(path, tmp_path / "profile")
    assert 'data-ran="' not in shown
    assert "<title>run · Tether report</title>" in shown
    assert "&lt;script&gt;document" in shown
    # The page's own script has run: it has put a dot for the pointer into every line of a chart.
    assert len(re.findall('class="pointed dot"', shown)) >= 10

    # As if a template had failed to escape: the page's policy still stops it. Without the policy it runs.
    slipped = tmp_path / "slipped.html"
    slipped.write_text(source.replace("<footer>", f"<footer>{RUNS}"), encoding="utf-8")
    assert 'data-ran="' not in document_of(slipped, tmp_path / "profile")
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    slipped.write_text(bare.replace("<footer>", f"<footer>{RUNS}"), encoding="utf-8")
    assert 'data-ran="script"' in document_of(slipped, tmp_path / "profile")
