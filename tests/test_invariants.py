"""Each law of docs/invariants.md is stated by a test that names its number: `INV-4` in its docstring."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "invariants.md"
LAWS = {int(number) for number in re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), flags=re.M)}
_CITED = re.compile(r"INV-(\d+(?:(?:, | and )\d+)*)")


def cited(source: str) -> Iterator[tuple[str, set[int]]]:
    """Test functions of a module, each with the laws that its own docstring or name cites."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            groups = _CITED.findall(f"{node.name} {ast.get_docstring(node) or ''}")
            yield node.name, {int(number) for group in groups for number in re.findall(r"\d+", group)}


def test_each_law_has_a_test_that_names_it_and_each_name_is_a_law():
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for name, laws in cited(path.read_text(encoding="utf-8")):
            for law in laws:
                found.setdefault(law, []).append(f"{path.name}::{name}")
    assert len(LAWS) > 35
    assert not LAWS - found.keys(), f"no test cites INV-{', INV-'.join(map(str, sorted(LAWS - found.keys())))}"
    assert not found.keys() - LAWS, f"not in {PAGE.name}: { ({law: found[law] for law in found.keys() - LAWS}) }"


def test_each_law_of_sampled_completions_has_a_test_that_names_it():
    page = PAGE.read_text(encoding="utf-8")
    laws = {int(number) for number in re.findall(r"^\| R(\d+) \|", page, flags=re.M)}
    found: dict[int, set[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for number in re.findall(r"\bR(\d+)\b", ast.get_docstring(node) or ""):
                    found.setdefault(int(number), set()).add(f"{path.name}::{node.name}")
    assert laws == set(range(1, 25))
    assert found.keys() == laws, f"not cited: {sorted(laws - found.keys())}; no laws: {sorted(found.keys() - laws)}"
    listed = re.findall(r"^\| R(\d+) \| (`test_\w+\.py::.*) \| (.+) \|$", page, flags=re.M)
    assert [int(law) for law, _, _ in listed] == sorted(laws), "each is in the table of tests, once"
    for law, tests, fails in listed:
        unknown = set(re.findall(r"`(test_\w+\.py::\w+)`", tests)) - found[int(law)]
        assert not unknown, f"R{law}: no test of that name cites it: {', '.join(sorted(unknown))}"
        assert fails.strip()


def test_a_citation_is_of_the_function_that_has_it():
    """Negative control: a number in a module's docstring, or in a helper's, proves nothing."""
    source = '''
"""INV-9 for the whole module."""
def helper():
    """INV-8"""
def test_one():
    """Something else: INV-1, 2 and 14, and 3 more."""
def test_two(): pass
'''
    assert dict(cited(source)) == {"test_one": {1, 2, 14}, "test_two": set()}
