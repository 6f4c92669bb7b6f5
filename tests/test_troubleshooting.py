"""The page of messages has messages that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def constants() -> str:
    """All text of the package, joined as it is written into messages."""
    texts = []
    for path in (ROOT / "src" / "tether").rglob("*.py"):
        texts += [
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return "\n".join(texts)


def test_each_heading_is_a_part_of_a_message():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    said = constants()
    headings = re.findall(r"^### (.*)$", page, flags=re.MULTILINE)
    assert len(headings) > 15
    assert [heading for heading in headings if heading not in said] == []
    assert "The policy is not near its reference" not in said, "a sentence that is nowhere must be missed"
