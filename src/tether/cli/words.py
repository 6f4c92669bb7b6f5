"""How the help of a command speaks: what an option takes in a person's words, and an example of each command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

# What an option takes, by its name; what is not here, by its type.
_TAKES = {
    "adapter": "FOLDER",
    "beta": "NUMBER",
    "by": "COLUMN",
    "command": "COMMAND",
    "config": "FILE",
    "data": "FILE",
    "dtype": "TYPE",
    "evaluation": "FILE",
    "judge_key": "VARIABLE",
    "judge_model": "NAME",
    "kind": "KIND",
    "layout": "FORMAT",
    "model": "RUN|MODEL",
    "page": "FILE.html",
    "quantization": "BITS",
    "reference": "RUN|MODEL",
    "revision": "NAME",
    "rewards": "REWARD",
    "split": "NAME",
    "to": "FILE",
    "tokenizer": "MODEL",
    "truncation": "MODE",
    "turns": "WHICH",
}
_BY_TYPE: dict[Any, str | None] = {
    bool: None,
    int: "NUMBER",
    float: "NUMBER",
    Path: "PATH",
    str: "TEXT",
    list[str]: "TEXT",
}
_EXAMPLES = {
    "train": "tether train run.yaml train.learning_rate=1e-5 output=runs/second",
    "init": "tether init run.yaml --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --yes",
    "plan": "tether plan run.yaml --gpu 80GiB --gpus 8 --fsdp",
    "demo": "tether demo --output runs/demo",
    "precompute": "tether precompute run.yaml reference.store=reference-store",
    "sample": "tether sample run.yaml --as pairs --to pairs.jsonl",
    "convert": "tether convert axolotl.yaml --output run.yaml",
    "eval": "tether eval runs/demo --data heldout.jsonl --by source",
    "score": "tether score pairs.jsonl --model runs/demo --output scores.parquet",
    "compare": "tether compare runs/demo:reference runs/demo --data prompts.jsonl --first 8 --html compare.html",
    "chat": "tether chat runs/demo, or: echo 'My review:' | tether chat runs/demo --max-new-tokens 32",
    "report": "tether report runs/demo --watch",
    "merge": "tether merge runs/demo --output models/demo --data heldout.jsonl",
    "export": "tether export runs/demo",
    "rollouts show": "tether rollouts show runs/grpo --prompts 2 --whole",
    "rollouts score": "tether rollouts score runs/grpo --reward rewards.py:short --to rewards.jsonl",
    "store info": "tether store info reference-store",
    "store verify": "tether store verify reference-store run.yaml --rows 256",
    "store compact": "tether store compact reference-store",
    "store export": "tether store export reference-store reference.parquet",
    "data check": "tether data check pairs.jsonl --eval heldout.jsonl --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct",
    "data show": "tether data show pairs.jsonl --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct --row 3",
    "doctor": "tether doctor, or: tether doctor model HuggingFaceTB/SmolLM2-135M-Instruct",
    "doctor model": "tether doctor model runs/sft --lora 0",
}


def commands_of(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command below one that typer built, groups included, each with its words."""
    if path:
        yield " ".join(path), command
    for name, one in getattr(command, "commands", {}).items():
        yield from commands_of(one, (*path, name))


def in_words(command: Any) -> Any:
    """The same command line, whose help has words for types and an example for each command.

    Args:
        command: what `typer.main.get_command` built; changed in place.
    """
    for name, one in [("", command), *commands_of(command)]:
        example = _EXAMPLES.get(name) or (f"tether {name} --config {name}.yaml" if one.params and name else "")
        if example:
            one.epilog = f"Example: {example}"
        help_option = one.get_help_option(typer.Context(one))
        for parameter in [*one.params, *([help_option] if help_option is not None else [])]:
            parameter.display_type = _taking(parameter)
    return command


def _taking(parameter: Any) -> Callable[[Any], str | None]:
    kind = parameter.type_descriptor
    if kind.is_choice:
        return lambda context: "|".join(str(getattr(one, "value", one)) for one in kind.choices)
    if parameter.param_type_name == "argument":
        return lambda context: None  # its name says it
    words = None if kind.annotation is bool else _TAKES.get(parameter.name, _BY_TYPE.get(kind.annotation, "VALUE"))
    return lambda context: words


def rows_named(given: str) -> Any:
    """Rows as they are named at the terminal: a path or hub name, or a mapping as in a run file.

    Raises:
        ConfigError: a text that begins as a mapping is none.

    Example:
        >>> rows_named("a.csv"), rows_named("{path: a.csv, fields: {prompt: Asked}}")
        ('a.csv', {'path': 'a.csv', 'fields': {'prompt': 'Asked'}})
    """
    if not given.lstrip().startswith("{"):
        return given
    from tether.config.document import parse

    return parse(given, "the rows")[0]
