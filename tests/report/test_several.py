"""Several runs on one page, and a page that is served while a run goes on."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.report_pages import STEP, Page, run_folder, two_runs
from tether.errors import ConfigError
from tether.report import write_comparison
from tether.report.serve import page_server


def test_runs_are_told_apart_compared_and_drawn_over_one_another(tmp_path: Path) -> None:
    path = write_comparison(two_runs(tmp_path), tmp_path / "compare.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert (
        "b/out has the highest held-out accuracy, 80 %, before a/out with 60 %; their 95 % intervals do not overlap."
        in page.text
    )
    assert "What was set differentlyKeya/outb/outtrain.learning_rate1e-055e-05Curves" in page.text
    assert "a/outb/outHeld-out accuracy0.600 (0.550 to 0.650)0.800 (0.750 to 0.850)Held-out loss0.60.6" in page.text
    loss = next(json.loads(value or "") for name, value in page.attributes if name == "data-pointer")
    assert loss["l"] == ["step 1", "step 2", "step 3"]
    assert {line["n"]: line["t"] for line in loss["s"]} == {
        "a/out": ["0.69", "0.68", "0.67"],
        "a/out eval": ["", "", "0.6"],
        "b/out": ["0.68", "0.66", "0.64"],
        "b/out eval": ["", "", "0.6"],
    }


def test_intervals_that_overlap_are_said_to(tmp_path: Path) -> None:
    same = Page(write_comparison(two_runs(tmp_path, first=0.8), tmp_path / "c.html").read_text(encoding="utf-8")).text
    assert "a/out and b/out have the same held-out accuracy, 80 %, the highest." in same
    text = Page(write_comparison(two_runs(tmp_path, first=0.75), tmp_path / "c.html").read_text(encoding="utf-8")).text
    assert "their 95 % intervals overlap." in text


def test_a_comparison_is_of_at_least_two_runs(tmp_path: Path) -> None:
    first, _ = two_runs(tmp_path)
    for folders in ([first], [first, first / ".." / "out"]):
        with pytest.raises(ConfigError, match="a comparison needs at least two that do"):
            write_comparison(folders, tmp_path / "c.html")


@contextmanager
def served(*folders: Path) -> Iterator[str]:
    server = page_server(folders)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_served_page_follows_the_run_and_is_loaded_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with served(folder) as address:
        with urllib.request.urlopen(f"{address}/") as answer:
            assert "No log yet" in answer.read().decode()
            assert answer.headers["Refresh"] == "5"
        run_folder(folder, metrics=[STEP])
        with urllib.request.urlopen(f"{address}/") as answer:
            assert "the last log is of step 1." in answer.read().decode()
        run_folder(folder, metrics=[STEP, {**STEP, "step": 2}])
        with urllib.request.urlopen(f"{address}/") as answer:
            assert "the last log is of step 2." in answer.read().decode()
        run_folder(folder, metrics=[STEP], config="data: https://me:pass@example.org/rows.jsonl\n")
        with urllib.request.urlopen(f"{address}/") as answer:
            page = answer.read().decode()
            assert "example.org" in page
            assert "me:pass" not in page
        (folder / "data.json").write_text("{")
        with urllib.request.urlopen(f"{address}/") as answer:
            assert "data.json is not JSON" in answer.read().decode()
    assert not (folder / "report.html").exists(), "the file is the run's"


def test_nothing_but_the_page_is_served_and_to_this_machine_only(tmp_path: Path) -> None:
    with served(*two_runs(tmp_path)) as address:
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{address}/") as answer:
            assert "2 runs compared" in answer.read().decode()
        foreign = urllib.request.Request(f"{address}/", headers={"Host": "elsewhere.example"})
        for asked in (f"{address}/metrics.jsonl", f"{address}/../config.yaml", foreign):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(asked)
            assert refused.value.code == 404
            refused.value.close()


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no folder .*gone"):
        page_server([tmp_path / "gone"])
