"""Rows with images."""

from __future__ import annotations

from tiny_vision import picture


def row(count=1, *, parts=True, text="what is it", **changes):
    content = [{"type": "text", "text": "look "}, *[{"type": "image"}] * count, {"type": "text", "text": text}]
    return {
        "images": [picture(k, 16 + 8 * k, 16) for k in range(count)],
        "prompt": [{"role": "user", "content": content if parts else text}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "a film"}] if parts else "a film"}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "it"}] if parts else "it"}],
        **changes,
    }
