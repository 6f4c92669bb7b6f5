"""Templates to pages: everything that is not markup already is escaped, and a page runs its own script and no other."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tether.report.numbers import number, signed

_TEMPLATES = Path(__file__).with_name("templates")


def fragment(name: str, **values: Any) -> Markup:
    """Fill a template.

    Args:
        name: of the file in `templates/`.
        values: what it asks for; a string among them is text, unless it is a fragment itself.

    Returns:
        Markup, which other templates take as it is.

    >>> fragment("list.html", lines=["a < b"])
    Markup('<ul><li>a &lt; b</li></ul>')
    """
    return Markup(_environment().get_template(name).render(**values).strip())


def page(template: str, title: str, **values: Any) -> str:
    """Fill the template of a whole page.

    Style and script are in the page, and its policy names them by their hashes: a page that failed to escape something
    would run no script of the data's all the same, and it loads nothing.

    Args:
        template: the file in `templates/`.
        title: of the page.
        values: what the template asks for.
    """
    style, script = _file("page.css"), _file("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    parts = {"style": Markup(style), "script": Markup(script), "policy": policy, "version": _version()}
    return _environment().get_template(template).render(title=title, **parts, **values).strip() + "\n"


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "signed": signed}
    return made


@functools.cache
def _file(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _version() -> str:
    try:
        return version("tether")
    except PackageNotFoundError:
        return "(not installed)"
