"""10,000 rows, right and broken in every field, in every format: never a traceback, always the row and the field."""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from data.samples import assistant, user
from support.format_examples import CANONICAL, EXAMPLES
from tether.config import load_run_file
from tether.data import load_rows, preferences, prepare, read_preferences, split_rows
from tether.data.audit.audit import check
from tether.errors import ConfigError, DataError, TetherError

ROWS, RUN_FILES, BATCH = 10_000, 500, 4
# Rows with images are read by a processor, by the audit and by splits.
WITH_IMAGES: list[tuple[str | None, str, dict[str, Any]]] = [
    (
        None,
        "pair",
        {
            "images": ["a.png", "b.png"],
            "prompt": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}, {"type": "image"}]}
            ],
            "chosen": [assistant("A")],
            "rejected": [assistant("B")],
        },
    ),
    (None, "unpaired", {"image": "a.png", "prompt": [user("Hi")], "completion": [assistant("A")], "label": True}),
    (None, "completion", {"images": ["a.png"], "prompt": "<image> Hi", "completion": "A"}),
    (
        "sharegpt",
        "pair",
        {
            "conversations": [{"from": "human", "value": "<image>Hi"}],
            "chosen": {"from": "gpt", "value": "A"},
            "rejected": {"from": "gpt", "value": "B"},
            "images": ["a.png"],
        },
    ),
]
JUNK: list[Any] = [
    *(None, "", " ", "text", 0, -1, 3.5, math.nan, math.inf, 2**70, True, False, b"bytes", "\ud800", "\x00"),
    *([], {}, [[]], [None], [1], ["a", None], [{}], {"a": 1}, [{"role": None}], [{"role": "user"}], {"role": "user"}),
    *([{"content": "x"}], [{"role": 1, "content": "x"}], [{"role": "user", "content": 1}], [[{"role": "user"}]]),
    *([{"role": "user", "content": "x"}], [{"role": "user", "content": [{"type": "image"}]}], [user("x"), "y"]),
    *([{"from": "human", "value": None}], [{"rank": 1}], [["a", "b"]], [["a"]], "[{'role': 'user', 'content': 'x'}]"),
    *([{**assistant("A"), "tool_calls": 3}], [{**assistant("A"), "tool_calls": [None]}], {"tools": [1]}, object()),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field inside a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def broken(row: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """A row with one to three of its fields, at any depth, replaced, removed or renamed."""
    row = copy.deepcopy(row)
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        path = generator.choice(list(places(row)) or [()])
        if not path:
            break
        target = row
        for key in path[:-1]:
            target = target[key]
        how = generator.random()
        if how < 0.75:
            target[path[-1]] = copy.deepcopy(generator.choice(JUNK[:-1])) if how < 0.74 else JUNK[-1]
        elif isinstance(target, dict):
            value = target.pop(path[-1])
            if how > 0.9:
                target[f"{path[-1]}s"] = value
        else:
            target.pop(path[-1])
    return row


@pytest.mark.slow
def test_ten_thousand_rows_in_every_format_end_in_records_or_in_a_message_with_row_and_field() -> None:
    generator = random.Random(7)
    layouts = [*CANONICAL, *EXAMPLES]
    fields = {str(key) for _, _, row, _ in layouts for path in places(row) for key in path}
    fields |= {"instruction", "input", "messages"}  # asked for where nothing like them is there
    named = re.compile("|".join(map(re.escape, fields)))
    done = refused = 0
    for number in range(ROWS // BATCH):
        name, kind, good, _ = layouts[number % len(layouts)]
        rows = [good if generator.random() < 0.6 else broken(good, generator) for _ in range(BATCH)]
        source: Any = rows if name is None else {"path": rows, "format": name}
        try:
            data = load_rows(source, kind=kind, name="train")  # type: ignore[arg-type]
            schema = read_preferences(data, kind=kind, name="train")  # type: ignore[arg-type]
            assert len(preferences(data, schema)) == len(data)
            done += 1
        except DataError as error:
            message = str(error)
            refused += 1
            whole_column = re.search(r"columns? .* (is|are) missing", message)
            assert re.search(r"row \d+", message) or whole_column or "no rows" in message, (message, rows)
            assert named.search(message), (message, rows)
            assert "\n" not in message
        except Exception as error:  # what must not happen, with what made it happen
            pytest.fail(f"{name} {kind}: {type(error).__name__}: {error}; rows {rows!r}")
    assert done > 100
    assert refused > 500


def test_the_audit_of_broken_rows_says_row_and_field() -> None:
    """In place of a refusal, one finding: the other rows are looked at all the same. Rows that no table can hold, and
    columns that are missing, are refused."""
    generator = random.Random(5)
    layouts = [*CANONICAL, *((name, kind, row, {}) for name, kind, row in WITH_IMAGES)]
    looked = broken_rows = 0
    for number in range(600):
        name, kind, good, _ = layouts[number % len(layouts)]
        rows = [good if generator.random() < 0.5 else broken(good, generator) for _ in range(BATCH)]
        source: Any = rows if name is None else {"path": rows, "format": name}
        try:
            result = check(load_rows(source, kind=kind, name="train"), kind=kind, name="train")  # type: ignore[arg-type]
        except DataError as error:
            message = str(error)
            assert re.search(r"row \d+|column|no rows", message), (message, rows)
            continue
        except Exception as error:
            pytest.fail(f"{name} {kind}: {type(error).__name__}: {error}; rows {rows!r}")
        looked += 1
        broken_rows += result.findings["broken"].count
        assert bool(result.faults) == bool(result.findings["broken"].count)
        assert all(re.match(r"row \d+: .*[`']", fault) for fault in result.faults), result.faults
    assert looked > 100
    assert broken_rows > 100


@pytest.mark.slow
def test_broken_rows_with_images_end_in_ids_or_in_a_message_with_the_row(tmp_path: Any, monkeypatch: Any) -> None:
    from tiny_vision import picture, tiny_processor

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.png", "b.png")):
        picture(seed).save(name)
    processor, generator, done, refused = tiny_processor("llava"), random.Random(3), 0, 0
    for number in range(400):
        name, kind, good = WITH_IMAGES[number % len(WITH_IMAGES)]
        rows = [good if generator.random() < 0.6 else broken(good, generator) for _ in range(BATCH)]
        source: Any = rows if name is None else {"path": rows, "format": name}
        for action in (prepare, split_rows):
            try:
                data = load_rows(source, kind=kind, name="train")  # type: ignore[arg-type]
                if action is prepare:
                    prepare(data, processor, max_length=None, kind=kind)  # type: ignore[arg-type]
                else:
                    split_rows(data, {"split": 2, "by": "row"}, kind=kind)  # type: ignore[arg-type]
                done += 1
            except DataError as error:
                refused += 1
                message = str(error)
                said = re.search(r"row \d+|column|none of the|no rows|leaves one side empty", message)
                assert said, (message, rows)
            except Exception as error:
                pytest.fail(f"{name} {kind} {action.__name__}: {type(error).__name__}: {error}; rows {rows!r}")
    assert done > 50
    assert refused > 50


RUN = {
    "model": {"name": "m", "dtype": "float32"},
    "lora": {"r": 4, "target": ["q_proj"], "dropout": 0.0},
    "data": {
        "train": [{"path": "a.jsonl", "format": "hh", "fields": {"prompt": "q"}, "weight": 0.5}, "b.jsonl"],
        "eval": {"held": "c.jsonl", "other": {"path": "d.jsonl"}},
        "check": {"identical": 0.1},
    },
    "reference": {"meaning": "start", "method": "snapshot"},
    "objective": {"loss": "sigmoid", "beta": 0.1},
    "train": {"epochs": 1, "learning_rate": 1e-3, "batch_size": 4, "max_length": 64, "logging_steps": 1},
    "output": "out",
}
# Other trainers, and other forms of the sections.
RUNS: list[dict[str, Any]] = [
    RUN,
    {
        **RUN,
        "data": {"train": "a.jsonl", "eval": {"split": 0.1, "by": "prompt"}, "cache": "auto"},
        "objective": {"loss": "kto", "beta": 0.1, "desirable_weight": 2.0},
        "reference": {"meaning": "model", "model": "other"},
        "train": {**RUN["train"], "truncation_mode": "keep_end", "turns": "last"},
    },
    {**{key: RUN[key] for key in ("model", "data", "train", "output")}, "objective": {"loss": "sft"}},
    {**{key: RUN[key] for key in ("model", "data", "train", "output")}, "objective": {"loss": "orpo", "beta": 0.2}},
]
RUN_JUNK: list[Any] = [None, "", "x", 0, -1, 1.5, True, [], {}, [None], {"x": 1}, [[1]], {"path": 3}, "1e-3", math.inf]


@pytest.mark.slow
def test_five_hundred_broken_run_files_name_the_key(tmp_path: Any) -> None:
    generator = random.Random(11)
    path = tmp_path / "run.yaml"
    for good in RUNS:
        path.write_text(yaml.safe_dump(good), encoding="utf-8")
        load_run_file(path)
    refused = 0
    for number in range(RUN_FILES):
        values: dict[str, Any] = copy.deepcopy(RUNS[number % len(RUNS)])
        place = generator.choice([one for one in places(values) if all(isinstance(key, (str, int)) for key in one)])
        target: Any = values
        for key in place[:-1]:
            target = target[key]
        how = generator.random()
        if how < 0.7 or isinstance(target, list):
            target[place[-1]] = generator.choice(RUN_JUNK)
        elif how < 0.85:
            target[f"{place[-1]}x"] = target.pop(place[-1])
        else:
            del target[place[-1]]
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        try:
            load_run_file(path)
        except ConfigError as error:
            refused += 1
            message = str(error)
            keys = [str(key) for key in place]
            assert "run.yaml" in message or "`" in message, message
            assert any(re.search(rf"[`.]{re.escape(key)}x?[`.]", message) for key in keys), (place, message)
        except TetherError:
            raise
        except Exception as error:
            pytest.fail(f"{place}: {type(error).__name__}: {error}; {values!r}")
    assert refused > RUN_FILES // 4
