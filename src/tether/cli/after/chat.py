"""`tether chat RUN`: talk to a model and to its reference at once; lines from a pipe work too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from tether.cli.after.compare import MaxNew, Seed, Temperature, TopP
from tether.cli.after.options import Dtype, Model, Reference, load_pair, named_pair
from tether.cli.run import AsJson, Debug
from tether.errors import ConfigError

if TYPE_CHECKING:
    from tether.evaluate.answers.chat import Conversation

HELP = "Talk to a model and to what it was trained against, together, by the run's own template."
_COMMANDS = "/new forgets what was said, /quit ends"


def chat(
    model: Model,
    reference: Reference = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answer each line of the standard input.

    Raises:
        TetherError: nothing is at the model's name, or it writes nothing.
    """
    from tether.cli.output import terminal_output
    from tether.evaluate.answers.chat import Conversation
    from tether.evaluate.answers.sampling import Generation

    generation = Generation(max_new_tokens, temperature, top_p, seed)
    with terminal_output(debug):
        policy, other = load_pair(*named_pair(model, reference, dtype))
        if policy.named.classifies:
            raise ConfigError(f"'{model}' is a reward model, which writes nothing. Name a language model.")
        speakers = (policy,) if other is None else (policy, other)
        conversation = Conversation(speakers, generation, system)
        if system is not None and not conversation.chat:
            raise ConfigError(f"--system was given, but '{model}' was trained on text without turns. Leave it out.")
        _talk(conversation, as_json)


def _talk(conversation: Conversation, as_json: bool) -> None:
    import json

    if sys.stdin.isatty():
        how = "a conversation" if conversation.chat else "each line is a text that the models continue"
        typer.echo(f"{how}; {_COMMANDS}", err=True)
    for line in _lines():
        if line == "/new":
            conversation.restart()
            continue
        for name, said in conversation.say(line):
            if as_json:
                typer.echo(json.dumps({"prompt": line, "model": name, "answer": said}, ensure_ascii=False))
            else:
                typer.echo(f"{typer.style(name, bold=True)}: {said.strip()}")


def _lines() -> Iterator[str]:
    """Lines that are not empty, until the end or /quit."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.rstrip("\n")
