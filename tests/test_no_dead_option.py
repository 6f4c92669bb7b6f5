"""No dead option: each option of each command and each key of each configuration is read, and tried by a test.

What an option changes is the matter of its own tests; here none is forgotten. transformers' own options have a table
with a run for each in tests/training/test_training_arguments.py.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pydantic
import pytest
import typer

import tether.config.run
import tether.config.sections
import tether.training
from tether.cli.main import app
from tether.cli.words import commands_of
from tether.config.fields import keys_of
from tether.errors import ConfigError
from tether.training.saving.resume_check import super_of

ROOT = Path(__file__).resolve().parent.parent
# Where an option of the whole command line is read, though no function of its command does.
BY_ALL = {"debug": "tether.cli.main shows a traceback wherever --debug stands"}
# Taken because scripts for TRL say it; its help says that it does nothing.
TAKEN = {"remove_unused_columns"}


def command_functions() -> list[tuple[str, Any]]:
    """Every command with the function behind it."""
    return [
        (name, one.callback)
        for name, one in commands_of(typer.main.get_command(app))
        if one.callback is not None and one.params
    ]


def names_read(tree: ast.AST) -> set[str]:
    """Names that are read: variables, attributes, and texts, by which fields are asked for as well."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def function_body(function: Any) -> ast.Module:
    """The statements of a function, without its signature and docstring."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    assert isinstance(tree, ast.FunctionDef)
    return ast.Module(tree.body, [])


@pytest.mark.parametrize(("name", "function"), command_functions(), ids=lambda one: one if isinstance(one, str) else "")
def test_every_command_reads_its_options(name: str, function: Any) -> None:
    wanted = set(inspect.signature(inspect.unwrap(function)).parameters) - BY_ALL.keys()
    assert not wanted - names_read(function_body(function)), name


def test_an_option_that_nothing_reads_is_caught() -> None:
    def command(used: int, unused: int) -> int:
        """Reads one of them."""
        return used

    assert {"used", "unused"} - names_read(function_body(command)) == {"unused"}


def test_every_option_is_tried_by_a_test() -> None:
    said = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)
    )
    said += "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    missing = [
        f"{name} {option}"
        for name, one in commands_of(typer.main.get_command(app))
        for parameter in one.params
        if parameter.param_type_name == "option"
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--") and not re.search(rf"{option}(?![\w-])", said)
    ]
    assert not missing


def read_in(*folders: str) -> set[str]:
    """Names that modules of these folders read, declarations aside."""
    found: set[str] = set()
    for folder in folders:
        for path in (ROOT / "src" / "tether" / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    node.body = [one for one in node.body if not isinstance(one, ast.AnnAssign)] or [ast.Pass()]
            found |= names_read(tree)
    return found


def configurations() -> list[type[Any]]:
    """Every configuration of a trainer."""
    classes = [one for one in vars(tether.training).values() if isinstance(one, type)]
    return [one for one in classes if issubclass(one, tether.training.PreferenceConfig)]


def test_every_field_of_every_configuration_is_read() -> None:
    read = read_in("training", "objectives", "reference", "rollout", "rewards", "scoring", "compute")
    for config in configurations():
        theirs = {field.name for field in dataclasses.fields(super_of(config))}
        said = config.WITHOUT_EFFECT.keys() | config.UNFIT.keys()
        own = {field.name for field in dataclasses.fields(config)} - theirs - TAKEN - said
        assert not own - read, config.__name__


OTHER = {True: False, False: True, None: "other", "auto": 8, "bfd": "wrapped", "text": "body"}


@pytest.mark.parametrize("config", [tether.training.DPOConfig, tether.training.SFTConfig])
def test_what_is_only_taken_is_said_or_refused(config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tether")
    for name in (*config.WITHOUT_EFFECT, *config.UNFIT):
        caplog.clear()
        given = {"output_dir": str(tmp_path), "use_cpu": True, name: OTHER[config.__dataclass_fields__[name].default]}
        if name in config.WITHOUT_EFFECT:
            config(**given)
            assert caplog.messages == [f"{name}: no effect, {config.WITHOUT_EFFECT[name]}"]
        else:
            with pytest.raises(ConfigError, match=name):
                config(**given)


def test_every_key_of_a_run_file_is_read() -> None:
    modules = (tether.config.sections, tether.config.run)
    sections = {
        one
        for module in modules
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, pydantic.BaseModel) and one is not pydantic.BaseModel
    }
    # A key that stands for a field of a configuration is read as that field is; what is asked of a server or a judge,
    # and how the reference is had, by who asks.
    read = read_in("config", "cli", "models", "data", "rewards", "reference")
    read |= {key.rpartition(".")[2] for config in configurations() for key in keys_of(config).values()}
    for section in sections:
        assert not set(section.model_fields) - read, section.__name__
