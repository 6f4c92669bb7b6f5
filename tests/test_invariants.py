"""The laws of the reference layer are each stated by a test that names its number: `INV-4` in its docstring."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
# Of the reference, of the store, and of the numbers that both keep.
LAWS = {*range(1, 16), 22}
_CITED = re.compile(r"INV-(\d+(?:(?:, | and )\d+)*)")


def cited(source: str) -> Iterator[tuple[str, set[int]]]:
    """Test functions of a module, each with the laws that its own docstring or name cites."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            groups = _CITED.findall(f"{node.name} {ast.get_docstring(node) or ''}")
            yield node.name, {int(number) for group in groups for number in re.findall(r"\d+", group)}


def test_each_law_of_the_reference_has_a_test_that_names_it():
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for name, laws in cited(path.read_text(encoding="utf-8")):
            for law in laws:
                found.setdefault(law, []).append(f"{path.name}::{name}")
    assert not LAWS - found.keys(), f"no test cites INV-{', INV-'.join(map(str, sorted(LAWS - found.keys())))}"


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
