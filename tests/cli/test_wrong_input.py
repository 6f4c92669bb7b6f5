"""Wrong input through the real command line: one paragraph, exit code 2, no traceback, no weights loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

CHAT = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}</s>{% endfor %}"
Tether = Callable[..., tuple[int, str, str]]
Change = Callable[[Any], Any]


def _rows(change: Callable[[list[Any]], list[Any]]) -> Change:
    return lambda place: place.write_rows(change(place.pairs()))


def _row(number: int, **values: Any) -> Change:
    """Row `number`, counted from 1, with other values."""
    return _rows(lambda rows: [{**row, **values} if n == number else row for n, row in enumerate(rows, 1)])


def _run_file(text: str, instead: str) -> Change:
    return lambda place: place.edit(text, instead)


WRONG: list[tuple[str, Change, list[str]]] = [
    (
        "missing column",
        _rows(lambda rows: [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in rows]),
        ["`rejected`", "missing", "prompt, chosen"],
    ),
    ("wrong type in row 17", _row(17, chosen=4), ["row 17", "`chosen`"]),
    ("nothing in row 17", _row(17, rejected=None), ["row 17", "`rejected`"]),
    ("line 5 is not JSON", _rows(lambda rows: [*rows[:4], "{", *rows[5:]]), ["line 5", "cannot be read as JSON"]),
    ("empty file", lambda place: place.write_rows([]), ["pairs.jsonl", "empty"]),
    ("no such file", _run_file("pairs.jsonl", "pears.jsonl"), ["pears.jsonl", "Did you mean `pairs.jsonl`"]),
    (
        "identical completions",
        _rows(lambda rows: [{**row, "rejected": row["chosen"]} for row in rows]),
        ["24", "train"],
    ),
    (
        "prompts longer than max_length",
        _rows(lambda rows: [{**row, "prompt": "x" * 100} for row in rows]),
        ["max_length", "64"],
    ),
    ("empty evaluation file", lambda place: place.write_rows([], "held_out.jsonl"), ["held_out.jsonl", "empty"]),
    (
        "unknown key",
        _run_file("batch_size", "batch_siez"),
        ["run.yaml, line 7", "`train.batch_siez`", "`train.batch_size`"],
    ),
    (
        "unknown field",
        _run_file("save_steps", "save_stpes"),
        ["`train.save_stpes`", "Did you mean `train.save_steps`?"],
    ),
    ("wrong type of a key", _run_file("batch_size: 4", "batch_size: '4'"), ["`train.batch_size` is '4' (text)"]),
    ("unknown loss", _run_file("{beta: 0.1}", "{loss: sigmoud}"), ["`objective.loss`", "did you mean sigmoid"]),
    (
        "missing model path",
        _run_file("model: model", "model: ./modle"),
        ["'./modle' does not exist", "Did you mean 'model'"],
    ),
    ("missing reference", _run_file("output: out", "output: out\nreference: {model: modle}"), ["'modle'"]),
    ("folder without a model", _run_file("model: model", "model: ."), ["has no config.json"]),
    ("no tokenizer", lambda place: place.remove_tokenizer(), ["tokenizer"]),
    ("neither padding nor end token", lambda place: place.write_tokenizer(), ["neither a padding nor an end token"]),
    ("conversations without a chat template", lambda place: place.write_conversations(), ["chat template"]),
    ("no run file", lambda place: (place.path / "run.yaml").unlink(), ["'run.yaml' does not exist"]),
]


@pytest.mark.sweep(6)
@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(("break_it", "expected"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_input_is_one_paragraph(workplace: Any, tether: Tether, break_it: Change, expected: list[str]) -> None:
    break_it(workplace)
    code, out, err = tether("train", "run.yaml")
    assert code == 2
    assert out == ""
    error = err[err.index("Error: ") :]
    assert error.endswith("\n")
    assert "\n" not in error[:-1]
    assert "Traceback" not in err
    for part in expected:
        assert part in error


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "No such command 'trian'."),
        (["train"], "Missing argument 'RUN.YAML'."),
        (["train", "run.yaml", "--resum"], "No such option"),
        (["train", "run.yaml", "lora.rank=8"], "override 'lora.rank=8': `lora.rank` is not known."),
        (["train", "run.yaml", "output=/proc/tether/run"], "output_dir is '/proc/tether/run', and it cannot be made"),
        (["train", "run.yaml", "model.device=xla"], "device_map is 'xla', a device on which torch cannot compute"),
        (["train", "run.yaml", "--resume"], "There is no whole checkpoint in out to resume from."),
        (["train", "run.yaml", "--resume=out/checkpoint-9"], "The checkpoint out/checkpoint-9 does not exist."),
    ],
)
def test_wrong_arguments_are_one_paragraph(workplace: Any, tether: Tether, arguments: list[str], expected: str) -> None:
    code, out, err = tether(*arguments)
    assert (code, out) == (2, "")
    assert expected in err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("no_weights")
def test_a_folder_with_a_run_in_it_is_not_mixed_with_another(workplace: Any, tether: Tether) -> None:
    (workplace.path / "out" / "checkpoint-3").mkdir(parents=True)
    code, _, err = tether("train", "run.yaml")
    assert code == 2
    assert "'out' already holds a run (checkpoint-3). It has no whole checkpoint. Write elsewhere" in err
    code, _, err = tether("train", "run.yaml", "--resume")  # each says what the other does not refuse
    assert (code, "in another folder (output=FOLDER) or with out removed" in err) == (2, True)


@pytest.mark.usefixtures("no_weights")
def test_debug_shows_the_traceback(workplace: Any, tether: Tether) -> None:
    code, _, err = tether("train", "run.yaml", "lora.rank=8", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_a_tokenizer_with_an_end_token_needs_no_padding_token(workplace: Any, tether: Tether) -> None:
    workplace.write_tokenizer(eos_token="</s>")
    assert tether("train", "run.yaml", "train.max_steps=1", "data.eval=null")[0] == 0


def test_conversations_with_a_chat_template_train(workplace: Any, tether: Tether) -> None:
    workplace.write_conversations()
    config = json.loads((workplace.path / "model" / "tokenizer_config.json").read_text())
    (workplace.path / "model" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))
    assert tether("train", "run.yaml", "train.max_steps=1", "data.eval=null")[0] == 0
