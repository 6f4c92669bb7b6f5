"""Runs whose peak of memory was measured: models of their own sizes, random weights, on a CPU.

`python tests/plan/peaks.py NAME` trains one of them in a folder and prints its peak in MiB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tether.cli.heap import WITHOUT_CACHES

# hidden size, layers, vocabulary, further keys of the run file
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "lora": (768, 12, 32000, {"lora": {"r": 16}}),
    "full": (768, 12, 32000, {}),
    "lora_no_checkpointing": (768, 12, 32000, {"lora": {"r": 16}, "train": {"gradient_checkpointing": False}}),
    "full_wide_vocabulary": (512, 8, 96000, {}),
    "full_long": (640, 16, 8000, {"train": {"max_length": 1024, "batch_size": 8}}),
    "lora_no_reference": (1024, 16, 32000, {"lora": {"r": 64}, "objective": {"loss": "simpo"}}),
}
SHORT, LONG = 60, 400


def write_case(folder: Path, name: str, *, weights: bool = True) -> Path:
    """Model, tokenizer, rows and run file of a case; the run file. A plan reads no weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cli.conftest import character_tokenizer

    hidden, layers, vocabulary, further = CASES[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    (LlamaForCausalLM(config) if weights else config).save_pretrained(folder / "model")
    character_tokenizer(eos_token="</s>", pad_token="<pad>").save_pretrained(folder / "model")
    length = LONG if "long" in name else SHORT
    rows = [
        {"prompt": f"{n:03} " + "p" * length, "chosen": " " + "c" * length, "rejected": " " + "r" * length}
        for n in range(48)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train = {"batch_size": 8, "max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    values = {
        **further,
        "model": str(folder / "model"),
        "data": {"train": str(folder / "pairs.jsonl")},
        "train": {**train, "use_cpu": True, "bf16": False, **further.get("train", {})},
        "output": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(json.dumps(values), encoding="utf-8")
    return folder / "run.yaml"


def measured_peak(run_file: Path) -> int:
    """Bytes that a process held at most while it trained the run, with the heap that `tether train` begins with."""
    code = (
        "import sys; from pathlib import Path; from tether.cli.main import main; assert main(sys.argv[1:]) == 0; "
        "print([l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM')][0].split()[1])"
    )
    command = [sys.executable, "-c", code, "train", str(run_file)]
    environment = {**os.environ, "GLIBC_TUNABLES": WITHOUT_CACHES}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.split()[-1]) * 1024


if __name__ == "__main__":
    import tempfile

    for case in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as place:
            print(case, measured_peak(write_case(Path(place), case)) // 2**20, flush=True)
