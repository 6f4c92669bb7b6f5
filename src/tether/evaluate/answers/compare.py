"""Answers of two models to the same prompts, as a table and as a page that needs nothing beside it."""

from __future__ import annotations

import html
from dataclasses import dataclass

from datasets import Dataset

from tether.evaluate.answers.sampling import Generation, answer
from tether.evaluate.named_models import Loaded
from tether.rewards.judge import prompt_text

# Even a page that failed to escape something could run no script and load nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_CSS = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 0 auto; padding: 1rem; }
article { border-top: 1px solid #8886; padding: 1rem 0; break-inside: avoid; }
.prompt { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
h2 { font-size: .85rem; font-weight: 600; opacity: .7; margin: .5rem 0 0; overflow-wrap: anywhere; }
p.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0; }
"""


@dataclass(frozen=True)
class Answers:
    """A prompt, as text, and what each model wrote."""

    prompt: str
    left: str
    right: str


@dataclass(frozen=True)
class Comparison:
    """Two models by name, how answers were drawn, and the answers."""

    left: str
    right: str
    how: str
    rows: tuple[Answers, ...]


def compare_answers(left: Loaded, right: Loaded, prompts: Dataset, generation: Generation) -> Comparison:
    """Have both models answer.

    Args:
        left: a model.
        right: another one, or the same.
        prompts: see `tether.evaluate.answers.sampling.prompt_rows`.
        generation: how answers are drawn; both get the same draws.
    """
    texts = [answer(one, prompts, generation) for one in (left, right)]
    rows = zip(prompts["prompt"], *texts, strict=True)
    return Comparison(
        left.named.name,
        right.named.name,
        generation.words(),
        tuple(Answers(prompt_text(prompt), first, second) for prompt, first, second in rows),
    )


def comparison_page(found: Comparison) -> str:
    """One HTML document without scripts; all text escaped."""
    parts = [
        f'<article><p class="prompt">{_text(row.prompt)}</p><div class="two">'
        f'<section><h2>{_text(found.left)}</h2><p class="text">{_text(row.left)}</p></section>'
        f'<section><h2>{_text(found.right)}</h2><p class="text">{_text(row.right)}</p></section></div></article>'
        for row in found.rows
    ]
    title = f"{found.left} and {found.right}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_text(title)}</title>'
        f"<style>{_CSS}</style></head><body><h1>{_text(title)}</h1>"
        f"<p>{len(found.rows)} prompts; {_text(found.how)}.</p>{''.join(parts)}</body></html>\n"
    )


def _text(text: str) -> str:
    return html.escape(text, quote=True)
