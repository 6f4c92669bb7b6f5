"""A folder with all that a run needs: a tiny model with its tokenizer, rows, and a run file."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny import VOCABULARY, tiny_model

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


RUN = """\
model: model
lora: {r: 4, alpha: 8}
data:
  train: pairs.jsonl
  eval: held_out.jsonl
objective: {beta: 0.1}
train: {epochs: 1, learning_rate: 1e-3, batch_size: 4, max_length: 64, logging_steps: 1, save_steps: 3, use_cpu: true}
output: out
"""


def character_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per character; `special` are tokens such as `eos_token`."""
    printable = [character for character in string.printable if character not in "\r\x0b\x0c"]
    characters = printable[: VOCABULARY - len(SPECIAL)]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")  # type: ignore
    tokenizer.decoder = decoders.Fuse()  # type: ignore
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


class Workplace:
    """A folder with `model/`, `pairs.jsonl`, `held_out.jsonl` and `run.yaml`, and ways to change them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        tiny_model().save_pretrained(path / "model")
        self.write_tokenizer(eos_token="</s>", pad_token="<pad>")
        self.write_rows(self.pairs())
        self.write_rows(self.pairs(8), "held_out.jsonl")
        (path / "run.yaml").write_text(RUN, encoding="utf-8")

    def pairs(self, count: int = 24) -> list[dict[str, Any]]:
        """Rows in which the chosen completion is the kind one."""
        return [{"prompt": f"film {n}:", "chosen": f" good {n}", "rejected": f" bad {n * 7}"} for n in range(count)]

    def write_rows(self, rows: list[Any], name: str = "pairs.jsonl") -> None:
        """JSON lines; a row that is text already is written as it is."""
        lines = ((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        (self.path / name).write_text("".join(lines), encoding="utf-8")

    def write_conversations(self) -> None:
        """The same pairs as chat messages."""
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        self.write_rows(
            [{key: [{"role": roles[key], "content": text}] for key, text in row.items()} for row in self.pairs()]
        )

    def write_tokenizer(self, **special: str) -> None:
        """A tokenizer with these special tokens only, in place of the one that is there."""
        self.remove_tokenizer()
        character_tokenizer(**special).save_pretrained(self.path / "model")

    def remove_tokenizer(self) -> None:
        """Leave the model without a tokenizer."""
        for file in (self.path / "model").glob("tokenizer*"):
            file.unlink()

    def edit(self, text: str, instead: str) -> None:
        """Replace a part of the run file."""
        file = self.path / "run.yaml"
        assert text in file.read_text(encoding="utf-8")
        file.write_text(file.read_text(encoding="utf-8").replace(text, instead), encoding="utf-8")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """The current folder, with all that a run needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Workplace(tmp_path)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when weights are loaded."""

    def load(*args: Any, **kwargs: Any) -> None:
        pytest.fail("weights were loaded before the input was refused")

    monkeypatch.setattr("tether.models.spec.load_policy", load)


@pytest.fixture
def tether(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, standard output, standard error."""
    from tether.cli.main import main

    def run(*argv: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(argv)
        return code, *capfd.readouterr()

    return run
