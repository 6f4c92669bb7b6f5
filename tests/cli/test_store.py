"""`tether precompute` and `tether store`: a store is filled ahead, read by a run, and looked after."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STORE = "reference.store=log_probs"


def shifted(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)


def test_fill_ahead_train_look_into_and_export(tether, workplace):
    code, out, err = tether("precompute", "run.yaml", STORE)
    # The held-out rows are among the training rows here, and a completion is computed once.
    assert (code, "64 completions: 16 were in the store, 48 were computed" in out) == (0, True), err
    assert tether("precompute", "run.yaml", STORE, "train.learning_rate=1e-2", "lora.r=2", "output=elsewhere")[1] == (
        "64 completions: 64 were in the store, 0 were computed\nstore: log_probs\n"
    )
    workplace.edit("output: out\n", "output: out\nreference: {store: log_probs}\n")
    code, out, err = tether("train", "run.yaml")
    assert code == 0, err
    assert "stored completions of the training set were computed again" in err
    assert "this process computed 0 of them in 0 passes of the reference" in err
    assert json.loads(Path("out/reference.json").read_text())["identity"]["method"] == "store"
    code, out, err = tether("store", "info", "log_probs")
    assert code == 0
    assert re.search(r"float32: 48 completions, \d+ tokens, 1 parts, [\d.]+ KiB", out)
    assert tether("store", "verify", "log_probs")[:2] == (0, "48 completions, every value matches its checksum\n")
    assert tether("store", "compact", "log_probs")[:2] == (0, "1 parts before, 1 after\n")
    assert tether("store", "export", "log_probs", "out.jsonl")[0] == 0
    assert len(Path("out.jsonl").read_text().splitlines()) == 48


def test_a_damaged_store_fails_verification(tether, workplace):
    assert tether("precompute", "run.yaml", STORE)[0] == 0
    shifted(next(Path("log_probs").rglob("*.arrow")))
    code, _, err = tether("store", "verify", "log_probs")
    assert code == 1
    assert "1 damaged parts" in err
    assert "Traceback" not in err


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["store", "info", "nowhere"], "There is no store"),
        (["store", "verify", "run.yaml"], "is a file"),
        (["store", "export", "nowhere", "out.csv"], ".parquet or .jsonl"),
        (["store", "info"], "PATH"),
        (["store", "mend", "x"], "mend"),
        (["precompute", "run.yaml"], "names no store"),
        (["precompute", "run.yaml", "reference=none", STORE], "nothing to store"),
        (["precompute", "run.yaml", "reference.store=nonsense://x"], "cannot be reached"),
        (["precompute", "run.yaml", STORE, "reference.store_dtype=int8"], "float32 or float16"),
        (["precompute", "run.yaml", STORE, "train.reference_store=x"], "`reference.store`"),
        (["train", "run.yaml", "reference.store_dtype=float16"], "without a store"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(argv, words, tether, workplace):
    code, _, err = tether(*argv)
    assert (code, words in err, "Traceback" in err) == (2, True, False), err
    assert len(err.strip().splitlines()) == 1 or "nonsense" in " ".join(argv)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_fill_what_a_killed_one_left(tether, workplace):
    """Resumable after a kill, under torchrun; the second command counts what was there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workplace.write_rows(workplace.pairs(400))
    code = (
        "import tether.reference.store.store as s; s.FLUSH_SECONDS = 0;"
        "s.Store.__init__.__kwdefaults__['flush_seconds'] = 0;"
        "from tether.cli.main import main; import sys; sys.exit(main(sys.argv[1:]))"
    )
    command = ["precompute", "run.yaml", STORE, "train.per_device_train_batch_size=2", "data.eval=null"]
    killed = subprocess.Popen([sys.executable, "-c", code, *command], env=environment, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 120
    while len(list(Path("log_probs").rglob("*.arrow"))) < 5 and time.monotonic() < give_up:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    there = int(re.search(r"(\d+) completions", tether("store", "info", "log_probs")[1]).group(1))
    assert 5 <= there < 800
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tether"]
    done = subprocess.run([*torchrun, *command], env=environment, capture_output=True, text=True, timeout=300)
    counts = re.search(r"800 completions: (\d+) were in the store, (\d+) were computed", done.stdout)
    assert counts, done.stderr[-3000:]
    assert (int(counts[1]), int(counts[2])) == (there, 800 - there)
    # What two processes filled is what one computes.
    code, _, err = tether("train", "run.yaml", STORE, "train.max_steps=2", "data.eval=null")
    assert code == 0, err
    assert "computed 0 of them in 0 passes" in err
