"""How the installed trainer calls its own methods, as it is written there."""

from __future__ import annotations

import ast
import inspect
import textwrap

from transformers import Trainer


def calls(method, called):
    """The calls of something inside a method of the trainer, in normal form.

    Args:
        method: name of the method.
        called: what is called, such as `self.log`.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(Trainer, method))))
    return [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == called]
