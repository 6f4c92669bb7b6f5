"""Axolotl's published package: every key of its schema has a mark, every example becomes a run or stops by a key.

`make test-axolotl` fetches it. Its source is read, and nothing of it is run.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

from tether.config import load_run_file
from tether.config.foreign import convert_file, is_foreign
from tether.config.foreign.table import load_table
from tether.config.foreign.write import run_file_text
from tether.errors import ConfigError

SOURCE = os.environ.get("AXOLOTL_SOURCE", "")


def fields_of(folder: Path, name: str) -> set[str]:
    """Fields of a class with those of the classes that it is made of, all in the files of a folder."""
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.py")))
    classes = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def own(name: str) -> set[str]:
        if name not in classes:
            return set()
        lines = (line.target for line in classes[name].body if isinstance(line, ast.AnnAssign))
        bases = (base.id for base in classes[name].bases if isinstance(base, ast.Name))
        return {target.id for target in lines if isinstance(target, ast.Name)}.union(*map(own, bases))

    return own(name)


published = pytest.mark.skipif(
    not SOURCE, reason="AXOLOTL_SOURCE names no unpacked package; make test-axolotl fetches one"
)


@published
def test_every_example_becomes_the_same_run_or_stops_by_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(SOURCE)
    files = [file for file in sorted(Path("examples").rglob("*.y*ml")) if is_foreign(file)]
    stopped: list[str] = []
    for file in files:
        try:
            found = convert_file(file)
        except ConfigError as error:
            stopped.append(str(error))
            continue
        (tmp_path / "run.yaml").write_text(run_file_text(found), encoding="utf-8")
        assert load_run_file(tmp_path / "run.yaml").to_dict() == found.run.to_dict(), file
    assert [one for one in stopped if not re.search(r"examples/\S+, line \d+[:,] .*`", one)] == []
    assert len(files) > 250
    assert len(stopped) < 120


@published
def test_every_key_of_the_published_schema_has_a_mark() -> None:
    found = fields_of(Path(SOURCE) / "src" / "axolotl" / "utils" / "schemas", "AxolotlInputConfig")
    assert len(found) > 350
    assert found - load_table("axolotl").keys() == set()


def test_a_key_without_a_mark_is_found(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text("class AxolotlInputConfig(More):\n    base_model: str\n    rl = None\n")
    (tmp_path / "more.py").write_text("class More(Far):\n    no_such_key: int = 1\n")
    found = fields_of(tmp_path, "AxolotlInputConfig")
    assert found == {"base_model", "no_such_key"}
    assert found - load_table("axolotl").keys() == {"no_such_key"}
